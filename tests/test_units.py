"""Per-tensor and per-unit policies give on every layout what they give on whole tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import distclip
from distclip.policies.tensor import ClipTensorNorm
from tests.layouts import LAYOUTS, lay_out, random_wholes, whole
from tests.ranks import Ranks
from tests.tolerances import TOLERANCES
from torch.distributed.tensor.debug import CommDebugMode
from tests.wrapped import WRAPPERS, local, whole_gradients, with_gradients


def tensors_clip(layout: str, norm_type: float, device: str) -> None:
    wholes = random_wholes(LAYOUTS[layout], seed=7)
    params = lay_out(wholes, LAYOUTS[layout], device)
    with CommDebugMode() as comms:
        report = distclip.Clipper(params, ClipTensorNorm(0.5, norm_type)).clip_()
    assert comms.get_total_counts() <= 1
    for param, want in zip(params, wholes, strict=True):
        norm = torch.linalg.vector_norm(want.double(), norm_type)
        want = want * min(1.0, 0.5 / norm.item())
        torch.testing.assert_close(whole(param.grad), want, rtol=2e-7, atol=0)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 8.0, math.inf])
def test_tensor_norm(four_ranks: Ranks, norm_type: float) -> None:
    for layout in LAYOUTS:
        four_ranks.run(tensors_clip, layout, norm_type, four_ranks.device)


def wrapped_clip(kind: str, device: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel as F
    model = with_gradients(kind, device)
    before = [None if p.grad is None else local(p.grad).clone() for p in model.parameters()]
    clipper = distclip.Clipper(model, ClipTensorNorm(0.05))
    clipper.clip_()
    names = [s.part.name for s in clipper.plan.groups[0].units.spans]
    from tests.wrapped import make_model
    wholes = dict(zip([n for n, _ in make_model().named_parameters()], whole_gradients(), strict=True))
    coefs = {n: min(1.0, 0.05 / g.norm().item()) for n, g in wholes.items()}
    for span in clipper.plan.groups[0].units.spans:
        held = clipper.plan.held[span.held]
        i = [id(p) for p in model.parameters()].index(id(held.param))
        if before[i] is None:
            continue
        for (now, _), (was, _) in zip(span.views(local(held.param.grad)), span.views(before[i]), strict=True):
            name = span.part.name.removeprefix("module.")
            torch.testing.assert_close(now[0], was[0] * coefs[name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrapped(four_ranks: Ranks, kind: str) -> None:
    four_ranks.run(wrapped_clip, kind, four_ranks.device)
