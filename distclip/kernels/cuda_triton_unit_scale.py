"""The Triton kernel that multiplies the units of a `UnitTable`, each by its own coefficient."""

from __future__ import annotations

import triton
import triton.language as tl

from distclip.kernels import naive, unit_table
from distclip.kernels.cuda_triton_elements import narrow, wide
from distclip.kernels.cuda_triton_units import block, located, place

_ROW_SIZE, _ALIGNED = tl.constexpr(unit_table.ROW_SIZE), tl.constexpr(unit_table.ALIGNED)
_NUM_UNITS, _FIRST_UNIT = tl.constexpr(unit_table.NUM_UNITS), tl.constexpr(unit_table.FIRST_UNIT)
_LEAST_FLOAT32 = tl.constexpr(naive.LEAST_FLOAT32)


@triton.jit(do_not_specialize=range(3))
def scale(
    rows,
    owners,
    coefficients,
    STORED: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    READS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Multiplies each unit by its coefficient, unless that is 1."""
    row = rows + tl.load(owners + tl.program_id(0)) * _ROW_SIZE
    units, _ = place(row, OUTER, INNER, COLUMNS)
    pointers = coefficients + tl.load(row + _FIRST_UNIT) + units
    factors = tl.load(pointers, mask=units < tl.load(row + _NUM_UNITS), other=1.0)
    if tl.max((factors != 1).to(tl.int32), 0) == 0:
        return
    if STORED == tl.float64:
        _scale_units(row, factors, factors != 1, STORED, OUTER, INNER, COLUMNS)
    else:
        rounded = factors.to(tl.float32)
        tiny = (tl.abs(factors) < _LEAST_FLOAT32) & (factors != 0)
        if tl.max(tiny.to(tl.int32), 0) == 0:
            _scale_units(row, rounded, factors != 1, STORED, OUTER, INNER, COLUMNS)
        else:
            # In float64, products with the rounded factors have the same bits.
            exact = tl.where(tiny, factors, rounded.to(tl.float64))
            FEWER: tl.constexpr = INNER if COLUMNS else INNER // 2  # float64 takes two registers
            _scale_units(row, exact, factors != 1, STORED, OUTER, FEWER, COLUMNS)


@triton.jit
def _scale_units(
    row,
    factors,
    changed,
    STORED: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    AXIS: tl.constexpr = 0 if COLUMNS else 1
    factors, changed = tl.expand_dims(factors, AXIS), tl.expand_dims(changed, AXIS)
    if tl.load(row + _ALIGNED) != 0:
        _scale_block(row, factors, changed, STORED, OUTER, INNER, COLUMNS, True)
    else:
        _scale_block(row, factors, changed, STORED, OUTER, INNER, COLUMNS, False)


@triton.jit
def _scale_block(
    row,
    factors,
    changed,
    STORED: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    base, stride, units, num_units, start, stop = located(
        row, STORED, OUTER, INNER, COLUMNS, ALIGNED
    )
    while start < stop:
        pointers, mask = block(
            base, stride, units, num_units, start, stop, OUTER, INNER, COLUMNS, ALIGNED
        )
        if not COLUMNS:
            mask &= changed
        stored = tl.load(pointers, mask=mask)
        product = wide(stored) * factors
        if STORED != tl.float64:
            product = product.to(tl.float32)
        product = narrow(product, STORED)
        if COLUMNS:  # a mask for each column would make stores as narrow as an element
            product = tl.where(changed, product, stored)
        tl.store(pointers, product, mask=mask)
        start += OUTER if COLUMNS else INNER
