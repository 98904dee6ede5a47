"""What the Triton kernels do with the elements of one chunk of a `tensor_table.Table`."""

from __future__ import annotations

import triton
import triton.language as tl

from distclip.kernels import tensor_table

INF = tl.constexpr(float("inf"))
_DIVIDES_CHUNKS = tl.constexpr(tensor_table.SMALL_CHUNK)


@triton.jit
def span(row, chunk, STORED: tl.constexpr):
    """The tensor's address rounded down to 16 bytes. From there, in elements: the chunk's start and
    stop, and the tensor's start."""
    base = tl.multiple_of(tl.load(row).to(tl.pointer_type(STORED)), 16)
    size = tl.load(row + 5)
    start = tl.multiple_of((chunk - tl.load(row + 3)) * size, _DIVIDES_CHUNKS)
    return base, start, tl.minimum(start + size, tl.load(row + 2)), tl.load(row + 1)


@triton.jit
def wide(stored):
    """bfloat16 is read by its bits, which old hardware and the interpreter know too."""
    if stored.dtype == tl.uint16:
        return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif stored.dtype == tl.float16:
        return stored.to(tl.float32)
    else:
        return stored


@triton.jit
def narrow(x, STORED: tl.constexpr):
    if STORED == tl.uint16:  # to the nearest, ties to even
        bits = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
    else:
        return x.to(STORED)


# Triton compiles a branch that is not taken, unless it is an `else`. Hence `else` after a return.
@triton.jit
def zeros(BLOCK: tl.constexpr, FAST: tl.constexpr, P: tl.constexpr):
    """The sum or maximum of no terms."""
    if P != INF:
        return tl.zeros([BLOCK], tl.float64)
    else:
        return tl.zeros([BLOCK], tl.int32 if FAST else tl.int64)


@triton.jit
def term(stored, scale, FAST: tl.constexpr, P: tl.constexpr):
    """|x|**P, or (|x| / scale)**P. For P = inf the bits of |x| as an integer.

    Such integers have the order of the floats, and NaN is above infinity. A maximum of floats would
    drop NaN on the device, though not in the interpreter.

    FAST: in float32; else in float64.
    """
    x = wide(stored).to(tl.float32 if FAST else tl.float64)
    if scale is not None:
        x = x / scale
    if P != INF:
        return raised(tl.abs(x), P)
    elif FAST:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF


@triton.jit
def plus(total, more, P: tl.constexpr):
    if P == INF:
        return tl.maximum(total, more)
    else:
        return total + more


@triton.jit
def combined(total, P: tl.constexpr):
    """All of a block, float64."""
    if P != INF:
        return tl.sum(total)
    elif total.dtype == tl.int64:
        return tl.max(total).to(tl.float64, bitcast=True)
    else:
        return tl.max(total).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def raised(x, P: tl.constexpr):
    """x**P for x >= 0. Whole P up to 6 take products; a power takes 100 instructions."""
    if P == 1:
        return x
    elif P == 2:
        return x * x
    elif P == 3:
        return x * x * x
    elif P == 4:
        return (x * x) * (x * x)
    elif P == 5:
        return (x * x) * (x * x) * x
    elif P == 6:
        return (x * x * x) * (x * x * x)
    else:
        return tl.exp2(P * tl.log2(x))


@triton.jit
def root(x, P: tl.constexpr):
    """x**(1 / P) for a float64 x >= 0, or x for P = inf."""
    if P == 1 or P == INF:
        return x
    elif P == 2:
        return tl.sqrt(x)
    elif P == 4:
        return tl.sqrt(tl.sqrt(x))
    elif P == 3 or (P == 5 or P == 6):
        near = tl.exp2(tl.log2(x) / P)
        nearer = near - (raised(near, P) - x) / (P * raised(near, P - 1))  # Newton's step
        return tl.where((near > 0) & (near < INF), nearer, near)
    else:
        return tl.exp2(tl.log2(x) / P)
