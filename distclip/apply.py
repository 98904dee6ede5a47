"""From limits to gradients: the coefficient, and the one pass that writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from distclip import kernels

Pieces = Sequence[Sequence[Tensor]]  # dense values on any devices, as `kernels.pieces` has them


def coefficient(norm: Tensor, limit: Tensor) -> Tensor:
    """min(1, limit / norm); 1 up to the limit, also where both are zero or infinite; NaN where either is NaN."""
    return (limit / norm).masked_fill_(norm <= limit, 1.0)


def is_one(factor: Tensor) -> bool:
    """Whether nothing need be written; only known of a number that is on the CPU."""
    return factor.is_cpu and factor.item() == 1


def scale_(pieces: Pieces, factor: Tensor) -> None:
    """Multiplies by a float64 scalar. On a CPU a factor of 1 writes nothing."""
    for piece in pieces:
        kernels.scale_(piece, factor.to(piece[0].device))


def zero_(pieces: Pieces, where: Tensor) -> None:
    """Sets everything to zero if the bool scalar `where` is true: NaN and infinities too."""
    for piece in pieces:
        kernels.zero_(piece, where.to(piece[0].device))


def clamp_(pieces: Pieces, bound: Tensor) -> None:
    """Clamps to [-bound, bound]; NaN stays NaN."""
    if any(tensor.is_complex() for piece in pieces for tensor in piece):
        raise ValueError(
            "cannot clamp a complex gradient: complex numbers have no order, so that there is no largest value. "
            "Clip its norm instead, or clip `torch.view_as_real(parameter)`."
        )
    for piece in pieces:
        kernels.clamp_(piece, bound.to(piece[0].device))


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
