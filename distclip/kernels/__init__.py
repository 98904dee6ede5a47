"""What touches every element of a gradient: the only room that knows kinds of devices.

A kernel takes dense tensors of one device and knows no policy, no layout and no rank. `loops` is the definition of
correct; the others do the same faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from types import ModuleType

from torch import Tensor

from distclip.kernels import cpu, loops
from distclip.kernels.loops import clamp_ as clamp_
from distclip.kernels.loops import scale_units_ as scale_units_
from distclip.kernels.loops import unit_power_sums as unit_power_sums
from distclip.kernels.loops import zero_ as zero_
from distclip.kernels.runs import runs


def pieces(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The memory of dense tensors in lists that one call takes: of one device, on a CPU of one dtype and in long runs.

    An accelerator's kernels take any list in one launch and tell its tensors apart, so that nothing is joined there.
    """
    if all(map(attrgetter("is_cpu"), tensors)):
        return [joined for there in _by(attrgetter("dtype"), tensors) if (joined := runs(there))]
    by_device = _by(attrgetter("device"), tensors)
    return [piece for there in by_device for piece in (pieces(there) if there[0].is_cpu else [there])]


def power_sum(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """sum(|x|**p) over all tensors of a piece together, or max(|x|) for p = inf: a float64 scalar."""
    if tensors[0].is_cpu:
        return cpu.power_sum(tensors, norm_type)
    each = power_sums(tensors, norm_type)
    return each.amax() if math.isinf(norm_type) else each.sum()


def power_sums(tensors: Sequence[Tensor], norm_type: float, scales: Tensor | None = None) -> Tensor:
    """See `loops.power_sums`."""
    return _of(tensors).power_sums(tensors, norm_type, scales)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """See `loops.scale_`."""
    _of(tensors).scale_(tensors, coefficient)


def _of(tensors: Sequence[Tensor]) -> ModuleType:
    """The kernels for the device that the tensors are on."""
    return cpu if not tensors or tensors[0].is_cpu else loops


def _by(key: Callable[[Tensor], object], tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in lists for which `key` is the same."""
    kinds = set(map(key, tensors))
    return [list(tensors) if len(kinds) == 1 else [t for t in tensors if key(t) == kind] for kind in kinds]
