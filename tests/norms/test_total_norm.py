"""The total norm and the clipped gradients are those of the whole model, on every layout."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from tests.support import reference
from tests.support.layouts import LAYOUTS, UNSHARDED, lay_out, random_wholes, whole
from tests.support.ranks import Ranks, same_bits_everywhere
from tests.support.tolerances import NORM, TOLERANCES

NORM_TYPES = [0.5, 1.0, 2.0, 3.0, 8.0, math.inf]


def clips_as_the_reference(layout: str, norm_type: float, dtype: torch.dtype, device: str) -> None:
    wholes = random_wholes(LAYOUTS[layout], seed=7, dtype=dtype)
    expected = reference.total_norm(wholes, norm_type)
    max_norm = 0.5 * expected.item()  # so that clipping happens
    params = lay_out(wholes, LAYOUTS[layout], device)

    distclip.clip_grad_norm_(params, math.inf)  # compares copies, once
    with CommDebugMode() as comms:
        norm = distclip.clip_grad_norm_(params, max_norm, norm_type)

    assert comms.get_total_counts() == (0 if layout in UNSHARDED else 1)
    assert type(norm) is torch.Tensor
    assert norm.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert norm.shape == ()
    torch.testing.assert_close(norm.cpu().double(), expected, **NORM)
    assert same_bits_everywhere(norm)
    clipped = reference.clip_norm(wholes, max_norm, norm_type, eps=1e-6)
    for param, want in zip(params, clipped, strict=True):
        torch.testing.assert_close(whole(param.grad), want.to(dtype), **TOLERANCES[dtype])


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_clips_as_the_reference(
    four_ranks: Ranks, layout: str, norm_type: float
) -> None:
    four_ranks.run(clips_as_the_reference, layout, norm_type, torch.float32, four_ranks.device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("layout", ["fsdp uneven and empty", "fsdp x tp", "beside plain"])
def test_every_dtype_clips_as_the_reference(
    four_ranks: Ranks, layout: str, dtype: torch.dtype
) -> None:
    four_ranks.run(clips_as_the_reference, layout, 2.0, dtype, four_ranks.device)
