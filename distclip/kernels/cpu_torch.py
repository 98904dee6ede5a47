"""CPUs, with torch's operators: a number for each tensor, near to the speed of memory.

Sums of squares are float32 along rows of 256 elements, and float64 across rows. The norm of a row
errs by 3e-7 at most, if all its elements are equal and each rounding errs to the same side, and by
5e-8 over many rows of unequal elements. One call reads neighbours in one buffer, if all but the
last have whole rows. Short tensors and the ends of rows are copied to packs and summed in float64.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from distclip.kernels import naive
from distclip.kernels.contiguous import flat, neighbours, span

_flatten: Any = torch.ops.aten.flatten_dense_tensors
_norm = cast("Callable[..., Tensor]", torch.linalg.vector_norm)

_ROW = 256  # elements: more in a float32 sum err more, and calls for shorter rows take longer
_BLOCK = 1 << 18  # elements of 16 bits that are widened at a time: 1 MiB of float32
_SHORT = 1 << 12  # elements: a call for a shorter tensor costs more than its elements
_PACK = 1 << 16  # elements of a copy of short tensors: it stays in the cache of a core
_EXACT = 1 << 16  # elements: so few are all summed in float64
# Squares below the range of float32 are lost or rounded. They are less than 2**-26 of the sum
# where the mean square is above this.
LEAST_MEAN = 2.0**-100


def squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each tensor: all are float32, or all of one dtype of 16 bits.

    Shapes: the result: [len(tensors)], float64.
    """
    numels = list(map(Tensor.numel, tensors))
    with_rows = set[int]()
    if sum(numels) > _EXACT:
        # Alone, short ones go to packs. They may have neighbours, unless each begins its storage.
        short = 0 if any(map(Tensor.storage_offset, tensors)) else _SHORT
        with_rows = {n for n in set(numels) if n > _SHORT or (n > short and n % _ROW == 0)}
    if not with_rows:
        return _of_short(tensors, numels, 2.0)
    runs, pieces = _divided(tensors, numels, with_rows)
    sums = torch.zeros(len(tensors), dtype=torch.float64, device="cpu")
    if runs:
        _add_rows_(sums, runs, tensors, numels)
    if pieces.members:
        lengths = list(map(Tensor.numel, pieces.values))
        sums.index_add_(0, _integers(pieces.members), _of_short(pieces.values, lengths, 2.0))
    return sums


def maxima(tensors: Sequence[Tensor]) -> Tensor:
    """The largest magnitude in each tensor: all are real and of one dtype. Shapes: as `squares`."""
    numels = list(map(Tensor.numel, tensors))
    if max(numels) <= _SHORT:
        return _of_short(tensors, numels, math.inf)
    found = torch.zeros(len(tensors), dtype=torch.float64, device="cpu")
    long = [i for i, numel in enumerate(numels) if numel > _SHORT]
    ends = [end for i in long for end in torch.aminmax(flat(tensors[i]))]
    found[long] = torch.stack(ends).double().abs_().view(-1, 2).amax(1)
    if short := [i for i, numel in enumerate(numels) if numel <= _SHORT]:
        found[short] = _of_short([tensors[i] for i in short], [numels[i] for i in short], math.inf)
    return found


class _Run(NamedTuple):
    """Neighbours that are read in one call, by their indices, and the rows in which they lie."""

    members: list[int]
    values: Tensor


class _Pieces(NamedTuple):
    """Elements in no row, each with the index of its tensor."""

    members: list[int]
    values: list[Tensor]


def _divided(
    tensors: Sequence[Tensor], numels: Sequence[int], with_rows: Collection[int]
) -> tuple[list[_Run], _Pieces]:
    """What is read in rows, and all other elements.

    Args:
        with_rows: the numbers of elements of tensors that may be.
    """
    in_rows = [i for i, numel in enumerate(numels) if numel in with_rows]
    members = [i for i, numel in enumerate(numels) if numel not in with_rows]
    runs: list[_Run] = []
    pieces = _Pieces(members, [tensors[i] for i in members])
    for run in neighbours([tensors[i] for i in in_rows], _ROW):
        members = [in_rows[i] for i in run]
        numel, last = sum([numels[i] for i in members]), members[-1]
        if numel <= _SHORT:
            pieces.members.extend(members)
            pieces.values.extend([tensors[i] for i in members])
            continue
        values = flat(span(tensors[members[0]], tensors[last]))
        if tail := numel % _ROW:
            values, rest = torch.split(values, [numel - tail, tail])
            pieces.members.append(last)
            pieces.values.append(rest)
        runs.append(_Run(members, values))
    return runs, pieces


def _add_rows_(
    sums: Tensor, runs: Sequence[_Run], tensors: Sequence[Tensor], numels: Sequence[int]
) -> None:
    """Adds the squares in all rows to the sums of their tensors."""
    members = [i for run in runs for i in run.members]
    counts = _integers([numels[i] // _ROW for i in members])
    norms = _row_norms([run.values for run in runs])
    found = torch.segment_reduce(norms.square_(), "sum", lengths=counts)
    in_range = (found >= counts * (_ROW * LEAST_MEAN)) & (found < math.inf)
    if not bool(in_range.all()):
        for k, is_right in enumerate(cast("list[bool]", in_range.tolist())):
            if not is_right:
                rows = flat(tensors[members[k]])[: numels[members[k]] // _ROW * _ROW]
                found[k] = naive.power_sums([rows], 2.0)[0]
    sums.index_add_(0, _integers(members), found)


def _row_norms(values: Sequence[Tensor]) -> Tensor:
    if values[0].dtype is not torch.float32:
        values = [block for each in values for block in torch.split(each, _BLOCK)]
    of_rows = [_norm(each.float().view(-1, _ROW), dim=1) for each in values]
    return torch.cat(of_rows).double()


def _of_short(tensors: Sequence[Tensor], numels: Sequence[int], norm_type: float) -> Tensor:
    """A number for each tensor, in order; for p = 2 and inf."""
    found = [
        _of_pack(_copied(tensors[begin:end]).double(), numels[begin:end], norm_type)
        for begin, end in _packs(numels)
    ]
    return found[0] if len(found) == 1 else torch.cat(found)


def _packs(numels: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Begin and end of packs of about `_PACK` elements."""
    ends, begin = [0, *accumulate(numels)], 0
    while begin < len(numels):
        end = max(begin + 1, bisect_right(ends, ends[begin] + _PACK) - 1)
        yield begin, end
        begin = end


def _of_pack(pack: Tensor, lengths: Sequence[int], norm_type: float) -> Tensor:
    """Writes nothing: the pack of one tensor of float64 is no copy, but its memory."""
    is_max, alike = math.isinf(norm_type), 0 < min(lengths) == max(lengths)
    if alike:
        rows = pack.view(len(lengths), -1)
        return rows.abs().amax(1) if is_max else _norm(rows, dim=1).square_()
    counts = _integers(lengths)
    if is_max:
        return torch.segment_reduce(pack.abs(), "max", lengths=counts, initial=0)
    return torch.segment_reduce(pack.square(), "sum", lengths=counts)


def _copied(tensors: Sequence[Tensor]) -> Tensor:
    # `cat` takes tensors of one number of dims. A view of each would take longer than the rest.
    all_flat = set(map(Tensor.dim, tensors)) == {1}
    return torch.cat(list(tensors)) if all_flat else _flatten(tensors)


def _integers(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
