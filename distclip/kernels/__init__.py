"""What touches every element of a gradient: the only room that knows kinds of devices.

A kernel takes dense tensors of one device and knows no policy, no layout and no rank. `loops` is the definition of
correct; the others do the same faster.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from types import ModuleType

import torch
from torch import Tensor

from distclip.kernels import cpu, foreach
from distclip.kernels.contiguous import runs
from distclip.kernels.naive import scale_units_ as scale_units_
from distclip.kernels.naive import unit_norms as unit_norms
from distclip.kernels.naive import unit_power_sums as unit_power_sums


def tensor_lists(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The memory of dense tensors in lists that one call takes: of one device, on a CPU of one dtype and in long runs.

    An accelerator's kernels take any list in one launch and tell its tensors apart, so that nothing is joined there.
    """
    if all(map(attrgetter("is_cpu"), tensors)):
        return [joined for there in _by(attrgetter("dtype"), tensors) if (joined := runs(there))]
    by_device = _by(attrgetter("device"), tensors)
    return [piece for there in by_device for piece in (tensor_lists(there) if there[0].is_cpu else [there])]


def power_sum(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """sum(|x|**p) over all tensors of a piece together, or max(|x|) for p = inf: a float64 scalar."""
    if _best(tensors) is cpu:
        return cpu.power_sum(tensors, norm_type)
    each = power_sums(tensors, norm_type)
    return each.amax() if math.isinf(norm_type) else each.sum()


def power_sums(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """See `loops.power_sums`."""
    return _best(tensors).power_sums(tensors, norm_type)


def norms(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """See `loops.norms`."""
    return _best(tensors).norms(tensors, norm_type)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """See `loops.scale_`."""
    _best(tensors).scale_(tensors, coefficient)


def scale_each_(tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    """See `loops.scale_each_`."""
    _best(tensors).scale_each_(tensors, coefficients)


def clamp_(tensors: Sequence[Tensor], bound: Tensor) -> None:
    """See `loops.clamp_`."""
    _best(tensors).clamp_(tensors, bound)


def zero_(tensors: Sequence[Tensor], where: Tensor) -> None:
    """See `loops.zero_`."""
    _best(tensors).zero_(tensors, where)


def _best(tensors: Sequence[Tensor]) -> ModuleType:
    return _on(tensors[0].device) if tensors else cpu


@cache
def _on(device: torch.device) -> ModuleType:
    if device.type == "cpu":
        return cpu
    return (device.type == "cuda" and _triton(device)) or foreach


def _triton(device: torch.device) -> ModuleType | None:
    """None where Triton is missing, or fails: it may know neither the chip nor a C compiler."""
    try:
        from distclip.kernels import cuda as triton

        triton.power_sums([torch.ones(1, device=device)], 2.0)
    except ImportError:
        return None
    except Exception as error:  # Triton raises anything, and training should go on
        warnings.warn(f"Triton does not run on {device}, so that clipping is slower there: {error!r}", stacklevel=2)
        return None
    return triton


def _by(key: Callable[[Tensor], object], tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in lists for which `key` is the same."""
    kinds = set(map(key, tensors))
    return [list(tensors) if len(kinds) == 1 else [t for t in tensors if key(t) == kind] for kind in kinds]


def backend(device):
    return _on(device)
