"""What Numba compiles for `cpu_numba`: the loops over a chunk, and the functions that threads run.

A core keeps several reads of memory under way only if the program reads several addresses. Each
chunk is therefore read in four lanes.
"""

from __future__ import annotations

from functools import cache

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

_LANE = 256  # elements of each lane in a block; its float32 sums err by less than rows in `cpu`
_LEAST_MEAN = 2.0**-100  # as in `cpu_torch`
_STRIP = 64  # elements of a lane that are scaled in a row


@cache
def worker(loop, dtype):
    """A C function of a task of four int64.

    They are: the index of the next chunk, the number of chunks, and the addresses of the chunks and
    of the values.
    """

    @numba.cfunc(numba.void(numba.types.CPointer(numba.int64)))
    def work(task):
        chunks = numba.carray(_pointer(task[2]), (task[1], 2), np.int64)
        values = numba.carray(_pointer(task[3]), task[1], np.float64)
        i = _take(task)
        while i < task[1]:
            loop(numba.carray(_pointer(chunks[i, 0]), chunks[i, 1], dtype), values, i)
            i = _take(task)

    return work


# Sums may be taken in any order, because vectors need that. NaN and infinity stay what they are.
_any_order = {"reassoc", "contract", "nsz"}


@numba.njit(cache=True)
def squares(x, sums, chunk):
    total = _quick_squares(x)
    # Whatever the range of float32 has lost or rounded is less than 2**-26 of such a sum.
    if not (_LEAST_MEAN * x.size <= total < np.inf):
        total = _exact_squares(x)
    sums[chunk] = total


@numba.njit(cache=True, fastmath=_any_order)
def _quick_squares(x):
    lane = x.size // 4 // _LANE * _LANE
    total = 0.0
    for begin in range(0, lane, _LANE):
        first = x[begin : begin + _LANE]
        second = x[lane + begin : lane + begin + _LANE]
        third = x[2 * lane + begin : 2 * lane + begin + _LANE]
        fourth = x[3 * lane + begin : 3 * lane + begin + _LANE]
        a = b = c = d = np.float32(0)
        for i in range(_LANE):
            a += _wide(first[i]) * _wide(first[i])
            b += _wide(second[i]) * _wide(second[i])
            c += _wide(third[i]) * _wide(third[i])
            d += _wide(fourth[i]) * _wide(fourth[i])
        total += np.float64((a + b) + (c + d))
    return total + _exact_squares(x[4 * lane :])


@numba.njit(cache=True, fastmath=_any_order)
def _exact_squares(x):
    total = 0.0
    for i in range(x.size):
        total += np.float64(_wide(x[i])) ** 2
    return total


@numba.njit(cache=True)
def scale(x, coefficient, _chunk):
    factor = np.float32(coefficient[0])
    lane = x.size // 4 // _STRIP * _STRIP
    for begin in range(0, lane, _STRIP):
        for k in range(4):
            strip = x[k * lane + begin : k * lane + begin + _STRIP]
            for i in range(_STRIP):
                strip[i] = _narrow(_wide(strip[i]) * factor, strip[i])
    rest = x[4 * lane :]
    for i in range(rest.size):
        rest[i] = _narrow(_wide(rest[i]) * factor, rest[i])


_word, _half, _float = ir.IntType(32), ir.HalfType(), ir.FloatType()


@intrinsic
def _wide(_context, bits):
    """A float32 from float32 itself, from the bits of bf16 as int16, or of fp16 as uint16."""

    def generate(_context, builder, _signature, arguments):
        (value,) = arguments
        if bits == numba.float32:
            return value
        if bits == numba.uint16:
            return builder.fpext(builder.bitcast(value, _half), _float)
        return builder.bitcast(builder.shl(builder.zext(value, _word), _word(16)), _float)

    return numba.float32(bits), generate


@intrinsic
def _narrow(_context, value, like):
    """A float32 rounded to the type of `like`: to the nearest number, ties to even."""

    def generate(_context, builder, _signature, arguments):
        number = arguments[0]
        if like == numba.float32:
            return number
        if like == numba.uint16:
            return builder.bitcast(builder.fptrunc(number, _half), ir.IntType(16))
        word = builder.bitcast(number, _word)
        odd = builder.and_(builder.lshr(word, _word(16)), _word(1))
        rounded = builder.add(builder.add(word, odd), _word(0x7FFF))
        # The bits of a NaN might otherwise round to infinity or zero.
        quiet = builder.or_(word, _word(1 << 22))
        isnan = builder.fcmp_unordered("uno", number, number)
        upper = builder.lshr(builder.select(isnan, quiet, rounded), _word(16))
        return builder.trunc(upper, ir.IntType(16))

    return like(value, like), generate


@intrinsic
def _pointer(_context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return numba.types.voidptr(address), generate


@intrinsic
def _take(_context, task):
    """task[0]++, atomic."""

    def generate(_context, builder, _signature, arguments):
        return builder.atomic_rmw("add", arguments[0], ir.IntType(64)(1), "monotonic")

    return numba.int64(task), generate
