"""The Triton kernel that writes gradients, with one program for each chunk of a `Table`."""

from __future__ import annotations

import triton
import triton.language as tl

from distclip.kernels import naive, tensor_table
from distclip.kernels.cuda_triton_elements import narrow, span, wide

SCALE, SCALE_EACH, CLAMP, ZERO = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

_ROW_SIZE = tl.constexpr(tensor_table.ROW_SIZE)
_LEAST_FLOAT32 = tl.constexpr(naive.LEAST_FLOAT32)
_REWRITTEN = tl.constexpr(2048)  # elements at a time


@triton.jit(do_not_specialize=range(4))  # see `cuda_triton`
def rewrite(rows, owners, operands, first_chunk, STORED: tl.constexpr, OPERATION: tl.constexpr):
    """SCALE: multiplies by the operand, unless it is 1. SCALE_EACH: by one operand per tensor.

    CLAMP: to [-operand, operand]. ZERO: if the operand is true.
    """
    chunk = first_chunk + tl.program_id(0)
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
    base, start, stop, head = span(row, chunk, STORED)
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
        x = wide(tl.load(pointers, mask=mask))
        if OPERATION != CLAMP:
            product = x * number
            if STORED != tl.float64:
                product = product.to(tl.float32)
            tl.store(pointers, narrow(product, STORED), mask=mask)
        else:
            high = wide(narrow(number, STORED))
            outside = (x > high) | (x < -high)  # false for NaN; only these are written
            clamped = narrow(tl.where(x > high, high, -high), STORED)
            tl.store(pointers, clamped, mask=outside if mask is None else outside & mask)
