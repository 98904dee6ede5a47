"""The Triton kernels that `cuda_units` launches: each program reads some units of a `UnitTable`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distclip.kernels import unit_table
from distclip.kernels.cuda_triton_elements import INF, plus, root, term

# How the kernels read each dtype; bfloat16 by its bits, which old hardware knows too.
STORED = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.uint16,
    torch.float64: tl.float64,
}

_ROW_SIZE = tl.constexpr(unit_table.ROW_SIZE)
_ADDRESS, _STRIDE = tl.constexpr(unit_table.ADDRESS), tl.constexpr(unit_table.STRIDE)
_NUM_UNITS, _LENGTH = tl.constexpr(unit_table.NUM_UNITS), tl.constexpr(unit_table.LENGTH)
_NUM_CHUNKS = tl.constexpr(unit_table.NUM_CHUNKS)
_FIRST_PROGRAM = tl.constexpr(unit_table.FIRST_PROGRAM)
_FIRST_PARTIAL = tl.constexpr(unit_table.FIRST_PARTIAL)
_FIRST_UNIT, _FIRST_SPLIT = (
    tl.constexpr(unit_table.FIRST_UNIT),
    tl.constexpr(unit_table.FIRST_SPLIT),
)
_ALIGNED, _WIDEST = tl.constexpr(unit_table.ALIGNED), tl.constexpr(unit_table.WIDEST)
_PER_PROGRAM = tl.constexpr(unit_table.PER_PROGRAM)
_FINISHED = tl.constexpr(512)  # partial numbers of a unit that are read at a time
# For a sum between these, float32 loses less than 2**-50 of the squares in one chunk.
_LOWEST, _HIGHEST = tl.constexpr(2.0**-60), tl.constexpr(2.0**120)


@triton.jit(do_not_specialize=range(3))
def partial_sums(
    rows,
    owners,
    partials,
    P: tl.constexpr,
    FAST: tl.constexpr,
    STORED: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    READS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """partials[chunk of a unit] = sum(|x|**P), or max(|x|) for P = inf, in float64.

    FAST: float32 may do a part. It holds the squares of 16-bit numbers exactly, and adds READS of
    them before float64 takes over.
    """
    row = rows + tl.load(owners + tl.program_id(0)) * _ROW_SIZE
    total = _sums(row, None, P, FAST, STORED, OUTER, INNER, READS, COLUMNS)
    if FAST and P != INF:
        again = ~((total >= _LOWEST) & (total <= _HIGHEST))
        if tl.max(again.to(tl.int32), 0) != 0:
            # Zeros are frequent, and no squares that float32 lost: embeddings without a token.
            again &= _sums(row, None, INF, True, STORED, OUTER, INNER, 1, COLUMNS) != 0
            if tl.max(again.to(tl.int32), 0) != 0:
                total = _sums(row, None, P, False, STORED, OUTER, INNER, READS, COLUMNS)
    _store_partial(row, partials, total, OUTER, INNER, COLUMNS)


@triton.jit(do_not_specialize=range(4))
def partial_norms(
    rows,
    owners,
    maxima,
    sums,
    P: tl.constexpr,
    STORED: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    READS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """maxima[chunk of a unit] = max(|x|), sums[chunk of a unit] = sum((|x| / maximum)**P).

    Of a unit that is one chunk, the norm is stored in `sums`. Reads twice.
    """
    row = rows + tl.load(owners + tl.program_id(0)) * _ROW_SIZE
    # More reads under way would need more registers than there are: the powers take longest.
    maximum = _sums(row, None, INF, STORED != tl.float64, STORED, OUTER, INNER, 1, COLUMNS)
    scale = tl.where(maximum == 0, 1.0, maximum)
    total = _sums(row, scale, P, False, STORED, OUTER, INNER, 1, COLUMNS)
    if tl.load(row + _NUM_CHUNKS) == 1:
        _store_partial(row, sums, _norm(maximum, total, P), OUTER, INNER, COLUMNS)
    else:
        _store_partial(row, maxima, maximum, OUTER, INNER, COLUMNS)
        _store_partial(row, sums, total, OUTER, INNER, COLUMNS)


@triton.jit(do_not_specialize=range(3))
def finish(rows, split, partials, P: tl.constexpr):
    """Combines the chunks of each split unit, always in one order: P is 1 for sums, or inf."""
    row, unit, first, last = _split_unit(rows, split)
    total = _combined(partials, None, None, first, last, P)
    tl.store(partials + tl.load(row + _FIRST_UNIT) + unit, total)


@triton.jit(do_not_specialize=range(4))
def finish_norms(rows, split, maxima, sums, P: tl.constexpr):
    """The norm of each split unit, stored in `sums`, always in one order."""
    row, unit, first, last = _split_unit(rows, split)
    maximum = _combined(maxima, None, None, first, last, INF)
    total = _combined(maxima, tl.where(maximum == 0, 1.0, maximum), sums, first, last, P)
    tl.store(sums + tl.load(row + _FIRST_UNIT) + unit, _norm(maximum, total, P))


# Triton compiles a branch that is not taken, unless it is an `else`. Hence `else` after a return.
@triton.jit
def place(row, OUTER: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr):
    """The units of this program, and which chunk of each it reads."""
    program = tl.program_id(0) - tl.load(row + _FIRST_PROGRAM)
    num_chunks = tl.load(row + _NUM_CHUNKS)
    UNITS: tl.constexpr = INNER if COLUMNS else OUTER
    units = program // num_chunks * UNITS + tl.arange(0, UNITS)
    return units, program % num_chunks


@triton.jit
def _sums(
    row,
    scale,
    P: tl.constexpr,
    FAST: tl.constexpr,
    STORED: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    READS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums or maxima of this program's units. scale: what to divide each by, or None."""
    if tl.load(row + _ALIGNED) != 0:
        total = _sums_of(row, scale, P, FAST, STORED, OUTER, INNER, READS, COLUMNS, True)
    else:
        total = _sums_of(row, scale, P, FAST, STORED, OUTER, INNER, READS, COLUMNS, False)
    return total


@triton.jit
def _sums_of(
    row,
    scale,
    P: tl.constexpr,
    FAST: tl.constexpr,
    STORED: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    READS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    base, stride, units, num_units, start, stop = located(
        row, STORED, OUTER, INNER, COLUMNS, ALIGNED
    )
    STEP: tl.constexpr = OUTER if COLUMNS else INNER
    # Other powers take far longer than loads, and would need more registers than there are.
    NUM: tl.constexpr = READS if P == 1 or P == 2 or P == INF else 1
    total = _zeros(OUTER, INNER, FAST and P == INF, P)
    if scale is not None:
        scale = tl.expand_dims(scale, 0 if COLUMNS else 1)
    while start < stop:
        pointers, mask = block(
            base, stride, units, num_units, start, stop, OUTER, INNER, COLUMNS, ALIGNED
        )
        short = term(tl.load(pointers, mask=mask, other=0), scale, FAST, P)
        for i in tl.static_range(1, NUM):
            at = start + i * STEP
            pointers, mask = block(
                base, stride, units, num_units, at, stop, OUTER, INNER, COLUMNS, ALIGNED
            )
            more = term(tl.load(pointers, mask=mask, other=0), scale, FAST, P)
            short = plus(short, more, P)
        total = plus(total, short.to(total.dtype), P)
        start += NUM * STEP
    return _reduced(total, 0 if COLUMNS else 1, P)


@triton.jit
def located(
    row,
    STORED: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The matrix's address and stride, this program's units, and the bounds of what it reads."""
    base, stride = tl.load(row + _ADDRESS).to(tl.pointer_type(STORED)), tl.load(row + _STRIDE)
    units, chunk = place(row, OUTER, INNER, COLUMNS)
    num_units = tl.load(row + _NUM_UNITS)  # here, because what a function returns takes no hint
    CHUNK: tl.constexpr = _PER_PROGRAM // (INNER if COLUMNS else OUTER)
    start = chunk * CHUNK
    stop = tl.minimum(start + CHUNK, tl.load(row + _LENGTH))
    if ALIGNED:  # what the compiler knows makes loads 16 bytes wide
        base, stride = tl.multiple_of(base, 16), tl.multiple_of(stride, _WIDEST)
        if COLUMNS:
            num_units = tl.multiple_of(num_units, _WIDEST)
        else:
            stop = tl.multiple_of(stop, _WIDEST)
    return base, stride, units, num_units, start, stop


@triton.jit
def block(
    base,
    stride,
    units,
    num_units,
    start,
    stop,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Pointers to the block of the units that begins at index `start` of each, and their mask."""
    if COLUMNS:
        along = start + tl.arange(0, OUTER)
        pointers = base + along[:, None] * stride + units[None, :]
        mask = (along < stop)[:, None] & (units < num_units)[None, :]
    else:
        along = tl.multiple_of(start, _WIDEST) + tl.arange(0, INNER)
        pointers = base + units[:, None] * stride + along[None, :]
        mask = (units < num_units)[:, None] & (along < stop)[None, :]
    return pointers, mask


@triton.jit
def _store_partial(
    row, numbers, found, OUTER: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr
):
    units, chunk = place(row, OUTER, INNER, COLUMNS)
    pointers = numbers + tl.load(row + _FIRST_PARTIAL) + units * tl.load(row + _NUM_CHUNKS) + chunk
    tl.store(pointers, found, mask=units < tl.load(row + _NUM_UNITS))


@triton.jit
def _split_unit(rows, split):
    """A row, one of its units, and the first and last of the unit's partial numbers."""
    row = rows + tl.load(split + tl.program_id(0)) * _ROW_SIZE
    unit = tl.program_id(0) - tl.load(row + _FIRST_SPLIT)
    num_chunks = tl.load(row + _NUM_CHUNKS)
    first = tl.load(row + _FIRST_PARTIAL) + unit * num_chunks
    return row, unit, first, first + num_chunks


@triton.jit
def _combined(partials, scale, weights, first, last, P: tl.constexpr):
    """The sum or maximum of `term` of partial numbers, each times its weight if any."""
    total = _zeros(1, _FINISHED, False, P)
    while first < last:
        offsets = (first + tl.arange(0, _FINISHED))[None, :]
        one = term(tl.load(partials + offsets, mask=offsets < last, other=0.0), scale, False, P)
        if weights is not None:
            one *= tl.load(weights + offsets, mask=offsets < last, other=0.0)
        total = plus(total, one, P)
        first += _FINISHED
    return tl.sum(_reduced(total, 1, P), 0)  # of one number


@triton.jit
def _norm(maximum, total, P: tl.constexpr):
    return tl.where(maximum == INF, maximum, maximum * root(total, P))


@triton.jit
def _zeros(OUTER: tl.constexpr, INNER: tl.constexpr, NARROW: tl.constexpr, P: tl.constexpr):
    if P != INF:
        return tl.zeros([OUTER, INNER], tl.float64)
    else:
        return tl.zeros([OUTER, INNER], tl.int32 if NARROW else tl.int64)


@triton.jit
def _reduced(total, AXIS: tl.constexpr, P: tl.constexpr):
    if P != INF:
        return tl.sum(total, AXIS)
    elif total.dtype == tl.int64:
        return tl.max(total, AXIS).to(tl.float64, bitcast=True)
    else:
        return tl.max(total, AXIS).to(tl.float32, bitcast=True).to(tl.float64)
