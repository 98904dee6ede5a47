"""CPUs, compiled by Numba: sums of squares and scaling at the speed of memory, also on one core.

The threads are torch's own. Others would wait for cores on which torch's threads still spin, as the
threads of OpenMP do for some milliseconds after the last operation of backward.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from distclip.kernels import cpu_numba_loops

_loops = cast(Any, cpu_numba_loops)  # what Numba compiles has no types

_CHUNK = 1 << 18  # elements that a thread takes at a time
# Numba knows neither bf16 nor fp16 on a CPU. They are passed as two types of integers.
DTYPES = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.float16: np.uint16}


# Operators of torch, because profilers and dispatch modes must see them. `custom_op` would take
# 13 us more a call, nearly half of all that a call costs.
torch.library.define("distclip::squares", "(Tensor[] tensors) -> Tensor")
torch.library.define("distclip::scale_", "(Tensor(a!)[] tensors, Tensor coefficient) -> ()")


def squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each contiguous tensor, all of one of `DTYPES`.

    Sums are float32 within a block and float64 across blocks, and the same with any number of
    threads. Where squares leave the range of float32, they are summed in float64 throughout.

    Shapes: the result: [len(tensors)], float64.
    """
    return torch.ops.distclip.squares(tensors)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiplies contiguous tensors of one of `DTYPES` by a float64 scalar, as `naive.scale_`."""
    torch.ops.distclip.scale_(tensors, coefficient)
    torch.autograd.graph.increment_version(tensors)


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    chunks, first_of_each = _chunks(tensors)
    sums = np.empty(len(chunks))
    _run(_loops.squares, tensors[0].dtype, chunks, sums)
    if len(chunks) > len(tensors):
        sums = np.add.reduceat(sums, first_of_each)
    return torch.from_numpy(sums)


def _scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    chunks, _ = _chunks(tensors)
    _run(_loops.scale, tensors[0].dtype, chunks, np.array([coefficient.item()]))


torch.library.impl("distclip::squares", "cpu", _squares)
torch.library.impl("distclip::scale_", "cpu", _scale_)


def _run(loop: object, dtype: torch.dtype, chunks: np.ndarray, values: np.ndarray) -> None:
    """Runs `loop` on torch's threads, each of which takes the next chunk until none is left."""
    worker = _loops.worker(loop, DTYPES[dtype])
    task = np.array([0, len(chunks), chunks.ctypes.data, values.ctypes.data])
    # Neither wakes threads for one chunk, nor asks for some of them: OpenMP would end the others.
    threads = torch.get_num_threads() if len(chunks) > 1 else 1
    _openmp().GOMP_parallel(worker.ctypes, task.ctypes, ctypes.c_uint(threads), 0)


class _Chunks(NamedTuple):
    """The address and the number of elements of every chunk, and the first chunk of each tensor.

    Shapes: table: [num_chunks, 2]; first_of_each: [number of tensors].
    """

    table: np.ndarray
    first_of_each: np.ndarray


def _chunks(tensors: Sequence[Tensor]) -> _Chunks:
    """One or more chunks for each tensor; one of no elements for an empty tensor."""
    num = len(tensors)
    begins = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, num)
    numels = np.fromiter(map(Tensor.numel, tensors), np.int64, num)
    counts = np.maximum(-(-numels // _CHUNK), 1)
    first_of_each = np.cumsum(counts) - counts
    tensor = np.repeat(np.arange(num), counts)
    offsets = (np.arange(len(tensor)) - first_of_each[tensor]) * _CHUNK
    table = np.empty((len(tensor), 2), np.int64)
    table[:, 0] = begins[tensor] + offsets * tensors[0].itemsize
    table[:, 1] = np.minimum(numels[tensor] - offsets, _CHUNK)
    return _Chunks(table, first_of_each)


@cache
def _openmp() -> ctypes.CDLL:
    """The OpenMP that torch is linked with.

    It is GCC's, or one that has GCC's entry points, as LLVM's and Intel's have.
    """
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / f"libtorch_cpu{suffix}"))
    library.GOMP_parallel.restype = None
    return library
