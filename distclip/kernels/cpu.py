"""CPUs: the speed of memory where Numba is installed, and near to it with torch's operators.

torch's sums of squares are float32 along rows of 256 elements, one call for a tensor of any length.
A norm of a row errs by 3e-7 at most, if all its elements are equal and each rounding errs to the
same side, and by 5e-8 over many rows of unequal elements. The sums over rows are float64. 16 bits
are widened first, in blocks that stay in the cache. `naive` does the work again, in float64, where
squares leave the range of float32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from distclip.kernels import naive
from distclip.kernels.contiguous import contiguous_spans, flat, grouped
from distclip.kernels.cpu_parts import Place, add_pieces_, add_rows_, are_whole, divided, located
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
    "power_sum",
    "power_sum_and_each",
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

_flatten: Any = torch.ops.aten.flatten_dense_tensors
_norm = cast("Callable[..., Tensor]", torch.linalg.vector_norm)

# Elements from which Numba saves time at each call; to load it takes 1.5 s. The keys are the dtypes
# whose squares are summed in float32.
_NUMBA_FROM = {torch.float32: 1 << 22, torch.float16: 1 << 20, torch.bfloat16: 1 << 20}
_ROW = 256  # elements: more in a float32 sum err more, and calls for shorter rows take longer
_BLOCK = 1 << 18  # elements of 16 bits that are widened at a time: 1 MiB of float32
_SHORT = 1 << 12  # elements: a call for a shorter tensor costs more than its elements
_PACK = 1 << 15  # elements of a copy of short tensors: it stays in the cache of a core
_EXACT = 1 << 16  # elements: so few are all summed in float64
# Squares below the range of float32 are lost or rounded. They are less than 2**-26 of the sum
# where the mean square is above this.
_LEAST_MEAN = 2.0**-100
_LEAST_SUM = 2.0**-900  # as above, of float64


class _Compiled(Protocol):
    """The functions of `cpu_numba`."""

    def squares(self, tensors: Sequence[Tensor]) -> Tensor: ...
    def squares_and_each(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]: ...
    def scale_(self, tensors: Sequence[Tensor], coefficient: Tensor) -> None: ...


def prepare(tensors: Sequence[Tensor], norm_type: float) -> None:
    """Compiles with Numba for each dtype that has elements enough."""
    for alike in grouped(tensors, attrgetter("dtype")):
        if compiled := _numba_for(alike):
            one = torch.ones(1, dtype=alike[0].dtype, device="cpu")
            compiled.scale_([one], compiled.squares([one]))


def tensor_lists(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The contiguous spans of each dtype."""
    return [contiguous_spans(alike) for alike in grouped(tensors, attrgetter("dtype"))]


def power_sum(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Fast for p = 2 and inf; other powers are those of `naive`."""
    dtype = tensors[0].dtype
    if norm_type == 2 and dtype in _NUMBA_FROM:
        return _squares(tensors)
    if math.isinf(norm_type) and not dtype.is_complex:
        return _maximum(tensors)
    return naive.power_sum(tensors, norm_type)


def power_sum_and_each(
    spans: Sequence[Tensor], parts: Sequence[Tensor], norm_type: float
) -> tuple[Tensor, Tensor]:
    """`power_sum(spans)`, the same bits, and `power_sums(parts)`, in one reading for p = 2.

    Args:
        spans: a list of `tensor_lists`.
        parts: contiguous tensors that lie in the memory of spans, or are one.
    """
    if norm_type == 2 and spans[0].dtype in _NUMBA_FROM and parts:
        within = located(spans, parts)
        # Numba has a sum for each span, and none for a part of one.
        if within is not None and (not _numba_for(spans) or are_whole(within, spans)):
            return _squares_and_each(spans, parts, within)
        if (compiled := _numba_for(parts)) and all(map(Tensor.is_contiguous, parts)):
            return power_sum(spans, norm_type), _in_range(
                compiled.squares_and_each(parts)[1], parts
            )
    return power_sum(spans, norm_type), power_sums(parts, norm_type)


def power_sums(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """As `power_sum` of each tensor, where one is long."""
    if all(tensor.numel() <= _EXACT for tensor in tensors):
        return naive.power_sums(tensors, norm_type)
    return torch.stack([power_sum([tensor], norm_type) for tensor in tensors])


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
    """Long tensors by Numba if they are worth it, and all others in one call of torch."""
    if (factor := coefficient.item()) == 1:
        return
    if naive.is_tiny(factor):
        naive.scale_(tensors, coefficient)
        return
    if compiled := _numba_for(tensors):
        long = [t for t in tensors if t.numel() > _SHORT and t.is_contiguous()]
        if long:
            compiled.scale_(long, coefficient)
            tensors = [t for t in tensors if t.numel() <= _SHORT or not t.is_contiguous()]
    if tensors:
        # The overload for a number would round it to 16 bits; the one for a tensor does not.
        wide = torch.promote_types(tensors[0].dtype, torch.float32).to_real()
        foreach_mul_(list(tensors), coefficient.to(wide))


def _maximum(tensors: Sequence[Tensor]) -> Tensor:
    long, packs = _long_and_packed(tensors, list(map(Tensor.numel, tensors)), _SHORT)
    full = [values for values in (*long, *packs) if values.numel()]
    ends = [end.abs().double() for values in full for end in torch.aminmax(values)]
    return torch.stack(ends).amax() if ends else torch.zeros((), dtype=torch.float64, device="cpu")


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of tensors of float32 or 16 bits."""
    return _read_squares(tensors).total


class _Squares(NamedTuple):
    """What one reading of tensors gives: sums of squares, float64.

    Attributes:
        of_long: where Numba has read them, of each tensor that is not packed.
        row_norms: where torch has, of each row of these.
    """

    total: Tensor
    of_long: Tensor | None = None
    row_norms: Tensor | None = None


def _read_squares(tensors: Sequence[Tensor], each: bool = False) -> _Squares:
    numels = list(map(Tensor.numel, tensors))
    numel = sum(numels)
    long, packs = _long_and_packed(tensors, numels, _SHORT if numel > _EXACT else numel, _ROW)
    # `dot` would wake the other cores for so few elements.
    sums = [_norm(pack.double()).square() for pack in packs]
    of_long = row_norms = None
    if long:
        if (compiled := _numba_for(long)) is None:
            row_norms = _row_norms(long)
            found = torch.dot(row_norms, row_norms)
        elif each:
            found, of_long = compiled.squares_and_each(long)
        else:
            found = compiled.squares(long)
        in_range = _LEAST_MEAN * numel <= found.item() < math.inf
        sums.append(found if in_range else naive.power_sum(long, 2.0))
    total = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
    return _Squares(total, of_long, row_norms)


def _squares_and_each(
    spans: Sequence[Tensor], parts: Sequence[Tensor], places: Sequence[Place]
) -> tuple[Tensor, Tensor]:
    numels = list(map(Tensor.numel, spans))
    short = _SHORT if sum(numels) > _EXACT else sum(numels)  # as in `_read_squares`
    long = [i for i, numel in enumerate(numels) if numel > short]
    first_rows = accumulate((numels[i] // _ROW for i in long), initial=0)
    rows, pieces = divided(parts, places, dict(zip(long, first_rows, strict=False)), _ROW)
    members = [each.part for each in rows]
    read = _read_squares(spans, each=True)
    each = torch.zeros(len(parts), dtype=torch.float64, device="cpu")
    add_pieces_(each, pieces)
    if read.row_norms is not None and rows:
        add_rows_(each, read.row_norms, rows)
    elif read.of_long is not None:
        position = {span: i for i, span in enumerate(long)}
        each[members] += read.of_long[[position[places[part].span] for part in members]]
    each = _in_range(each, parts, members)
    return read.total, each


def _in_range(sums: Tensor, tensors: Sequence[Tensor], read: Sequence[int] | None = None) -> Tensor:
    """The sums of squares, of which those that have left the range of float32 are taken again.

    Args:
        read: which were summed in float32; None for all.
    """
    found = cast("list[float]", sums.tolist())
    for i in range(len(tensors)) if read is None else read:
        if not _LEAST_MEAN * tensors[i].numel() <= found[i] < math.inf:
            sums[i] = naive.power_sum([tensors[i]], 2.0)
    return sums


def _row_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each row of flat tensors of whole rows."""
    if tensors[0].dtype is not torch.float32:
        tensors = [block for tensor in tensors for block in torch.split(tensor, _BLOCK)]
    of_rows = [_norm(t.float().view(-1, _ROW), dim=1) for t in tensors]
    return torch.cat(of_rows).double()


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
        cpu_numba.scale_([one], cpu_numba.squares([one]))
    except ModuleNotFoundError:
        return None
    except Exception as error:  # Numba raises errors of any kind, and training should go on
        warnings.warn(
            f"Numba does not run here. Clipping works but is slower on the CPU: {error!r}",
            stacklevel=2,
        )
        return None
    return cpu_numba


def _long_and_packed(
    tensors: Sequence[Tensor], numels: Sequence[int], short: int, multiple: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """Flat views of the tensors longer than `short`, and copies that hold all other elements.

    Args:
        multiple: each view has a multiple of so many elements.
    """
    if max(numels) <= short:
        return [], _packed(tensors, numels)
    long: list[Tensor] = []
    rest: list[Tensor] = []
    for tensor, numel in zip(tensors, numels, strict=True):
        if numel <= short:
            rest.append(tensor)
        elif tail := numel % multiple:
            values = flat(tensor)
            long.append(values[: numel - tail])
            rest.append(values[numel - tail :])
        else:
            long.append(flat(tensor))
    return long, _packed(rest, list(map(Tensor.numel, rest)))


def _packed(tensors: Sequence[Tensor], numels: Sequence[int]) -> list[Tensor]:
    """Flat copies of about `_PACK` elements, each of equally many tensors."""
    if not tensors:
        return []
    num_packs = min(len(tensors), -(-sum(numels) // _PACK)) or 1
    step = -(-len(tensors) // num_packs)
    return [_copied(tensors[i : i + step]) for i in range(0, len(tensors), step)]


def _copied(tensors: Sequence[Tensor]) -> Tensor:
    # `cat` takes tensors of one number of dims. A view of each would take longer than the rest.
    all_flat = set(map(Tensor.dim, tensors)) == {1}
    return torch.cat(list(tensors)) if all_flat else _flatten(tensors)
