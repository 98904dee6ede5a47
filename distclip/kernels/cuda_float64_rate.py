"""Whether float64 is so slow on a card that sums would take longer than to read the gradients."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

# CU_DEVICE_ATTRIBUTE_SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO of the driver; torch does not tell it.
_RATIO = 87
# 2 on A100, H100 and B200; 32 or 64 on B300, on L4 and A10, and on cards for desktops. With 8, a
# sum in float64 still takes less time than to read float32 elements.
_STRONG_UP_TO = 8


@cache
def has_weak_float64(index: int) -> bool:
    """Of a CUDA device, by `Tensor.get_device`; float64 is right where nothing tells."""
    if index < 0 or torch.version.hip is not None:
        return False
    ratio = _ratio(index)
    return ratio is not None and ratio > _STRONG_UP_TO


def _ratio(index: int) -> int | None:
    """How many times as fast float32 is; None if the driver does not tell."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, ratio = ctypes.c_int(), ctypes.c_int()
    # torch and the driver count the same visible devices. Each call returns 0 for success.
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
        return None
    if driver.cuDeviceGetAttribute(ctypes.byref(ratio), _RATIO, device):
        return None
    return ratio.value
