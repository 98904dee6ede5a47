"""What this rank adds to the norm: local, without communication."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distclip import kernels, powers
from distclip.plan import Group, Plan


def local_sums(values: Sequence[Tensor | None], plan: Plan) -> Tensor:
    """The columns of every group, one after the other, as this rank adds them: float64 [plan.num_columns]."""
    return torch.cat([_columns(values, group, plan) for group in plan.groups])


def local_norms(values: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """The norm of each tensor's elements on this rank: float64 [len(values)]."""
    if norm_type <= powers.PLAIN_UP_TO:
        return _power_sums(values, norm_type, device) ** (1 / norm_type)
    maxima = _power_sums(values, math.inf, device)
    if math.isinf(norm_type):
        return maxima
    norms = maxima * _power_sums(values, norm_type, device, maxima) ** (1 / norm_type)
    return torch.where(maxima.isinf(), maxima, norms)


def _columns(values: Sequence[Tensor | None], group: Group, plan: Plan) -> Tensor:
    here = [(held, v) for held, v in zip(plan.held[group.members], values[group.members], strict=True) if v is not None]
    if math.isinf(group.norm_type):  # a maximum does not mind copies
        return _joined([v for _, v in here], math.inf, plan.device)
    sums = _joined([v for held, v in here if held.counted], group.norm_type, plan.device)
    if copies := [v for held, v in here if not held.counted]:
        # Copies add zero, unless one is broken: a NaN must be seen whichever rank has it.
        seen = _joined(copies, group.norm_type, plan.device)
        sums = sums + torch.where(seen.isfinite(), 0.0, seen)
    return sums


def _joined(values: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    if norm_type <= powers.PLAIN_UP_TO:
        return _power_sums(values, norm_type, device).sum(0, keepdim=True)
    norms = local_norms(values, norm_type, device)
    return powers.maximum(norms) if math.isinf(norm_type) else powers.binned(norms, norm_type)


def _power_sums(
    values: Sequence[Tensor], norm_type: float, device: torch.device, scales: Tensor | None = None
) -> Tensor:
    """`kernels.power_sums` of tensors on several devices, brought together on one."""
    sums = torch.zeros(len(values), dtype=torch.float64, device=device)
    for there in {v.device for v in values}:
        index = [i for i, v in enumerate(values) if v.device == there]
        part = kernels.power_sums(
            [values[i] for i in index], norm_type, None if scales is None else scales[index].to(there)
        )
        if len(index) == len(values):
            return part.to(device)
        sums[index] = part.to(device)
    return sums
