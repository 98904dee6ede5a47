"""What this rank adds to the norm: local, without communication."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distclip import kernels, powers
from distclip.plan import Group, Plan


class Local(NamedTuple):
    """What this rank measured.

    Attributes:
        columns: of every group, one after the other: float64 [plan.num_columns].
        names, each: the parameters that have a gradient, and a number for each, float64: the sum of its powers or
            its norm, not finite where the gradient is not.
    """

    columns: Tensor
    names: list[str]
    each: Tensor


def local(values: Sequence[Tensor | None], plan: Plan) -> Local:
    """Reads every gradient once."""
    measured = [_group(values, group, plan) for group in plan.groups]
    names = [name for group in measured for name in group.names]
    return Local(torch.cat([m.columns for m in measured]), names, torch.cat([m.each for m in measured]))


def local_norms(values: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """The norm of each tensor's elements on this rank: float64 [len(values)]."""
    if norm_type <= powers.PLAIN_UP_TO:
        return _power_sums(values, norm_type, device) ** (1 / norm_type)
    maxima = _power_sums(values, math.inf, device)
    if math.isinf(norm_type):
        return maxima
    norms = maxima * _power_sums(values, norm_type, device, maxima) ** (1 / norm_type)
    return torch.where(maxima.isinf(), maxima, norms)


def _group(values: Sequence[Tensor | None], group: Group, plan: Plan) -> Local:
    here = [(h, v) for h, v in zip(plan.held[group.members], values[group.members], strict=True) if v is not None]
    here.sort(key=lambda found: not found[0].counted)  # a slice of what is measured needs no index on the device
    num_counted = sum(h.counted for h, _ in here)
    each = _each([v for _, v in here], group.norm_type, plan.device)
    # Copies add zero, unless one is broken: a NaN must be seen whichever rank has it.
    copies = each[num_counted:]
    added = torch.cat([each[:num_counted], torch.where(copies.isfinite(), 0.0, copies)])
    return Local(_columns(added, group.norm_type), [h.name for h, _ in here], each)


def _each(values: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    sums = norm_type <= powers.PLAIN_UP_TO
    return _power_sums(values, norm_type, device) if sums else local_norms(values, norm_type, device)


def _columns(each: Tensor, norm_type: float) -> Tensor:
    if norm_type <= powers.PLAIN_UP_TO:
        return each.sum(0, keepdim=True)
    return powers.maximum(each) if math.isinf(norm_type) else powers.binned(each, norm_type)


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
