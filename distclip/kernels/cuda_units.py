"""The units of tensors on CUDA: one launch for each dtype and shape of units, by a table.

The numbers are those of `naive`, and nothing waits for the device. Sums are deterministic: where
several programs read one unit, a last launch adds their partial sums up in one order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from distclip.kernels import cuda_triton_unit_scale, cuda_triton_units, naive
from distclip.kernels.unit_table import (
    BROAD,
    LONG,
    MEDIUM,
    NARROW,
    SHORT,
    Launch,
    UnitTable,
    tile_of,
    unit_table,
)

# What `@triton.jit` makes has no types.
_triton, _scaling = cast(Any, cuda_triton_units), cast(Any, cuda_triton_unit_scale)
# The smallest tensors with such units, which several programs read where that may be.
_SMALLEST = {SHORT: (1, 1), MEDIUM: (1, 129), LONG: (1, 32769), NARROW: (4097, 2), BROAD: (513, 17)}


def prepare_units(tensors: Sequence[Tensor], dims: Sequence[int | None], norm_type: float) -> None:
    """Compiles the kernels for each dtype and shape of units."""
    each = zip(tensors, dims, strict=True)
    kinds = {(t.dtype, tile) for t, dim in each if (tile := tile_of(t, dim)) is not None}
    if not kinds:
        return
    device = tensors[0].device
    small = [torch.ones(_SMALLEST[tile], dtype=dtype, device=device) for dtype, tile in kinds]
    small_dims = [int(tile.columns) for _, tile in kinds]
    sums = unit_power_sums(small, small_dims, norm_type)
    if norm_type > 6 or any(t.dtype is torch.float64 for t in small):  # else sums are in range
        unit_norms(small, small_dims, norm_type)
    scale_units_(small, small_dims, torch.ones_like(sums))


def unit_power_sums(
    tensors: Sequence[Tensor], dims: Sequence[int | None], norm_type: float
) -> Tensor:
    """In one launch for each dtype and shape of units, and one more for long units."""
    if not tensors:
        return naive.unit_power_sums(tensors, dims, norm_type)
    table = unit_table(tensors, dims)
    sums = _empty(table)
    with torch.cuda.device_of(sums):
        for launch in table.launches:
            fast = _is_fast(launch.dtype, norm_type)
            _run(_triton.partial_sums, table, launch, sums, float(norm_type), fast)
        if len(table.split):
            p = math.inf if math.isinf(norm_type) else 1.0
            _triton.finish[(len(table.split),)](table.rows, table.split, sums, p)
    for i in table.others:
        sums[table.units[i]] = naive.unit_power_sums([tensors[i]], [dims[i]], norm_type)
    return sums[: table.num_units]


def unit_norms(tensors: Sequence[Tensor], dims: Sequence[int | None], norm_type: float) -> Tensor:
    """In as many launches as `unit_power_sums`."""
    if not tensors or math.isinf(norm_type):
        return unit_power_sums(tensors, dims, norm_type)
    table = unit_table(tensors, dims)
    maxima, norms = _empty(table), _empty(table)
    with torch.cuda.device_of(norms):
        for launch in table.launches:
            _run(_triton.partial_norms, table, launch, maxima, norms, float(norm_type))
        if len(table.split):
            _triton.finish_norms[(len(table.split),)](
                table.rows, table.split, maxima, norms, float(norm_type)
            )
    for i in table.others:
        norms[table.units[i]] = naive.unit_norms([tensors[i]], [dims[i]], norm_type)
    return norms[: table.num_units]


def scale_units_(
    tensors: Sequence[Tensor], dims: Sequence[int | None], coefficients: Tensor
) -> None:
    """In one launch for each dtype and shape of units; writes nothing where a coefficient is 1."""
    if not tensors:
        return
    table = unit_table(tensors, dims)
    with torch.cuda.device_of(coefficients):
        for launch in table.launches:
            _run(_scaling.scale, table, launch, coefficients.contiguous())
    for i in table.others:
        naive.scale_units_([tensors[i]], [dims[i]], coefficients[table.units[i]])
    torch.autograd.graph.increment_version(tensors)  # autograd cannot see the addresses


def _run(kernel: Any, table: UnitTable, launch: Launch, *arguments: Any) -> None:
    outer, inner, reads, columns = launch.tile
    stored = _triton.STORED[launch.dtype]
    kernel[(len(launch.owners),)](
        table.rows, launch.owners, *arguments, stored, outer, inner, reads, columns
    )


def _is_fast(dtype: torch.dtype, norm_type: float) -> bool:
    """Whether float32 may do a part: of sums in 16 bits, and of any maximum of at most 32 bits."""
    if math.isinf(norm_type):
        return dtype is not torch.float64
    return norm_type in (1, 2) and dtype.itemsize == 2


def _empty(table: UnitTable) -> Tensor:
    return torch.empty(table.num_partials, dtype=torch.float64, device=table.rows.device)
