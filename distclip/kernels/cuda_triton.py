"""The Triton kernels: what runs on the device. `cuda.py` launches them, one program a chunk of `tables.Table`."""

from __future__ import annotations

import triton
import triton.language as tl

from distclip.kernels import tensor_table as tables

INF = tl.constexpr(float("inf"))
SCALE, SCALE_EACH, CLAMP, ZERO = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

_COLUMNS, _CHUNK = tl.constexpr(tables.COLUMNS), tl.constexpr(tables.CHUNK)
_FLOAT32, _FLOAT16, _BFLOAT16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # as in tables.DTYPES
# Elements read at a time. A sum takes several such blocks before it adds them up, and so has many loads under way;
# a rewrite cannot, since no load may pass a store.
_READ, _READS, _REWRITTEN, _FINISHED = tl.constexpr(1024), tl.constexpr(8), tl.constexpr(2048), tl.constexpr(4096)
# Between these, what float32 loses of the squares in one chunk is less than 2**-50 of their sum.
_LOWEST, _HIGHEST = tl.constexpr(2.0**-60), tl.constexpr(2.0**120)


@triton.jit
def partial_sums(rows, owners, partials, P: tl.constexpr, QUICK: tl.constexpr):
    """partials[chunk] = sum(|x|**P), or max(|x|) for P = inf, in float64.

    QUICK: float32 may do a part. It holds the squares of 16-bit numbers exactly, and _READS of them are added before
    float64 takes over. A float32 is made a float64 first, unless a maximum is sought.
    """
    chunk = tl.program_id(0)
    row = rows + tl.load(owners + chunk) * _COLUMNS
    code = tl.load(row + 3)
    if code == _FLOAT32:
        total = _chunk_sum(row, chunk, None, tl.float32, QUICK and P == INF, P)
    elif code == _FLOAT16:
        total = _chunk_sum(row, chunk, None, tl.float16, QUICK, P)
    elif code == _BFLOAT16:
        total = _chunk_sum(row, chunk, None, tl.uint16, QUICK, P)
        if QUICK and P != INF:
            if ~((total >= _LOWEST) & (total <= _HIGHEST)):
                total = _chunk_sum(row, chunk, None, tl.uint16, False, P)
    else:
        total = _chunk_sum(row, chunk, None, tl.float64, False, P)
    tl.store(partials + chunk, total)


@triton.jit
def finish(rows, partials, sums, P: tl.constexpr):
    """sums[tensor] from the partials of its chunks, always in one order: their sum (P = 1) or maximum (inf)."""
    tl.store(sums + tl.program_id(0), _of_chunks(rows + tl.program_id(0) * _COLUMNS, partials, None, None, P))


@triton.jit
def partial_norms(rows, owners, maxima, sums, P: tl.constexpr):
    """maxima[chunk] = max(|x|), sums[chunk] = sum((|x| / maximum)**P), in float64, by two reads of the chunk."""
    chunk = tl.program_id(0)
    row = rows + tl.load(owners + chunk) * _COLUMNS
    code = tl.load(row + 3)
    if code == _FLOAT32:
        _chunk_norm(row, chunk, maxima, sums, tl.float32, P)
    elif code == _FLOAT16:
        _chunk_norm(row, chunk, maxima, sums, tl.float16, P)
    elif code == _BFLOAT16:
        _chunk_norm(row, chunk, maxima, sums, tl.uint16, P)
    else:
        _chunk_norm(row, chunk, maxima, sums, tl.float64, P)


@triton.jit
def finish_norms(rows, maxima, sums, norms, P: tl.constexpr):
    """norms[tensor] from the maxima and sums of its chunks, always in one order."""
    row = rows + tl.program_id(0) * _COLUMNS
    maximum = _of_chunks(row, maxima, None, None, INF)
    total = _of_chunks(row, maxima, tl.where(maximum == 0, 1.0, maximum), sums, P)
    norm = maximum * tl.exp2(tl.log2(total) / P)
    tl.store(norms + tl.program_id(0), tl.where(maximum == INF, maximum, norm))


@triton.jit
def rewrite(rows, owners, number, HOW: tl.constexpr):
    """SCALE: multiplies by `number`, unless it is 1. SCALE_EACH: every tensor has one of its own.

    CLAMP: to [-number, number]. ZERO: if `number` is true.
    """
    chunk = tl.program_id(0)
    owner = tl.load(owners + chunk)
    if HOW == SCALE_EACH:
        number += owner
    given = tl.load(number)
    if HOW == SCALE or HOW == SCALE_EACH:
        if given == 1:
            return
    if HOW == ZERO:
        if given == 0:
            return
    row = rows + owner * _COLUMNS
    code = tl.load(row + 3)
    if code == _FLOAT32:
        _rewrite_chunk(row, chunk, given, tl.float32, HOW)
    elif code == _FLOAT16:
        _rewrite_chunk(row, chunk, given, tl.float16, HOW)
    elif code == _BFLOAT16:
        _rewrite_chunk(row, chunk, given, tl.uint16, HOW)
    else:
        _rewrite_chunk(row, chunk, given, tl.float64, HOW)


@triton.jit
def _place(row, chunk, STORED: tl.constexpr):
    """The tensor's pointer, rounded down to 16 bytes; from there this chunk's start and end, and the tensor's start."""
    base = tl.multiple_of(tl.load(row).to(tl.pointer_type(STORED)), 16)
    start = (chunk - tl.load(row + 4)) * _CHUNK
    return base, start, tl.minimum(start + _CHUNK, tl.load(row + 2)), tl.load(row + 1)


@triton.jit
def _chunk_sum(row, chunk, scale, STORED: tl.constexpr, QUICK: tl.constexpr, P: tl.constexpr):
    base, start, stop, head = _place(row, chunk, STORED)
    total = _zeros(_READ, QUICK, P)
    while start < stop:
        offsets = tl.multiple_of(start, _READ) + tl.arange(0, _READ)
        if (start >= head) & (start + _READS * _READ <= stop):  # without a mask the loads are 16 bytes wide
            short = _term(tl.load(base + offsets), scale, QUICK, P)
            for i in tl.static_range(1, _READS):
                more = tl.load(base + offsets + i * _READ)
                short = _plus(short, _term(more, scale, QUICK, P), P)
            start += _READS * _READ
        else:
            values = tl.load(base + offsets, mask=(offsets >= head) & (offsets < stop), other=0)
            short = _term(values, scale, QUICK, P)
            start += _READ
        total = _plus(total, short.to(total.dtype), P)
    return _joined(total, P)


@triton.jit
def _chunk_norm(row, chunk, maxima, sums, STORED: tl.constexpr, P: tl.constexpr):
    maximum = _chunk_sum(row, chunk, None, STORED, STORED != tl.float64, INF)
    scale = tl.where(maximum == 0, 1.0, maximum)
    tl.store(maxima + chunk, maximum)
    tl.store(sums + chunk, _chunk_sum(row, chunk, scale, STORED, False, P))


@triton.jit
def _of_chunks(row, partials, scale, weights, P: tl.constexpr):
    """The sum, or maximum, of `_term` of the tensor's partials; times their weights, if any."""
    first, last = tl.load(row + 4), tl.load(row + _COLUMNS + 4)
    total = _zeros(_FINISHED, False, P)
    while first < last:
        offsets = first + tl.arange(0, _FINISHED)
        part = _term(tl.load(partials + offsets, mask=offsets < last, other=0.0), scale, False, P)
        if weights is not None:
            part *= tl.load(weights + offsets, mask=offsets < last, other=0.0)
        total = _plus(total, part, P)
        first += _FINISHED
    return _joined(total, P)


# An untaken branch is compiled unless it is an `else`: hence those after a return.
@triton.jit
def _zeros(BLOCK: tl.constexpr, QUICK: tl.constexpr, P: tl.constexpr):
    if P != INF:
        return tl.zeros([BLOCK], tl.float64)
    else:
        return tl.zeros([BLOCK], tl.int32 if QUICK else tl.int64)


@triton.jit
def _term(stored, scale, QUICK: tl.constexpr, P: tl.constexpr):
    """|x|**P, or (|x| / scale)**P. For P = inf |x| as an integer, which orders as floats do, with NaN above infinity.

    A maximum of floats drops NaN on the device, and keeps it in the interpreter.
    """
    x = _wide(stored).to(tl.float32 if QUICK else tl.float64)
    if scale is not None:
        x = x / scale
    if P == 2:
        return x * x
    elif P == 1:
        return tl.abs(x)
    elif P != INF:
        return tl.exp2(P * tl.log2(tl.abs(x)))
    elif QUICK:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF


@triton.jit
def _plus(total, more, P: tl.constexpr):
    if P == INF:
        return tl.maximum(total, more)
    else:
        return total + more


@triton.jit
def _joined(total, P: tl.constexpr):
    if P != INF:
        return tl.sum(total)
    elif total.dtype == tl.int64:
        return tl.max(total).to(tl.float64, bitcast=True)
    else:
        return tl.max(total).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _rewrite_chunk(row, chunk, given, STORED: tl.constexpr, HOW: tl.constexpr):
    base, start, stop, head = _place(row, chunk, STORED)
    number = given.to(tl.float64 if STORED == tl.float64 else tl.float32)
    while start < stop:
        offsets = tl.multiple_of(start, _REWRITTEN) + tl.arange(0, _REWRITTEN)
        if (start >= head) & (start + _REWRITTEN <= stop):
            _rewrite_block(base + offsets, None, number, STORED, HOW)
        else:
            _rewrite_block(base + offsets, (offsets >= head) & (offsets < stop), number, STORED, HOW)
        start += _REWRITTEN


@triton.jit
def _rewrite_block(pointers, mask, number, STORED: tl.constexpr, HOW: tl.constexpr):
    if HOW == ZERO:
        tl.store(pointers, tl.zeros([_REWRITTEN], STORED), mask=mask)
    else:
        x = _wide(tl.load(pointers, mask=mask))
        if HOW != CLAMP:
            tl.store(pointers, _narrow(x * number, STORED), mask=mask)
        else:
            high = _wide(_narrow(number, STORED))
            outside = (x > high) | (x < -high)  # not where NaN; elements inside are not written
            clamped = _narrow(tl.where(x > high, high, -high), STORED)
            tl.store(pointers, clamped, mask=outside if mask is None else outside & mask)


@triton.jit
def _wide(stored):
    """bfloat16 goes by its bits: so it needs no hardware for it, and the interpreter rounds it right."""
    if stored.dtype == tl.uint16:
        return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif stored.dtype == tl.float16:
        return stored.to(tl.float32)
    else:
        return stored


@triton.jit
def _narrow(x, STORED: tl.constexpr):
    if STORED == tl.uint16:  # to the nearest, ties to even
        bits = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
    else:
        return x.to(STORED)
