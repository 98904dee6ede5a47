"""The CPU, compiled by Numba: sums of squares and scaling as fast as memory goes, with a single core too.

The threads are torch's own. Others would wait for cores on which torch's threads still spin, as OpenMP's do for some
milliseconds after the last operation of backward.
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

from distclip.kernels import cpu_numba_loops as numba_device

_device = cast(Any, numba_device)  # what Numba compiles has no types

_CHUNK = 1 << 20  # elements that a thread takes at a time
# Numba knows neither bf16 nor fp16 on a CPU: they come as integers, which `numba_device` tells apart.
DTYPES = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.float16: np.uint16}


# Operators, so that profilers, dispatch modes and the version counters of tensors know of them.
@torch.library.custom_op("distclip::squares", mutates_args=(), device_types="cpu")
def squares(runs: Sequence[Tensor]) -> Tensor:
    """The sum of squares of contiguous tensors of one of `DTYPES`: a float64 scalar.

    float32 inside of a block, float64 across blocks, the same with any number of threads; infinite or less exact where
    squares leave the range of float32.
    """
    chunks = _chunks(runs)
    sums = np.empty(len(chunks))
    _run(_device.squares, runs[0].dtype, chunks, sums)
    return torch.tensor(sums.sum(), dtype=torch.float64, device="cpu")


@torch.library.custom_op("distclip::scale_", mutates_args=("runs",), device_types="cpu")
def scale_(runs: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiplies contiguous tensors of one of `DTYPES` by a float64 scalar, as `loops.scale_` does."""
    _run(_device.scale, runs[0].dtype, _chunks(runs), np.array([coefficient.item()]))


def _run(kernel: object, dtype: torch.dtype, chunks: np.ndarray, values: np.ndarray) -> None:
    """Runs `kernel` on each chunk on torch's threads, each of which takes the next chunk until none is left."""
    worker = _device.worker(kernel, DTYPES[dtype])
    task = np.array([0, len(chunks), chunks.ctypes.data, values.ctypes.data])
    _openmp().GOMP_parallel(worker.ctypes, task.ctypes, ctypes.c_uint(torch.get_num_threads()), 0)


def _chunks(runs: Sequence[Tensor]) -> np.ndarray:
    """Where each begins in memory, and how many elements it has. Shape: chunks, 2."""
    size = runs[0].itemsize
    each = [
        (begin + i * size, min(_CHUNK, numel - i))
        for begin, numel in zip(map(Tensor.data_ptr, runs), map(Tensor.numel, runs), strict=True)
        for i in range(0, numel, _CHUNK)
    ]
    return np.array(each, dtype=np.int64).reshape(-1, 2)


@cache
def _openmp() -> ctypes.CDLL:
    """The OpenMP that torch is linked with: GCC's, or one that knows GCC's entries, as LLVM's and Intel's do."""
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / f"libtorch_cpu{suffix}"))
    library.GOMP_parallel.restype = None
    return library
