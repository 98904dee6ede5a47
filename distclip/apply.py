"""From limits to gradients: the coefficient, and the one pass that writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from distclip import kernels


def coefficient(norm: Tensor, limit: Tensor) -> Tensor:
    """min(1, limit / norm); 1 up to the limit, also where both are zero or infinite; NaN where either is NaN."""
    return torch.where(norm <= limit, 1.0, limit / norm)


def scale_(values: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies dense values, on any devices, by a float64 scalar. On a CPU a factor of 1 writes nothing."""
    for device in {v.device for v in values}:
        kernels.scale_([v for v in values if v.device == device], factor.to(device))


def zero_(values: Sequence[Tensor], where: Tensor) -> None:
    """Sets dense values, on any devices, to zero if the bool scalar `where` is true: NaN and infinities too."""
    for device in {v.device for v in values}:
        kernels.zero_([v for v in values if v.device == device], where.to(device))


def clamp_(values: Sequence[Tensor], bound: Tensor) -> None:
    """Clamps dense values to [-bound, bound]; NaN stays NaN."""
    if any(v.is_complex() for v in values):
        raise ValueError(
            "cannot clamp a complex gradient: complex numbers have no order, so that there is no largest value. "
            "Clip its norm instead, or clip `torch.view_as_real(parameter)`."
        )
    for device in {v.device for v in values}:
        kernels.clamp_([v for v in values if v.device == device], bound.to(device))


def scale_units_(views: Iterable[tuple[Tensor, int | None, int]], factors: Tensor) -> None:
    """Multiplies units by factors of their own.

    Shapes: views: values, the dim that their units lie on (None: they are one), the place of the first in `factors`.
    """
    whole: list[tuple[Tensor, Tensor]] = []
    for values, dim, base in views:
        if dim is None:
            whole.append((values, factors[base]))
        else:
            kernels.scale_units_(values, dim, factors[base : base + values.shape[dim]].to(values.device))
    for device in {values.device for values, _ in whole}:
        here = [(values, factor) for values, factor in whole if values.device == device]
        kernels.scale_each_([values for values, _ in here], torch.stack([factor for _, factor in here]).to(device))
