"""The Triton kernels that `cuda` launches, with one program for each chunk of a `Table`."""

from __future__ import annotations

import triton
import triton.language as tl

from distclip.kernels import naive, tensor_table

INF = tl.constexpr(float("inf"))
SCALE, SCALE_EACH, CLAMP, ZERO = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

_ROW_SIZE, _CHUNK = tl.constexpr(tensor_table.ROW_SIZE), tl.constexpr(tensor_table.CHUNK)
# The indices in tensor_table.DTYPES.
_FLOAT32, _FLOAT16, _BFLOAT16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Elements read at a time. A sum loads _READS such blocks before it adds them up, which keeps many
# loads under way. A rewrite cannot, because no load may pass a store.
_READ, _READS = tl.constexpr(1024), tl.constexpr(8)
_REWRITTEN, _FINISHED = tl.constexpr(2048), tl.constexpr(4096)
# For a sum between these, float32 loses less than 2**-50 of the squares in one chunk.
_LEAST_FLOAT32 = tl.constexpr(naive.LEAST_FLOAT32)
_LOWEST, _HIGHEST = tl.constexpr(2.0**-60), tl.constexpr(2.0**120)


@triton.jit
def partial_sums(rows, owners, partials, where, P: tl.constexpr, FAST: tl.constexpr):
    """partials[chunk] = sum(|x|**P), or max(|x|) for P = inf, in float64.

    where: if not None, a bool for each tensor; the chunks of those that it leaves out are not read.
    FAST: float32 may do a part. It holds the squares of 16-bit numbers exactly, and adds _READS of
    them before float64 takes over. float32 elements are widened first, except for a maximum.
    """
    chunk = tl.program_id(0)
    owner = tl.load(owners + chunk)
    if where is not None:
        if tl.load(where + owner) == 0:
            return
    row = rows + owner * _ROW_SIZE
    code = tl.load(row + 3)
    if code == _FLOAT32:
        total = _chunk_sum(row, chunk, None, tl.float32, FAST and P == INF, P)
    elif code == _FLOAT16:
        total = _chunk_sum(row, chunk, None, tl.float16, FAST, P)
    elif code == _BFLOAT16:
        total = _chunk_sum(row, chunk, None, tl.uint16, FAST, P)
        if FAST and P != INF:
            if ~((total >= _LOWEST) & (total <= _HIGHEST)):
                total = _chunk_sum(row, chunk, None, tl.uint16, False, P)
    else:
        total = _chunk_sum(row, chunk, None, tl.float64, False, P)
    tl.store(partials + chunk, total)


@triton.jit
def finish(rows, partials, sums, P: tl.constexpr):
    """sums[tensor] = the sum (P = 1) or maximum (P = inf) of its chunks, always in one order."""
    row = rows + tl.program_id(0) * _ROW_SIZE
    tl.store(sums + tl.program_id(0), _combine_chunks(row, partials, None, None, P))


@triton.jit
def partial_norms(rows, owners, maxima, sums, P: tl.constexpr):
    """maxima[chunk] = max(|x|), sums[chunk] = sum((|x| / maximum)**P), in float64.

    Reads the chunk twice.
    """
    chunk = tl.program_id(0)
    row = rows + tl.load(owners + chunk) * _ROW_SIZE
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
    row = rows + tl.program_id(0) * _ROW_SIZE
    maximum = _combine_chunks(row, maxima, None, None, INF)
    total = _combine_chunks(row, maxima, tl.where(maximum == 0, 1.0, maximum), sums, P)
    norm = maximum * tl.exp2(tl.log2(total) / P)
    tl.store(norms + tl.program_id(0), tl.where(maximum == INF, maximum, norm))


@triton.jit
def rewrite(rows, owners, operands, OPERATION: tl.constexpr):
    """SCALE: multiplies by the operand, unless it is 1. SCALE_EACH: by one operand per tensor.

    CLAMP: to [-operand, operand]. ZERO: if the operand is true.
    """
    chunk = tl.program_id(0)
    owner = tl.load(owners + chunk)
    if OPERATION == SCALE_EACH:
        operands += owner
    operand = tl.load(operands)
    if OPERATION == SCALE or OPERATION == SCALE_EACH:
        if operand == 1:
            return
    if OPERATION == ZERO:
        if operand == 0:
            return
    row = rows + owner * _ROW_SIZE
    code = tl.load(row + 3)
    if code == _FLOAT32:
        _rewrite_chunk(row, chunk, operand, tl.float32, OPERATION)
    elif code == _FLOAT16:
        _rewrite_chunk(row, chunk, operand, tl.float16, OPERATION)
    elif code == _BFLOAT16:
        _rewrite_chunk(row, chunk, operand, tl.uint16, OPERATION)
    else:
        _rewrite_chunk(row, chunk, operand, tl.float64, OPERATION)


@triton.jit
def _span(row, chunk, STORED: tl.constexpr):
    """The tensor's address rounded down to 16 bytes. From there, in elements: the chunk's start and
    stop, and the tensor's start."""
    base = tl.multiple_of(tl.load(row).to(tl.pointer_type(STORED)), 16)
    start = (chunk - tl.load(row + 4)) * _CHUNK
    return base, start, tl.minimum(start + _CHUNK, tl.load(row + 2)), tl.load(row + 1)


@triton.jit
def _chunk_sum(row, chunk, scale, STORED: tl.constexpr, FAST: tl.constexpr, P: tl.constexpr):
    base, start, stop, head = _span(row, chunk, STORED)
    total = _zeros(_READ, FAST, P)
    while start < stop:
        offsets = tl.multiple_of(start, _READ) + tl.arange(0, _READ)
        # Loads are 16 bytes wide only without a mask.
        if (start >= head) & (start + _READS * _READ <= stop):
            short = _term(tl.load(base + offsets), scale, FAST, P)
            for i in tl.static_range(1, _READS):
                more = tl.load(base + offsets + i * _READ)
                short = _plus(short, _term(more, scale, FAST, P), P)
            start += _READS * _READ
        else:
            values = tl.load(base + offsets, mask=(offsets >= head) & (offsets < stop), other=0)
            short = _term(values, scale, FAST, P)
            start += _READ
        total = _plus(total, short.to(total.dtype), P)
    return _combined(total, P)


@triton.jit
def _chunk_norm(row, chunk, maxima, sums, STORED: tl.constexpr, P: tl.constexpr):
    maximum = _chunk_sum(row, chunk, None, STORED, STORED != tl.float64, INF)
    scale = tl.where(maximum == 0, 1.0, maximum)
    tl.store(maxima + chunk, maximum)
    tl.store(sums + chunk, _chunk_sum(row, chunk, scale, STORED, False, P))


@triton.jit
def _combine_chunks(row, partials, scale, weights, P: tl.constexpr):
    """The sum or maximum of `_term` of a tensor's partials, each times its weight if any."""
    first, last = tl.load(row + 4), tl.load(row + _ROW_SIZE + 4)
    total = _zeros(_FINISHED, False, P)
    while first < last:
        offsets = first + tl.arange(0, _FINISHED)
        term = _term(tl.load(partials + offsets, mask=offsets < last, other=0.0), scale, False, P)
        if weights is not None:
            term *= tl.load(weights + offsets, mask=offsets < last, other=0.0)
        total = _plus(total, term, P)
        first += _FINISHED
    return _combined(total, P)


# Triton compiles a branch that is not taken, unless it is an `else`. Hence `else` after a return.
@triton.jit
def _zeros(BLOCK: tl.constexpr, FAST: tl.constexpr, P: tl.constexpr):
    if P != INF:
        return tl.zeros([BLOCK], tl.float64)
    else:
        return tl.zeros([BLOCK], tl.int32 if FAST else tl.int64)


@triton.jit
def _term(stored, scale, FAST: tl.constexpr, P: tl.constexpr):
    """|x|**P, or (|x| / scale)**P. For P = inf the bits of |x| as an integer.

    Such integers have the order of the floats, and NaN is above infinity. A maximum of floats would
    drop NaN on the device, though not in the interpreter.
    """
    x = _wide(stored).to(tl.float32 if FAST else tl.float64)
    if scale is not None:
        x = x / scale
    if P == 2:
        return x * x
    elif P == 1:
        return tl.abs(x)
    elif P != INF:
        return tl.exp2(P * tl.log2(tl.abs(x)))
    elif FAST:
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
def _combined(total, P: tl.constexpr):
    if P != INF:
        return tl.sum(total)
    elif total.dtype == tl.int64:
        return tl.max(total).to(tl.float64, bitcast=True)
    else:
        return tl.max(total).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _rewrite_chunk(row, chunk, operand, STORED: tl.constexpr, OPERATION: tl.constexpr):
    if STORED == tl.float64:
        _rewrite_with(row, chunk, operand, STORED, OPERATION)
    elif OPERATION == SCALE or OPERATION == SCALE_EACH:
        if (tl.abs(operand) < _LEAST_FLOAT32) & (operand != 0):
            _rewrite_with(row, chunk, operand, STORED, OPERATION)
        else:
            _rewrite_with(row, chunk, operand.to(tl.float32), STORED, OPERATION)
    else:
        _rewrite_with(row, chunk, operand.to(tl.float32), STORED, OPERATION)


@triton.jit
def _rewrite_with(row, chunk, number, STORED: tl.constexpr, OPERATION: tl.constexpr):
    base, start, stop, head = _span(row, chunk, STORED)
    while start < stop:
        offsets = tl.multiple_of(start, _REWRITTEN) + tl.arange(0, _REWRITTEN)
        if (start >= head) & (start + _REWRITTEN <= stop):
            _rewrite_block(base + offsets, None, number, STORED, OPERATION)
        else:
            mask = (offsets >= head) & (offsets < stop)
            _rewrite_block(base + offsets, mask, number, STORED, OPERATION)
        start += _REWRITTEN


@triton.jit
def _rewrite_block(pointers, mask, number, STORED: tl.constexpr, OPERATION: tl.constexpr):
    if OPERATION == ZERO:
        tl.store(pointers, tl.zeros([_REWRITTEN], STORED), mask=mask)
    else:
        x = _wide(tl.load(pointers, mask=mask))
        if OPERATION != CLAMP:
            product = x * number
            if STORED != tl.float64:
                product = product.to(tl.float32)
            tl.store(pointers, _narrow(product, STORED), mask=mask)
        else:
            high = _wide(_narrow(number, STORED))
            outside = (x > high) | (x < -high)  # false for NaN; only these are written
            clamped = _narrow(tl.where(x > high, high, -high), STORED)
            tl.store(pointers, clamped, mask=outside if mask is None else outside & mask)


@triton.jit
def _wide(stored):
    """bfloat16 is read by its bits, which old hardware and the interpreter know too."""
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
