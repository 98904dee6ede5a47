"""Every policy in the tests of this folder, and how to run one on a series of norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distclip.policies import (
    AGC,
    AGGC,
    AdaGC,
    AdaGN,
    AutoClip,
    ClipBlockRMS,
    ClipNorm,
    ClipTensorNorm,
    ClipValue,
    NormContext,
    Policy,
    Scope,
    SkipSpike,
    ZClip,
    raises,
)

F64 = torch.float64
CLOSE = {"rtol": 1e-12, "atol": 0.0}  # float64 sums in another order

POLICIES: dict[str, Policy[Any]] = {
    "norm": ClipNorm(1.0),
    "norm, p = 1": ClipNorm(1.0, 1.0),
    "tensor norm": ClipTensorNorm(1.0),
    "block RMS": ClipBlockRMS(0.1),
    "value": ClipValue(0.5),
    "AGC": AGC(),
    "AutoClip": AutoClip(history=7),
    "ZClip": ZClip(warmup_steps=4),
    "AdaGC": AdaGC(warmup_steps=4),
    "AdaGN": AdaGN(),
    "AGGC": AGGC(0.8, 1.2, 0.7),
    "minimum": ClipNorm(3.0) & AutoClip(50.0, history=5) & ZClip(warmup_steps=3),
    "SkipSpike": SkipSpike(4.0, window=6) & ClipNorm(3.0),
    "SkipSpike, raising": SkipSpike(4.0, window=6) & AGGC(),
    "minimum per tensor": ClipTensorNorm(2.0) & AdaGC(warmup_steps=3),
}


def context(norms: Tensor, size: float = 12.0, weight: float = 0.3) -> NormContext:
    total = torch.linalg.vector_norm(norms)
    return NormContext(torch.full_like(norms, size), torch.full_like(norms, weight), total)


def norms_shape(policy: Policy[Any], num_groups: int = 3) -> tuple[int, ...]:
    return (num_groups,) if policy.scope in (Scope.TENSOR, Scope.UNIT) else ()


def clipped_norms(policy: Policy[Any], steps: Sequence[Any]) -> Tensor:
    """The norms of each step after clipping."""
    state = policy.init(torch.tensor(steps[0]).numel(), torch.device("cpu"))
    clipped: list[Tensor] = []
    for step in steps:
        norms = torch.tensor(step, dtype=F64)
        limit, state = policy.limit(norms, state, context(norms))
        clipped.append(norms if limit is None else _norms_at(policy, norms, limit))
    return torch.stack(clipped)


def _norms_at(policy: Policy[Any], norms: Tensor, limit: Tensor) -> Tensor:
    if raises(policy):
        return torch.where((norms == 0) | limit.isinf(), norms, limit)
    return torch.minimum(norms, limit)


def spiky_norms(num_steps: int, seed: int, shape: tuple[int, ...] = ()) -> list[Any]:
    """Norms around 1, with spikes."""
    generator = torch.Generator().manual_seed(seed)
    norms = torch.randn(num_steps, *shape, generator=generator, dtype=F64).mul(0.4).exp()
    spikes = torch.rand(norms.shape, generator=generator) < 0.08
    return torch.where(spikes, norms * 20, norms).tolist()


def assert_clips_to(policy: Policy[Any], steps: list[Any], expected: Any) -> None:
    expected = torch.as_tensor(expected, dtype=F64)
    assert (expected < torch.tensor(steps, dtype=F64)).any()
    torch.testing.assert_close(clipped_norms(policy, steps), expected, **CLOSE)
