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
from typing import Any, cast

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
torch.library.define("distclip::squares_and_each", "(Tensor[] tensors) -> (Tensor, Tensor)")
torch.library.define("distclip::scale_", "(Tensor(a!)[] tensors, Tensor coefficient) -> ()")


def squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of contiguous tensors of one of `DTYPES`: a float64 scalar.

    Sums are float32 within a block and float64 across blocks, and the same with any number of
    threads. The result is infinite or less exact where squares leave the range of float32.
    """
    return torch.ops.distclip.squares(tensors)


def squares_and_each(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`squares`, the same bits, and those of each tensor. Shapes: [], [n]."""
    return torch.ops.distclip.squares_and_each(tensors)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiplies contiguous tensors of one of `DTYPES` by a float64 scalar, as `naive.scale_`."""
    torch.ops.distclip.scale_(tensors, coefficient)
    torch.autograd.graph.increment_version(tensors)


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    chunks = _chunks(tensors)
    sums = np.empty(len(chunks))
    _run(_loops.squares, tensors[0].dtype, chunks, sums)
    return torch.tensor(sums.sum(), dtype=torch.float64, device="cpu")


def _squares_and_each(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    chunks = _chunks(tensors)
    sums = np.empty(len(chunks))
    _run(_loops.squares, tensors[0].dtype, chunks, sums)
    counts = np.array([-(-tensor.numel() // _CHUNK) for tensor in tensors])
    each, full = np.zeros(len(tensors)), counts > 0
    each[full] = np.add.reduceat(sums, (np.cumsum(counts) - counts)[full])
    return torch.tensor(sums.sum(), dtype=torch.float64, device="cpu"), torch.from_numpy(each)


def _scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    _run(_loops.scale, tensors[0].dtype, _chunks(tensors), np.array([coefficient.item()]))


torch.library.impl("distclip::squares", "cpu", _squares)
torch.library.impl("distclip::squares_and_each", "cpu", _squares_and_each)
torch.library.impl("distclip::scale_", "cpu", _scale_)


def _run(loop: object, dtype: torch.dtype, chunks: np.ndarray, values: np.ndarray) -> None:
    """Runs `loop` on torch's threads, each of which takes the next chunk until none is left."""
    worker = _loops.worker(loop, DTYPES[dtype])
    task = np.array([0, len(chunks), chunks.ctypes.data, values.ctypes.data])
    # Neither wakes threads for one chunk, nor asks for some of them: OpenMP would end the others.
    threads = torch.get_num_threads() if len(chunks) > 1 else 1
    _openmp().GOMP_parallel(worker.ctypes, task.ctypes, ctypes.c_uint(threads), 0)


def _chunks(tensors: Sequence[Tensor]) -> np.ndarray:
    """The address and the number of elements of every chunk. Shape: [num_chunks, 2]."""
    size = tensors[0].itemsize
    chunks = [
        (begin + i * size, min(_CHUNK, numel - i))
        for begin, numel in zip(
            map(Tensor.data_ptr, tensors), map(Tensor.numel, tensors), strict=True
        )
        for i in range(0, numel, _CHUNK)
    ]
    return np.array(chunks, dtype=np.int64).reshape(-1, 2)


@cache
def _openmp() -> ctypes.CDLL:
    """The OpenMP that torch is linked with.

    It is GCC's, or one that has GCC's entry points, as LLVM's and Intel's have.
    """
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / f"libtorch_cpu{suffix}"))
    library.GOMP_parallel.restype = None
    return library
