"""Any device: torch's multi-tensor functions where their numbers are right, `naive` elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from distclip.kernels import naive
from distclip.kernels.contiguous import grouped
from distclip.kernels.naive import (
    clamp_,
    coefficients,
    norms,
    prepare,
    prepare_units,
    scale_each_,
    scale_units_,
    tensor_lists,
    total,
    unit_norms,
    zero_,
)
from distclip.torch_private import foreach_mul_, foreach_norm, host_has_values

__all__ = [
    "clamp_",
    "coefficients",
    "norms",
    "power_sums",
    "power_sums_where",
    "prepare",
    "prepare_units",
    "scale_",
    "scale_each_",
    "scale_units_",
    "tensor_lists",
    "total",
    "unit_norms",
    "unit_power_sums",
    "zero_",
]


def power_sums(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norms are float64, in which the squares of 1e-30 and 1e30 are in range."""
    full = [t for t in tensors if t.numel()]
    supported = norm_type in (1, 2, math.inf) and not any(t.is_complex() for t in full)
    if not full or not supported:
        return naive.power_sums(tensors, norm_type)
    norms_of_full = iter(foreach_norm(full, norm_type, dtype=torch.float64))
    zero = torch.zeros((), dtype=torch.float64, device=full[0].device)
    found = torch.stack([next(norms_of_full) if t.numel() else zero for t in tensors])
    return found if math.isinf(norm_type) else found**norm_type


def power_sums_where(
    tensors: Sequence[Tensor], norm_type: float, where: Tensor, otherwise: Tensor
) -> Tensor:
    """Reads all; a look at `where` would wait for the device."""
    return torch.where(where, power_sums(tensors, norm_type), otherwise)


def unit_power_sums(
    tensors: Sequence[Tensor], dims: Sequence[int | None], norm_type: float
) -> Tensor:
    """Whole tensors as in `power_sums`."""
    return naive.unit_numbers(tensors, dims, norm_type, power_sums, naive.dim_power_sums)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """Writes even if the coefficient is 1, because a look at it would wait for the device."""
    for alike in grouped(tensors, attrgetter("dtype")):
        dtype = alike[0].dtype
        tiny = host_has_values(coefficient) and naive.is_tiny(coefficient.item())
        if dtype in (torch.float32, torch.float64) and not tiny:
            foreach_mul_(alike, coefficient.to(dtype))
        else:  # foreach_mul_ would round the coefficient to 16 bits before it multiplies
            naive.scale_(alike, coefficient)
