"""AdaGN and AGGC on every layout, against the float64 reference on the whole gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import distclip
from distclip import AGGC, AdaGN, Clipper
from tests.norms.test_units import gathered
from tests.support import reference
from tests.support.layouts import LAYOUTS, lay_out, random_wholes, whole
from tests.support.ranks import Ranks, same_bits_everywhere
from tests.support.tolerances import TOLERANCES
from tests.support.wrapped import make_model, whole_gradients, with_gradients

ON_RANKS = ["fsdp", "fsdp uneven and empty", "hsdp", "tp", "fsdp x tp", "two meshes", "plain"]
SIZES = [0.01, 0.01, 20.0, 1e-4, 1.0, 1e-6]


def gradients(layout: str, dtype: torch.dtype) -> list[list[Tensor]]:
    """Of six steps, in which one tensor has none for a while."""
    steps = [
        [size * whole for whole in random_wholes(LAYOUTS[layout], seed=step, dtype=dtype)]
        for step, size in enumerate(SIZES)
    ]
    for step in (1, 2):
        steps[step][0].zero_()
    return steps


def scaled_by_reference(policy: Any, steps: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    if isinstance(policy, AdaGN):
        each = [[grad.double().norm().item() for grad in grads] for grads in steps]
        new = reference.adagn(each, policy.gamma1, policy.gamma2, policy.eps).tolist()
    else:
        norms = [reference.total_norm(grads).item() for grads in steps]
        bounds = (policy.low, policy.high, policy.beta, policy.max_down, policy.max_up)
        after = reference.aggc(norms, *bounds)
        each = [[norm] * len(grads) for norm, grads in zip(norms, steps, strict=True)]
        new = [[norm] * len(grads) for norm, grads in zip(after, steps, strict=True)]
    factors = [
        [b / a if a else 1.0 for a, b in zip(old, now, strict=True)]
        for old, now in zip(each, new, strict=True)
    ]
    assert max(map(max, factors)) > 1.05
    assert min(map(min, factors)) < 0.95
    return [
        [grad.double() * factor for grad, factor in zip(grads, row, strict=True)]
        for grads, row in zip(steps, factors, strict=True)
    ]


def on_ranks(policy: Any, layout: str, dtype: torch.dtype, device: str) -> None:
    steps = gradients(layout, dtype)
    params = lay_out(steps[0], LAYOUTS[layout], device)
    clipper = Clipper(params, policy)
    for step, expected in enumerate(scaled_by_reference(policy, steps)):
        laid_out = lay_out(steps[step], LAYOUTS[layout], device)
        for param, source in zip(params, laid_out, strict=True):
            param.grad = source.grad
        report = clipper.clip_()
        assert same_bits_everywhere(report.total_norm)
        for param, want in zip(params, expected, strict=True):
            found = whole(param.grad).double()
            torch.testing.assert_close(found, want, **TOLERANCES[dtype])
        if step == 2:  # and on from a checkpoint
            saved = copy.deepcopy(clipper.state_dict())
            clipper = Clipper(params, policy)
            clipper.load_state_dict(saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", [AdaGN(), AGGC(0.9, 1.1, 0.6, 0.0, 50.0)], ids=["n", "g"])
@pytest.mark.parametrize("layout", ON_RANKS)
def test_on_four_ranks(four_ranks: Ranks, layout: str, policy: Any, dtype: torch.dtype) -> None:
    four_ranks.run(on_ranks, policy, layout, dtype, four_ranks.device)


WRAPPED = ["ddp", "fsdp1 FULL_SHARD flat", "fsdp1 HYBRID_SHARD original", "fsdp2", "hsdp", "tp"]
SHRUNK = [1.0, 1.0, 30.0, 1e-5]


def on_wrapped(kind: str, device: str) -> None:
    """Each tensor of the model, whatever holds its shards, against the whole gradients."""
    wrapped, whole_model = with_gradients(kind, device), make_model()
    distclip.clip_grad_norm_(wrapped, math.inf)  # reduces Partial gradients
    clipper = Clipper(wrapped, AdaGN())
    own = [(p, p.grad.clone()) for p in wrapped.parameters() if p.grad is not None]
    wholes = [[size * grad.double() for grad in whole_gradients()] for size in SHRUNK]
    expected = scaled_by_reference(AdaGN(), wholes)
    for size, wants in zip(SHRUNK, expected, strict=True):
        for param, grad in own:
            param.grad.copy_(size * grad)
        clipper.clip_()
        for found, want in zip(gathered(clipper.plan, whole_model), wants, strict=True):
            torch.testing.assert_close(found.double(), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_models_on_four_ranks(four_ranks: Ranks, kind: str) -> None:
    four_ranks.run(on_wrapped, kind, four_ranks.device)
