"""CUDA with Triton: one launch for all the tensors of a list, which it finds by a table.

The numbers are those of `naive`, and nothing waits for the device. Sums are deterministic: every
program writes a partial sum, and a second launch adds the partial sums up in one order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from distclip.kernels import cuda_triton, cuda_units, foreach, naive, tensor_table
from distclip.kernels.cuda_units import prepare_units
from distclip.kernels.naive import (
    coefficients,
    tensor_lists,
    total,
)

__all__ = [
    "clamp_",
    "coefficients",
    "norms",
    "power_sum",
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

_triton = cast(Any, cuda_triton)  # what `@triton.jit` makes has no types


def prepare(tensors: Sequence[Tensor], norm_type: float) -> None:
    """Compiles each kernel for `norm_type`; one variant serves all dtypes and sizes."""
    if not tensors:
        return
    one = torch.ones(1, device=tensors[0].device)
    sums = power_sums([one], norm_type)
    power_sums_where([one], norm_type, sums.isnan(), sums)
    coefficient = sums[0]  # 1
    if norm_type not in (1, 2, math.inf):
        norms([one], norm_type)
    scale_([one], coefficient)
    scale_each_([one], coefficient.unsqueeze(0))
    clamp_([one], coefficient)
    zero_([one], coefficient.isnan())


def power_sum(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """All of `power_sums` combined."""
    return naive.combine(power_sums(tensors, norm_type), norm_type)


def power_sums(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """In two launches."""
    return _power_sums(tensors, norm_type, None)


def power_sums_where(
    tensors: Sequence[Tensor], norm_type: float, where: Tensor, otherwise: Tensor
) -> Tensor:
    """In two launches, which read nothing of a tensor that `where` leaves out."""
    return torch.where(where, _power_sums(tensors, norm_type, where), otherwise)


def _power_sums(tensors: Sequence[Tensor], norm_type: float, where: Tensor | None) -> Tensor:
    """Any number where `where` is false."""
    if not tensors:
        return naive.power_sums(tensors, norm_type)
    table = tensor_table.table(tensors)
    sums = torch.empty(len(tensors), dtype=torch.float64, device=tensors[0].device)
    partials = sums.new_empty(len(table.owners))
    fast = norm_type in (1, 2, math.inf)
    with torch.cuda.device_of(sums):
        if len(partials):
            _triton.partial_sums[(len(partials),)](
                table.rows, table.owners, partials, where, float(norm_type), fast
            )
        _triton.finish[(len(sums),)](
            table.rows, partials, sums, math.inf if math.isinf(norm_type) else 1.0
        )
    for i in table.others:
        sums[i] = foreach.power_sums([tensors[i]], norm_type)[0]
    return sums


def norms(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """In two launches."""
    if not tensors or math.isinf(norm_type):
        return power_sums(tensors, norm_type)
    table = tensor_table.table(tensors)
    found = torch.empty(len(tensors), dtype=torch.float64, device=tensors[0].device)
    maxima, sums = found.new_empty(2, len(table.owners)).unbind()
    with torch.cuda.device_of(found):
        if len(sums):
            _triton.partial_norms[(len(sums),)](
                table.rows, table.owners, maxima, sums, float(norm_type)
            )
        _triton.finish_norms[(len(found),)](table.rows, maxima, sums, found, float(norm_type))
    for i in table.others:
        found[i] = foreach.norms([tensors[i]], norm_type)[0]
    return found


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """In one launch, which writes nothing where the coefficient is 1."""
    others = _rewrite(tensors, coefficient, _triton.SCALE)
    foreach.scale_([tensors[i] for i in others], coefficient)


def scale_each_(tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    """In one launch, which writes nothing where a coefficient is 1."""
    for i in _rewrite(tensors, coefficients, _triton.SCALE_EACH):
        foreach.scale_([tensors[i]], coefficients[i])


def unit_power_sums(
    tensors: Sequence[Tensor], dims: Sequence[int | None], norm_type: float
) -> Tensor:
    """As `power_sums` where all tensors are whole units."""
    if all(dim is None for dim in dims):
        return power_sums(tensors, norm_type)
    return cuda_units.unit_power_sums(tensors, dims, norm_type)


def unit_norms(tensors: Sequence[Tensor], dims: Sequence[int | None], norm_type: float) -> Tensor:
    """As `norms` where all tensors are whole units."""
    if all(dim is None for dim in dims):
        return norms(tensors, norm_type)
    return cuda_units.unit_norms(tensors, dims, norm_type)


def scale_units_(
    tensors: Sequence[Tensor], dims: Sequence[int | None], coefficients: Tensor
) -> None:
    """As `scale_each_` where all tensors are whole units."""
    if all(dim is None for dim in dims):
        scale_each_(tensors, coefficients)
    else:
        cuda_units.scale_units_(tensors, dims, coefficients)


def clamp_(tensors: Sequence[Tensor], bound: Tensor) -> None:
    """In one launch, which writes only elements beyond the bound."""
    others = _rewrite(tensors, bound, _triton.CLAMP)
    naive.clamp_([tensors[i] for i in others], bound)


def zero_(tensors: Sequence[Tensor], where: Tensor) -> None:
    """In one launch, which writes nothing unless `where` is true."""
    others = _rewrite(tensors, where, _triton.ZERO)
    naive.zero_([tensors[i] for i in others], where)


def _rewrite(tensors: Sequence[Tensor], operand: Tensor, operation: Any) -> Sequence[int]:
    """Rewrites the tensors that a table holds, and returns the indices of the others."""
    if not tensors:
        return []
    table = tensor_table.table(tensors)
    if len(table.owners):
        with torch.cuda.device_of(operand):
            _triton.rewrite[(len(table.owners),)](table.rows, table.owners, operand, operation)
        torch.autograd.graph.increment_version(tensors)  # autograd cannot see the addresses
    return table.others
