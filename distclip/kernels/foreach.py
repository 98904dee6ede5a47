"""For any device: torch's own multi-tensor kernels where their numbers are right, else the loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from distclip.kernels import naive as loops
from distclip.kernels.naive import clamp_, norms, scale_each_, zero_

__all__ = ["clamp_", "norms", "power_sums", "scale_", "scale_each_", "zero_"]

_torch = cast(Any, torch)  # its optimizers are made of its multi-tensor functions, but it calls them private


def power_sums(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """As `loops.power_sums`. The norms are float64, in which neither 1e-30 nor 1e30 has a square out of range."""
    full = [t for t in tensors if t.numel()]
    plain = norm_type in (1, 2, math.inf) and not any(t.is_complex() for t in full)
    if not full or not plain:
        return loops.power_sums(tensors, norm_type)
    each = iter(_torch._foreach_norm(full, norm_type, dtype=torch.float64))
    zero = torch.zeros((), dtype=torch.float64, device=full[0].device)
    found = torch.stack([next(each) if t.numel() else zero for t in tensors])
    return found if math.isinf(norm_type) else found**norm_type


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """As `loops.scale_`, without a look at the coefficient."""
    for dtype in {t.dtype for t in tensors}:
        alike = [t for t in tensors if t.dtype == dtype]
        if dtype in (torch.float32, torch.float64):
            _torch._foreach_mul_(alike, coefficient.to(dtype))
        else:  # they would round the coefficient to 16 bits before they multiply
            loops.scale_(alike, coefficient)
