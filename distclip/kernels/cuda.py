"""CUDA with Triton: one launch for all the tensors of one dtype, which it finds by a table.

The numbers are those of `naive`, and nothing waits for the device. Sums are deterministic: every
program writes a partial sum, and one more launch adds the partial sums up in one order.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from distclip.kernels import (
    cuda_triton,
    cuda_triton_rewrite,
    cuda_units,
    foreach,
    naive,
    tensor_table,
)
from distclip.kernels.backend import Total
from distclip.kernels.cuda_float64_rate import has_weak_float64
from distclip.kernels.cuda_units import prepare_units

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

# What `@triton.jit` makes has no types.
_triton, _rewriting = cast(Any, cuda_triton), cast(Any, cuda_triton_rewrite)
_COEFFICIENTS = 1024  # for each program
# Twice Triton's default: each thread needs fewer registers. Then a rewrite uses all threads of a
# processor.
_WARPS = 8


def prepare(tensors: Sequence[Tensor], norm_type: float) -> None:
    """Compiles each kernel for `norm_type` and the dtypes of `tensors`; one variant for all sizes.

    How weak float64 is there is read as well.
    """
    dtypes = {tensor.dtype for tensor in tensors} & {*tensor_table.DTYPES}
    if not dtypes:
        return
    device = tensors[0].device
    ones = tensor_lists([torch.ones(1, dtype=dtype, device=device) for dtype in dtypes])[0]
    sums = power_sums(ones, norm_type)
    power_sums_where(ones, norm_type, sums.isnan(), sums)
    if norm_type > 6 or torch.float64 in dtypes:  # else sums are in range
        norms(ones, norm_type)
    coefficients(sums, sums)
    limit = torch.ones((), dtype=torch.float64, device="cpu")
    coefficient = coefficients(total(sums, norm_type).norm, limit)
    scale_(ones, coefficient)
    scale_each_(ones, coefficient.expand(len(ones)).contiguous())
    clamp_(ones, coefficient)
    zero_(ones, coefficient.isnan())


def tensor_lists(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """All tensors in one list, which remembers its table."""
    return [tensor_table.TensorList(tensors)] if tensors else []


def power_sums(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """In a launch for each dtype and one more."""
    return _power_sums(tensors, norm_type, None)


def power_sums_where(
    tensors: Sequence[Tensor], norm_type: float, where: Tensor, otherwise: Tensor
) -> Tensor:
    """As many launches, which read nothing of a tensor that `where` leaves out."""
    return torch.where(where, _power_sums(tensors, norm_type, where), otherwise)


def _power_sums(tensors: Sequence[Tensor], norm_type: float, where: Tensor | None) -> Tensor:
    """Any number where `where` is false."""
    if not tensors:
        return naive.power_sums(tensors, norm_type)
    p, weak = float(norm_type), has_weak_float64(tensors[0].get_device())
    with torch.cuda.device_of(tensors[0]):
        rows, owners, launches, others = tensor_table.table(tensors)
        partials = torch.empty(len(owners), dtype=torch.float64, device=owners.device)
        sums = torch.empty(len(tensors), dtype=torch.float64, device=owners.device)
        for code, first, count in launches:
            _triton.partial_sums[(count,)](
                rows, owners, partials, where, first, _triton.STORED[code], p, weak
            )
        finish_p = p if math.isinf(p) else 1.0
        _triton.finish[(len(sums),)](rows, partials, sums, finish_p, num_warps=_WARPS)
    for i in others:
        sums[i] = foreach.power_sums([tensors[i]], norm_type)[0]
    return sums


def norms(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """In a launch for each dtype and one more."""
    if not tensors or math.isinf(norm_type):
        return power_sums(tensors, norm_type)
    p = float(norm_type)
    with torch.cuda.device_of(tensors[0]):
        rows, owners, launches, others = tensor_table.table(tensors)
        maxima = torch.empty(len(owners), dtype=torch.float64, device=owners.device)
        sums = torch.empty_like(maxima)
        found = torch.empty(len(tensors), dtype=torch.float64, device=owners.device)
        for code, first, count in launches:
            _triton.partial_norms[(count,)](
                rows, owners, maxima, sums, first, _triton.STORED[code], p
            )
        _triton.finish_norms[(len(found),)](rows, maxima, sums, found, p)
    for i in others:
        found[i] = foreach.norms([tensors[i]], norm_type)[0]
    return found


def total(power_sums: Tensor, norm_type: float) -> Total:
    """In one launch."""
    power_sums = power_sums.contiguous()
    found = power_sums.new_empty(2)
    with torch.cuda.device_of(found):
        p, count = float(norm_type), len(power_sums)
        _triton.total[(1,)](power_sums, found, count, p, num_warps=_WARPS)
    return Total(*found.unbind())


def coefficients(norms: Tensor, limits: Tensor) -> Tensor:
    """In one launch."""
    bits = None
    if limits.is_cpu and limits.ndim == 0:
        bits = struct.unpack("q", struct.pack("d", limits.item()))[0]
    elif limits.shape != norms.shape or limits.dtype != norms.dtype:
        limits = limits.to(norms.dtype).expand_as(norms)
    norms, found = (
        norms.contiguous(),
        torch.empty(norms.shape, dtype=norms.dtype, device=norms.device),
    )
    if not (count := norms.numel()):
        return found
    with torch.cuda.device_of(found):
        _triton.coefficients[(-(-count // _COEFFICIENTS),)](
            norms, limits.contiguous() if bits is None else None, bits or 0, found, count
        )
    return found


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """In a launch for each dtype, which writes nothing where the coefficient is 1."""
    others = _rewrite(tensors, coefficient, _rewriting.SCALE)
    foreach.scale_([tensors[i] for i in others], coefficient)


def scale_each_(tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    """In a launch for each dtype, which writes nothing where a coefficient is 1."""
    for i in _rewrite(tensors, coefficients.contiguous(), _rewriting.SCALE_EACH):
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
    """In a launch for each dtype, which writes only elements beyond the bound."""
    others = _rewrite(tensors, bound, _rewriting.CLAMP)
    naive.clamp_([tensors[i] for i in others], bound)


def zero_(tensors: Sequence[Tensor], where: Tensor) -> None:
    """In a launch for each dtype, which writes nothing unless `where` is true."""
    others = _rewrite(tensors, where, _rewriting.ZERO)
    naive.zero_([tensors[i] for i in others], where)


def _rewrite(tensors: Sequence[Tensor], operand: Tensor, operation: Any) -> Sequence[int]:
    """Rewrites the tensors that a table holds, and returns the indices of the others."""
    if not tensors:
        return []
    with torch.cuda.device_of(tensors[0]):
        rows, owners, launches, others = tensor_table.table(tensors)
        for code, first, count in launches:
            _rewriting.rewrite[(count,)](
                rows,
                owners,
                operand,
                first,
                _triton.STORED[code],
                operation,
                num_warps=_WARPS,
            )
    if launches:
        torch.autograd.graph.increment_version(tensors)  # autograd cannot see the addresses
    return others
