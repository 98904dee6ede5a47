"""CPUs: the speed of memory where Numba is installed, and near to it with torch's operators.

`cpu_numba` and `cpu_torch` have the sums of squares of float32 and 16 bits, one for each tensor.
Where squares leave the range of float32, both do the work again in float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import Protocol

import torch
from torch import Tensor

from distclip.kernels import cpu_torch, naive
from distclip.kernels.contiguous import contiguous_spans, flat, grouped
from distclip.kernels.naive import (
    clamp_,
    coefficients,
    prepare_units,
    scale_each_,
    scale_units_,
    total,
    zero_,
)
from distclip.torch_private import foreach_mul_

__all__ = [
    "clamp_",
    "coefficients",
    "norms",
    "power_sums",
    "power_sums_where",
    "prepare",
    "prepare_units",
    "scale_",
    "scale_each_",
    "scale_units_",
    "tensor_lists",
    "total",
    "unit_norms",
    "unit_power_sums",
    "zero_",
]

# Elements of long tensors from which Numba saves time at each call; to load it takes 1.5 s. The
# keys are the dtypes whose squares are summed in float32.
_NUMBA_FROM = {torch.float32: 1 << 22, torch.float16: 1 << 20, torch.bfloat16: 1 << 20}
_SHORT = 1 << 12  # elements: shorter tensors are not worth the 1.5 s, however many they are
_LEAST_SUM = 2.0**-900  # squares below the range of float64 are lost or rounded


class _Compiled(Protocol):
    """The functions of `cpu_numba`."""

    def squares(self, tensors: Sequence[Tensor]) -> Tensor: ...
    def scale_(self, tensors: Sequence[Tensor], coefficient: Tensor) -> None: ...


def prepare(tensors: Sequence[Tensor], norm_type: float) -> None:
    """Compiles with Numba for each dtype that has elements enough."""
    for alike in grouped(tensors, attrgetter("dtype")):
        if compiled := _numba_for(alike):
            one = torch.ones(1, dtype=alike[0].dtype, device="cpu")
            compiled.scale_([one], compiled.squares([one])[0])


def tensor_lists(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The contiguous spans of each dtype."""
    return [contiguous_spans(alike) for alike in grouped(tensors, attrgetter("dtype"))]


def power_sums(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Fast for p = 2 and inf; other powers are those of `naive`."""
    dtypes = dict.fromkeys(map(attrgetter("dtype"), tensors))
    if len(dtypes) == 1:
        return _power_sums_alike(tensors, norm_type)
    sums = torch.zeros(len(tensors), dtype=torch.float64, device="cpu")
    for dtype in dtypes:
        here = [i for i, tensor in enumerate(tensors) if tensor.dtype is dtype]
        sums[here] = _power_sums_alike([tensors[i] for i in here], norm_type)
    return sums


def _power_sums_alike(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    dtype = tensors[0].dtype
    if math.isinf(norm_type) and not dtype.is_complex:
        return cpu_torch.maxima(tensors)
    if norm_type != 2 or dtype not in _NUMBA_FROM:
        return naive.power_sums(tensors, norm_type)
    if (compiled := _numba_for(tensors)) is None:
        return cpu_torch.squares(tensors)
    if not all(map(Tensor.is_contiguous, tensors)):
        tensors = [flat(tensor) for tensor in tensors]
    return compiled.squares(tensors)


def power_sums_where(
    tensors: Sequence[Tensor], norm_type: float, where: Tensor, otherwise: Tensor
) -> Tensor:
    """Reads what `where` names."""
    sums, named = otherwise.clone(), [i for i, is_named in enumerate(where) if is_named]
    if named:
        sums[named] = power_sums([tensors[i] for i in named], norm_type)
    return sums


def norms(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """From sums of powers, and from `naive` where these leave the range of float64."""
    sums = power_sums(tensors, norm_type)
    if math.isinf(norm_type):
        return sums
    in_range = (sums > _LEAST_SUM) & (sums < math.inf)
    if type(sums) is Tensor and bool(in_range.all()):  # a fake tensor has no values to look at
        return sums ** (1 / norm_type)
    return naive.norms(tensors, norm_type)


def unit_power_sums(
    tensors: Sequence[Tensor], dims: Sequence[int | None], norm_type: float
) -> Tensor:
    """Whole tensors as in `power_sums`, and other units as in `naive`."""
    return naive.unit_numbers(tensors, dims, norm_type, power_sums, naive.dim_power_sums)


def unit_norms(tensors: Sequence[Tensor], dims: Sequence[int | None], norm_type: float) -> Tensor:
    """Whole tensors as in `norms`, and other units as in `naive`."""
    return naive.unit_numbers(tensors, dims, norm_type, norms, naive.dim_norms)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """By Numba if the long ones are worth it, else in one call of torch."""
    if (factor := coefficient.item()) == 1:
        return
    if naive.is_tiny(factor):
        naive.scale_(tensors, coefficient)
        return
    if compiled := _numba_for(tensors):
        compiled.scale_([t for t in tensors if t.is_contiguous()], coefficient)
        tensors = [t for t in tensors if not t.is_contiguous()]
    if tensors:
        # The overload for a number would round it to 16 bits; the one for a tensor does not.
        wide = torch.promote_types(tensors[0].dtype, torch.float32).to_real()
        foreach_mul_(list(tensors), coefficient.to(wide))


def _numba_for(tensors: Sequence[Tensor]) -> _Compiled | None:
    """What Numba compiles, if the long ones of these tensors are worth it and Numba runs here."""
    least = _NUMBA_FROM.get(tensors[0].dtype, math.inf)
    long = sum(numel for numel in map(Tensor.numel, tensors) if numel > _SHORT)
    return _numba() if long >= least else None


@cache
def _numba() -> _Compiled | None:
    """None where Numba is missing or fails; it may know neither this Python nor this NumPy."""
    try:
        from distclip.kernels import cpu_numba

        one = torch.ones(1, device="cpu")
        cpu_numba.scale_([one], cpu_numba.squares([one])[0])
    except ModuleNotFoundError:
        return None
    except Exception as error:  # Numba raises errors of any kind, and training should go on
        warnings.warn(
            f"Numba does not run here. Clipping works but is slower on the CPU: {error!r}",
            stacklevel=2,
        )
        return None
    return cpu_numba
