"""What touches every element of a gradient: the only room that knows kinds of devices.

A kernel takes dense tensors of one device and knows no policy, no layout and no rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from distclip.kernels import foreach, loops
from distclip.kernels.loops import scale_units_ as scale_units_
from distclip.kernels.loops import unit_power_sums as unit_power_sums


def power_sums(tensors: Sequence[Tensor], norm_type: float, scales: Tensor | None = None) -> Tensor:
    return _best(tensors).power_sums(tensors, norm_type, scales)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    _best(tensors).scale_(tensors, coefficient)


def scale_each_(tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    _best(tensors).scale_each_(tensors, coefficients)


def clamp_(tensors: Sequence[Tensor], bound: Tensor) -> None:
    _best(tensors).clamp_(tensors, bound)


def zero_(tensors: Sequence[Tensor], where: Tensor) -> None:
    _best(tensors).zero_(tensors, where)


def _best(tensors: Sequence[Tensor]) -> ModuleType:
    return _on(tensors[0].device) if tensors else loops


@cache
def _on(device: torch.device) -> ModuleType:
    if device.type == "cpu":
        return loops
    return (device.type == "cuda" and _triton(device)) or foreach


def _triton(device: torch.device) -> ModuleType | None:
    """None where Triton is missing, or fails: it may know neither the chip nor a C compiler."""
    try:
        from distclip.kernels import triton

        triton.power_sums([torch.ones(1, device=device)], 2.0)
    except ImportError:
        return None
    except Exception as error:  # Triton raises anything, and training should go on
        warnings.warn(f"Triton does not run on {device}, so that clipping is slower there: {error!r}", stacklevel=2)
        return None
    return triton
