"""For CUDA: every list of tensors in one launch, found by a table on the device; nothing waits for the host.

The numbers are those of `loops.py`. Sums are deterministic: every program writes a partial sum of its own, and a
second launch adds them up in one order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from distclip.kernels import cuda_triton as triton_device
from distclip.kernels import foreach
from distclip.kernels import naive as loops
from distclip.kernels import tensor_table as tables

_device = cast(Any, triton_device)  # what `@triton.jit` makes has no types


def power_sums(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """As `loops.power_sums`, in two launches."""
    if not tensors:
        return loops.power_sums(tensors, norm_type)
    table = tables.table(tensors)
    sums = torch.empty(len(tensors), dtype=torch.float64, device=tensors[0].device)
    partials = sums.new_empty(len(table.owners))
    quick = norm_type in (1, 2, math.inf)
    with torch.cuda.device_of(sums):
        if len(partials):
            _device.partial_sums[(len(partials),)](table.rows, table.owners, partials, float(norm_type), quick)
        _device.finish[(len(sums),)](table.rows, partials, sums, math.inf if math.isinf(norm_type) else 1.0)
    for i in table.others:
        sums[i] = foreach.power_sums([tensors[i]], norm_type)[0]
    return sums


def norms(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """As `loops.norms`, in two launches."""
    if not tensors or math.isinf(norm_type):
        return power_sums(tensors, norm_type)
    table = tables.table(tensors)
    found = torch.empty(len(tensors), dtype=torch.float64, device=tensors[0].device)
    maxima, sums = found.new_empty(2, len(table.owners)).unbind()
    with torch.cuda.device_of(found):
        if len(sums):
            _device.partial_norms[(len(sums),)](table.rows, table.owners, maxima, sums, float(norm_type))
        _device.finish_norms[(len(found),)](table.rows, maxima, sums, found, float(norm_type))
    for i in table.others:
        found[i] = foreach.norms([tensors[i]], norm_type)[0]
    return found


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """As `loops.scale_`, in one launch, which writes nothing where the coefficient is 1."""
    foreach.scale_([tensors[i] for i in _launch(tensors, coefficient, _device.SCALE)], coefficient)


def scale_each_(tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    """As `loops.scale_each_`, in one launch, which writes nothing where a coefficient is 1."""
    for i in _launch(tensors, coefficients, _device.SCALE_EACH):
        foreach.scale_([tensors[i]], coefficients[i])


def clamp_(tensors: Sequence[Tensor], bound: Tensor) -> None:
    """As `loops.clamp_`, in one launch, which writes nothing but elements beyond the bound."""
    loops.clamp_([tensors[i] for i in _launch(tensors, bound, _device.CLAMP)], bound)


def zero_(tensors: Sequence[Tensor], where: Tensor) -> None:
    """As `loops.zero_`, in one launch, which writes nothing unless `where` is true."""
    loops.zero_([tensors[i] for i in _launch(tensors, where, _device.ZERO)], where)


def _launch(tensors: Sequence[Tensor], number: Tensor, how: Any) -> Sequence[int]:
    """Rewrites what fits a table, and returns the places of the rest."""
    if not tensors:
        return []
    table = tables.table(tensors)
    if len(table.owners):
        with torch.cuda.device_of(number):
            _device.rewrite[(len(table.owners),)](table.rows, table.owners, number, how)
        torch.autograd.graph.increment_version(tensors)  # autograd cannot know what a table leads to
    return table.others
