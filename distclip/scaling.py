"""What is written into gradients, and what must be known before: the last part of a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from distclip import kernels
from distclip.norms.measure import TensorLists
from distclip.norms.units import Units, rows_of
from distclip.sharding.layout import LocalParam
from distclip.sharding.local_tensors import first_overlap
from distclip.torch_private import host_has_values, on_device


def is_one(factor: Tensor) -> bool:
    """Whether the host can see that a product with the scalar changes nothing."""
    return host_has_values(factor) and factor.item() == 1


def scale_(tensor_lists: TensorLists, factor: Tensor) -> None:
    """Multiplies by a float64 scalar. On a CPU a factor of 1 writes nothing."""
    if is_one(factor):
        return
    for tensors in tensor_lists:
        kernels.scale_(tensors, on_device(factor, tensors[0].device))


def zero_(tensor_lists: TensorLists, where: Tensor) -> None:
    """Sets everything to zero if the bool scalar `where` is true, NaN and infinities too."""
    for tensors in tensor_lists:
        kernels.zero_(tensors, on_device(where, tensors[0].device))


def clamp_(tensor_lists: TensorLists, bound: Tensor) -> None:
    """Clamps real numbers to [-bound, bound]; NaN stays NaN."""
    for tensors in tensor_lists:
        kernels.clamp_(tensors, on_device(bound, tensors[0].device))


def check_real(gradients: Iterable[Tensor | None]) -> None:
    """Raises ValueError where a gradient is complex: it has no order, and cannot be clamped."""
    if any(grad is not None and grad.is_complex() for grad in gradients):
        raise ValueError(
            "cannot clamp a complex gradient: complex numbers have no order, and no largest value. "
            "Clip its norm instead, or clip `torch.view_as_real(parameter)`."
        )


def check_writable(gradients: Sequence[Tensor | None], params: Sequence[LocalParam] = ()) -> None:
    """Raises ValueError where elements of a gradient share memory: they would be scaled twice."""
    if (i := first_overlap(gradients)) is not None:
        known = params[i].name if params else ""  # plans of functions keep no names
        name = repr(known) if known else f"parameter {i}"
        raise ValueError(
            f"cannot clip {name}: more than one element of its gradient refers to a single memory "
            f"location, as in an expanded tensor, and each would be scaled more than once. "
            f"Nothing was written. Make it a tensor of its own first: "
            f"`param.grad = param.grad.contiguous()`."
        )


def scale_units_(units: Units, gradients: Sequence[Tensor | None], factors: Tensor) -> None:
    """Multiplies each unit by the factor of its row. Shapes: factors: [num_units]."""
    views = list(units.views(gradients))
    if not views:
        return
    rows = rows_of(views)
    index = units.indexes.of_numbers(rows, units.num_units)
    of_views = factors if index is None else factors[index]
    values, dims = [view.values for view in views], [view.dim for view in views]
    devices = dict.fromkeys(each.device for each in values)
    if len(devices) == 1:
        kernels.scale_units_(values, dims, of_views.to(values[0].device))
        return
    factors_of = torch.split(of_views, [each.count for each in rows])
    for device in devices:
        here = [i for i, each in enumerate(values) if each.device == device]
        there = torch.cat([factors_of[i] for i in here]).to(device)
        kernels.scale_units_([values[i] for i in here], [dims[i] for i in here], there)
