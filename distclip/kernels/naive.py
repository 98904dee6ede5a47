"""The definition of correct: each operation in the most obvious way, with sums in float64.

It runs on any device, without a wait on an accelerator. `Backend` documents the functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distclip.kernels.backend import Total
from distclip.kernels.contiguous import flat
from distclip.torch_private import host_has_values

# Smaller coefficients are no normal float32 numbers: products with them are computed in float64.
LEAST_FLOAT32 = 2.0**-126
# Elements widened at a time: 256 KiB of float64 stay in the cache of a core of a CPU. Elsewhere
# each operation costs a launch, and fewer are faster.
_CHUNK, _CHUNK_OFF_CPU = 1 << 15, 1 << 24


def prepare(tensors: Sequence[Tensor], norm_type: float) -> None:
    """Nothing is compiled."""


def tensor_lists(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """All tensors in one list."""
    return [list(tensors)] if tensors else []


def power_sums(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Elements are widened to float64 first, in which their powers are in range for p <= 6."""
    return _stacked([_power_sum(tensor, norm_type) for tensor in tensors], tensors)


def power_sums_where(
    tensors: Sequence[Tensor], norm_type: float, where: Tensor, otherwise: Tensor
) -> Tensor:
    """Reads all; a look at `where` would wait for an accelerator."""
    return torch.where(where, power_sums(tensors, norm_type), otherwise)


def norms(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """The powers are those of |x| / max(|x|), which are in range for any p."""
    maxima = power_sums(tensors, math.inf)
    if math.isinf(norm_type):
        return maxima
    sums = [_power_sum(t, norm_type, m) for t, m in zip(tensors, maxima.unbind(), strict=True)]
    return _norms_from_scaled(maxima, _stacked(sums, tensors), norm_type)


def total(power_sums: Tensor, norm_type: float) -> Total:
    """Three operations, or two."""
    power_sum = combine(power_sums, norm_type)
    return Total(power_sum, power_sum if math.isinf(norm_type) else power_sum ** (1 / norm_type))


def coefficients(norms: Tensor, limits: Tensor) -> Tensor:
    """Three operations."""
    return (limits / norms).masked_fill_(norms <= limits, 1.0)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """One product for each tensor.

    On an accelerator a coefficient below `LEAST_FLOAT32` is what float32 makes of it, perhaps 0:
    only a wait would tell.
    """
    if not host_has_values(coefficient):
        for tensor in tensors:
            # `mul_` would round a tensor's coefficient to 16 bits before it multiplies.
            wide = torch.promote_types(tensor.dtype, torch.float32)
            tensor.copy_(tensor.to(wide) * coefficient.to(wide))
    elif is_tiny(factor := coefficient.item()):
        for tensor in tensors:
            tensor.copy_(tensor.to(torch.promote_types(tensor.dtype, torch.float64)) * factor)
    elif factor != 1:
        for tensor in tensors:
            tensor.mul_(factor)


def scale_each_(tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    """`scale_` for each tensor."""
    for tensor, coefficient in zip(tensors, coefficients.unbind(), strict=True):
        scale_([tensor], coefficient)


def zero_(tensors: Sequence[Tensor], where: Tensor) -> None:
    """A mask, because a product with zero would keep NaN and make NaN of infinities."""
    if not host_has_values(where) or where.item():
        for tensor in tensors:
            tensor.masked_fill_(where, 0)


def clamp_(tensors: Sequence[Tensor], bound: Tensor) -> None:
    """The bound is rounded to the dtype of the tensor."""
    for tensor in tensors:
        rounded = bound.to(tensor.dtype)
        tensor.clamp_(-rounded, rounded)


def prepare_units(tensors: Sequence[Tensor], dims: Sequence[int | None], norm_type: float) -> None:
    """Nothing is compiled."""


def unit_power_sums(
    tensors: Sequence[Tensor], dims: Sequence[int | None], norm_type: float
) -> Tensor:
    """As `power_sums`."""
    return unit_numbers(tensors, dims, norm_type, power_sums, dim_power_sums)


def unit_norms(tensors: Sequence[Tensor], dims: Sequence[int | None], norm_type: float) -> Tensor:
    """As `norms`."""
    return unit_numbers(tensors, dims, norm_type, norms, dim_norms)


def unit_numbers(
    tensors: Sequence[Tensor],
    dims: Sequence[int | None],
    norm_type: float,
    of_tensors: Callable[[Sequence[Tensor], float], Tensor],
    of_dim: Callable[[Tensor, int, float], Tensor],
) -> Tensor:
    """The numbers of all units, in order: of whole tensors together, of each dim alone."""
    whole = of_tensors([t for t, dim in zip(tensors, dims, strict=True) if dim is None], norm_type)
    if len(whole) == len(tensors):
        return whole
    each = iter(torch.split(whole, 1) if len(whole) else ())
    return torch.cat(
        [
            next(each) if dim is None else of_dim(tensor, dim, norm_type)
            for tensor, dim in zip(tensors, dims, strict=True)
        ]
    )


def dim_power_sums(tensor: Tensor, dim: int, norm_type: float) -> Tensor:
    """`power_sums` of every index of `dim`."""
    return _dim_power_sums(tensor, dim, norm_type, None)


def dim_norms(tensor: Tensor, dim: int, norm_type: float) -> Tensor:
    """`norms` of every index of `dim`."""
    maxima = dim_power_sums(tensor, dim, math.inf)
    if math.isinf(norm_type):
        return maxima
    sums = _dim_power_sums(tensor, dim, norm_type, maxima)
    return _norms_from_scaled(maxima, sums, norm_type)


def scale_units_(
    tensors: Sequence[Tensor], dims: Sequence[int | None], coefficients: Tensor
) -> None:
    """`scale_` for each whole tensor, and one product for each of the others."""
    if all(dim is None for dim in dims):
        scale_each_(tensors, coefficients)
        return
    counts = [1 if dim is None else t.shape[dim] for t, dim in zip(tensors, dims, strict=True)]
    for tensor, dim, factors in zip(tensors, dims, torch.split(coefficients, counts), strict=True):
        if dim is None:
            scale_([tensor], factors.squeeze(0))
        else:
            _scale_dim_(tensor, dim, factors)


def is_tiny(coefficient: float) -> bool:
    return 0 < abs(coefficient) < LEAST_FLOAT32


def combine(power_sums: Tensor, norm_type: float) -> Tensor:
    """The sum of sums of powers, or the maximum of maxima for p = inf."""
    return power_sums.amax() if math.isinf(norm_type) else power_sums.sum()


def _power_sum(tensor: Tensor, norm_type: float, scale: Tensor | None = None) -> Tensor:
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=tensor.device)
    chunks = torch.split(flat(tensor), _chunk_size(tensor))
    sums = [_chunk_sum(chunk, norm_type, scale) for chunk in chunks]
    return sums[0] if len(sums) == 1 else combine(torch.stack(sums), norm_type)


def _chunk_sum(chunk: Tensor, norm_type: float, scale: Tensor | None) -> Tensor:
    wide = chunk.to(torch.complex128).abs() if chunk.is_complex() else chunk.to(torch.float64)
    if scale is not None:
        wide = wide / torch.where(scale == 0, 1.0, scale)
    if norm_type == 2:
        return torch.dot(wide, wide)
    return wide.abs().amax() if math.isinf(norm_type) else wide.abs().pow(norm_type).sum()


def _dim_power_sums(tensor: Tensor, dim: int, norm_type: float, scales: Tensor | None) -> Tensor:
    rows = tensor.movedim(dim, 0)
    if not tensor.numel():
        return torch.zeros(len(rows), dtype=torch.float64, device=tensor.device)
    step = max(1, _chunk_size(tensor) * len(rows) // tensor.numel())
    sums = [
        _row_sums(rows[i : i + step], norm_type, None if scales is None else scales[i : i + step])
        for i in range(0, len(rows), step)
    ]
    return torch.cat(sums)


def _scale_dim_(tensor: Tensor, dim: int, coefficients: Tensor) -> None:
    """One product of the tensor and its coefficients, widened to float32 or float64."""
    wide, factors = torch.promote_types(tensor.dtype, torch.float32), coefficients
    if host_has_values(coefficients):
        if bool((coefficients == 1).all()):
            return
        magnitudes = coefficients.abs()
        tiny = (magnitudes > 0) & (magnitudes < LEAST_FLOAT32)
        if wide.to_real() is torch.float32 and bool(tiny.any()):
            wide = torch.promote_types(wide, torch.float64)
            # Rounded to float32 as elsewhere, the other factors give the same bits in float64.
            factors = torch.where(tiny, factors, factors.float().double())
    shape = [-1 if d == dim % tensor.ndim else 1 for d in range(tensor.ndim)]
    tensor.copy_(tensor.to(wide) * factors.to(wide.to_real()).view(shape))


def _chunk_size(tensor: Tensor) -> int:
    return _CHUNK if tensor.is_cpu else _CHUNK_OFF_CPU


def _row_sums(rows: Tensor, norm_type: float, scales: Tensor | None) -> Tensor:
    dtype = torch.complex128 if rows.is_complex() else torch.float64
    wide = rows.to(dtype).abs().reshape(len(rows), -1)
    if scales is not None:
        wide = wide / torch.where(scales == 0, 1.0, scales).unsqueeze(1)
    return wide.amax(1) if math.isinf(norm_type) else wide.pow(norm_type).sum(1)


def _norms_from_scaled(maxima: Tensor, sums: Tensor, norm_type: float) -> Tensor:
    """The norms from sums of (|x| / maximum)**p."""
    return torch.where(maxima.isinf(), maxima, maxima * sums ** (1 / norm_type))


def _stacked(scalars: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    if scalars:
        return torch.stack(list(scalars))
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.zeros(0, dtype=torch.float64, device=device)
