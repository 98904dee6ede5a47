"""Each kernel as one obvious loop: the definition of correct."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distclip.kernels.contiguous import flat

# Elements upcast at a time: 256 KiB of float64 stay in a core's cache.
_CHUNK = 1 << 15


def power_sums(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """sum(|x|**p) of each tensor, or max(|x|) for p = inf, in float64.

    Every element is a float64 before anything is done to it, so that no power under- or overflows for p <= 6.
    NaN stays NaN; an empty tensor gives 0.

    Shapes: the result: [len(tensors)].
    """
    return _stacked([_power_sum(tensor, norm_type) for tensor in tensors], tensors)


def norms(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """The p-norm of each tensor, float64, for any p: the powers are those of |x| / max(|x|). Shapes: as power_sums."""
    maxima = power_sums(tensors, math.inf)
    if math.isinf(norm_type):
        return maxima
    each = zip(tensors, maxima.unbind(), strict=True)
    return _norms(
        maxima, _stacked([_power_sum(tensor, norm_type, largest) for tensor, largest in each], tensors), norm_type
    )


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiplies every element by `coefficient`, a float64 scalar. On a CPU a coefficient of 1 writes nothing."""
    if coefficient.device.type != "cpu":
        for tensor in tensors:
            # A scalar on the device would be rounded to 16 bits before it is multiplied.
            wide = torch.promote_types(tensor.dtype, torch.float32)
            tensor.copy_(tensor.to(wide) * coefficient.to(wide))
    elif (factor := coefficient.item()) != 1:
        for tensor in tensors:
            tensor.mul_(factor)


def scale_each_(tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    """`scale_` of each tensor with a coefficient of its own. Shapes: coefficients: [len(tensors)]."""
    for tensor, coefficient in zip(tensors, coefficients.unbind(), strict=True):
        scale_([tensor], coefficient)


def zero_(tensors: Sequence[Tensor], where: Tensor) -> None:
    """Sets every element to zero if `where`, a bool scalar, is true. On a CPU it writes nothing otherwise."""
    if where.device.type != "cpu" or where.item():
        for tensor in tensors:
            tensor.masked_fill_(where, 0)  # a product with zero would leave NaN and turn infinities into NaN


def clamp_(tensors: Sequence[Tensor], bound: Tensor) -> None:
    """Clamps every element to [-bound, bound], a float64 scalar; NaN stays NaN."""
    for tensor in tensors:
        at = bound.to(tensor.dtype)
        tensor.clamp_(-at, at)


def unit_power_sums(tensor: Tensor, dim: int, norm_type: float) -> Tensor:
    """`power_sums` of every index of `dim`. Shapes: the result: [tensor.shape[dim]]."""
    return _unit_power_sums(tensor, dim, norm_type, None)


def unit_norms(tensor: Tensor, dim: int, norm_type: float) -> Tensor:
    """`norms` of every index of `dim`. Shapes: the result: [tensor.shape[dim]]."""
    maxima = unit_power_sums(tensor, dim, math.inf)
    return (
        maxima if math.isinf(norm_type) else _norms(maxima, _unit_power_sums(tensor, dim, norm_type, maxima), norm_type)
    )


def scale_units_(tensor: Tensor, dim: int, coefficients: Tensor) -> None:
    """Multiplies index i of `dim` by coefficients[i], float64. On a CPU it writes nothing where all are 1."""
    if coefficients.device.type == "cpu" and bool((coefficients == 1).all()):
        return
    wide = torch.promote_types(tensor.dtype, torch.float32)
    shape = [-1 if d == dim % tensor.ndim else 1 for d in range(tensor.ndim)]
    tensor.copy_(
        tensor.to(wide) * coefficients.to(torch.float64 if wide == torch.float64 else torch.float32).view(shape)
    )


def _power_sum(tensor: Tensor, norm_type: float, scale: Tensor | None = None) -> Tensor:
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=tensor.device)
    parts = [_chunk_sum(chunk, norm_type, scale) for chunk in torch.split(flat(tensor), _CHUNK)]
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts).amax() if math.isinf(norm_type) else torch.stack(parts).sum()


def _chunk_sum(chunk: Tensor, norm_type: float, scale: Tensor | None) -> Tensor:
    wide = chunk.to(torch.complex128).abs() if chunk.is_complex() else chunk.to(torch.float64)
    if scale is not None:
        wide = wide / torch.where(scale == 0, 1.0, scale)
    if norm_type == 2:
        return torch.dot(wide, wide)
    return wide.abs().amax() if math.isinf(norm_type) else wide.abs().pow(norm_type).sum()


def _unit_power_sums(tensor: Tensor, dim: int, norm_type: float, scales: Tensor | None) -> Tensor:
    rows = tensor.movedim(dim, 0)
    step = max(1, _CHUNK * len(rows) // max(1, tensor.numel()))
    parts = [
        _row_sums(rows[i : i + step], norm_type, None if scales is None else scales[i : i + step])
        for i in range(0, len(rows), step)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=tensor.device)


def _row_sums(rows: Tensor, norm_type: float, scales: Tensor | None) -> Tensor:
    wide = rows.to(torch.complex128 if rows.is_complex() else torch.float64).abs().reshape(len(rows), -1)
    if scales is not None:
        wide = wide / torch.where(scales == 0, 1.0, scales).unsqueeze(1)
    return wide.amax(1) if math.isinf(norm_type) else wide.pow(norm_type).sum(1)


def _norms(maxima: Tensor, sums: Tensor, norm_type: float) -> Tensor:
    """From sums of (|x| / maximum)**p."""
    return torch.where(maxima.isinf(), maxima, maxima * sums ** (1 / norm_type))


def _stacked(scalars: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.stack(list(scalars)) if scalars else torch.zeros(0, dtype=torch.float64, device=device)
