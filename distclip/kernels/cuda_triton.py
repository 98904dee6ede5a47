"""The Triton kernels of norms that `cuda` launches; those of chunks for one dtype of a `Table`.

Triton specialises none of their arguments but constants, which alone tell the variants apart:
nothing is compiled after `cuda.prepare`, neither for a number of 1 nor for an unaligned view.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distclip.kernels import tensor_table
from distclip.kernels.cuda_triton_elements import INF, combined, plus, root, span, term, zeros

STORED = (tl.float32, tl.float16, tl.uint16, tl.float64)  # for each of tensor_table.DTYPES

_ROW_SIZE = tl.constexpr(tensor_table.ROW_SIZE)
# Elements read at a time. A sum loads 4 to 16 such blocks before it adds them up, which keeps many
# loads under way. A rewrite cannot, because no load may pass a store.
_READ, _FINISHED = tl.constexpr(1024), tl.constexpr(4096)
# For a sum of squares between these, float32 loses less than 2**-50 of the squares in one chunk.
_LOWEST, _HIGHEST = tl.constexpr(2.0**-60), tl.constexpr(2.0**120)


@triton.jit(do_not_specialize=range(5))
def partial_sums(
    rows,
    owners,
    partials,
    where,
    first_chunk,
    STORED: tl.constexpr,
    P: tl.constexpr,
    WEAK: tl.constexpr,
):
    """partials[chunk] = sum(|x|**P), or max(|x|) for P = inf, in float64.

    where: if not None, a bool for each tensor; the chunks of those that it leaves out are not read.
    WEAK: float64 takes so long here that float32 does a part for float32 elements too.

    float32 holds the squares of 16-bit numbers exactly. It adds 8 of them before float64 takes
    over, or 16 where float64 is weak, and there 8 rounded squares of float32 elements. The norm
    errs by 2.6e-7 at most, where each rounding errs to the same side. Where a square may be out of
    range, the chunk is read again in float64.
    """
    chunk = first_chunk + tl.program_id(0)
    owner = tl.load(owners + chunk)
    if where is not None:
        if tl.load(where + owner) == 0:
            return
    row = rows + owner * _ROW_SIZE
    SHORT: tl.constexpr = (STORED != tl.float64) and (WEAK or STORED != tl.float32)
    FAST: tl.constexpr = SHORT and (P == 1 or P == 2)
    # As many as float32 adds. float64 needs the registers, and has enough loads under way.
    READS: tl.constexpr = (16 if (WEAK and STORED != tl.float32) and P == 2 else 8) if FAST else 4
    if P == INF:
        total = _chunk_sum(row, chunk, None, STORED, STORED != tl.float64, INF, 8)
    else:
        total = _chunk_sum(row, chunk, None, STORED, FAST, P, READS)
        if FAST and STORED != tl.float16:
            again = ~(total <= _HIGHEST)
            if P == 2:  # a square may vanish
                if total == 0:  # zeros are frequent: experts and embeddings without a token
                    again = _chunk_sum(row, chunk, None, STORED, True, INF, 8) != 0
                else:
                    again |= total < _LOWEST
            if again:
                total = _chunk_sum(row, chunk, None, STORED, False, P, 2)  # few registers
    tl.store(partials + chunk, total)


@triton.jit(do_not_specialize=range(3))
def finish(rows, partials, sums, P: tl.constexpr):
    """sums[tensor] = the sum (P = 1) or maximum (P = inf) of its chunks, always in one order."""
    row = rows + tl.program_id(0) * _ROW_SIZE
    first, last = tl.load(row + 3), tl.load(row + 4)
    tl.store(sums + tl.program_id(0), _combine(partials, first, last, None, None, P))


@triton.jit(do_not_specialize=range(5))
def partial_norms(rows, owners, maxima, sums, first_chunk, STORED: tl.constexpr, P: tl.constexpr):
    """maxima[chunk] = max(|x|), sums[chunk] = sum((|x| / maximum)**P), in float64.

    Reads the chunk twice.
    """
    chunk = first_chunk + tl.program_id(0)
    row = rows + tl.load(owners + chunk) * _ROW_SIZE
    maximum = _chunk_sum(row, chunk, None, STORED, STORED != tl.float64, INF, 8)
    scale = tl.where(maximum == 0, 1.0, maximum)
    tl.store(maxima + chunk, maximum)
    tl.store(sums + chunk, _chunk_sum(row, chunk, scale, STORED, False, P, 4))


@triton.jit(do_not_specialize=range(4))
def finish_norms(rows, maxima, sums, norms, P: tl.constexpr):
    """norms[tensor] from the maxima and sums of its chunks, always in one order."""
    row = rows + tl.program_id(0) * _ROW_SIZE
    first, last = tl.load(row + 3), tl.load(row + 4)
    maximum = _combine(maxima, first, last, None, None, INF)
    scale = tl.where(maximum == 0, 1.0, maximum)
    norm = maximum * root(_combine(maxima, first, last, scale, sums, P), P)
    tl.store(norms + tl.program_id(0), tl.where(maximum == INF, maximum, norm))


@triton.jit(do_not_specialize=range(3))
def total(power_sums, found, count, P: tl.constexpr):
    """found[0] = the sum of sums of powers, or the maximum of maxima; found[1] = its P-th root.

    One program, and always one order.
    """
    first = tl.program_id(0)  # 0
    if P == INF:
        power_sum = _combine(power_sums, first, count, None, None, INF)
    else:
        power_sum = _combine(power_sums, first, count, None, None, 1)
    tl.store(found, power_sum)
    tl.store(found + 1, root(power_sum, P))


@triton.jit(do_not_specialize=range(5))
def coefficients(norms, limits, bits: tl.int64, found, count):
    """found = min(1, limit / norm), NaN where either is NaN.

    limits: None for one limit, whose float64 bits `bits` holds; Triton passes floats as float32.
    """
    offsets = tl.program_id(0) * _READ + tl.arange(0, _READ)
    mask = offsets < count
    norm = tl.load(norms + offsets, mask=mask)
    if limits is None:
        limit = bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        limit = tl.load(limits + offsets, mask=mask)
    tl.store(found + offsets, tl.where(norm <= limit, 1.0, limit / norm), mask=mask)


@triton.jit
def _chunk_sum(
    row,
    chunk,
    scale,
    STORED: tl.constexpr,
    FAST: tl.constexpr,
    P: tl.constexpr,
    READS: tl.constexpr,
):
    base, start, stop, head = span(row, chunk, STORED)
    total = zeros(_READ, FAST, P)
    while start < stop:
        offsets = tl.multiple_of(start, _READ) + tl.arange(0, _READ)
        # Loads are 16 bytes wide only without a mask.
        if (start >= head) & (start + READS * _READ <= stop):
            short = term(tl.load(base + offsets), scale, FAST, P)
            for i in tl.static_range(1, READS):
                more = tl.load(base + offsets + i * _READ)
                short = plus(short, term(more, scale, FAST, P), P)
            start += READS * _READ
        else:
            values = tl.load(base + offsets, mask=(offsets >= head) & (offsets < stop), other=0)
            short = term(values, scale, FAST, P)
            start += _READ
        total = plus(total, short.to(total.dtype), P)
    return combined(total, P)


@triton.jit
def _combine(partials, first, last, scale, weights, P: tl.constexpr):
    """The sum or maximum of `term` of partials[first:last], each times its weight if any."""
    BLOCK: tl.constexpr = _FINISHED if weights is None else _READ  # a power needs registers
    total = zeros(BLOCK, False, P)
    while first < last:
        offsets = first + tl.arange(0, BLOCK)
        one = term(tl.load(partials + offsets, mask=offsets < last, other=0.0), scale, False, P)
        if weights is not None:
            one *= tl.load(weights + offsets, mask=offsets < last, other=0.0)
        total = plus(total, one, P)
        first += BLOCK
    return combined(total, P)
