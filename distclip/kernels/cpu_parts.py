"""CPUs: the sums of squares of tensors from one reading of the longer spans that they lie in.

What `cpu` reads are spans, in rows of equal length, and the sum of all is what it needs. A tensor
has the rows that lie in it whole, and up to two pieces of rows that it shares with its neighbours.
These and short tensors are read again: few elements, in float64.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise, repeat
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distclip.kernels.contiguous import flat

_flatten: Any = torch.ops.aten.flatten_dense_tensors


class Place(NamedTuple):
    """Which elements of which span a tensor is."""

    span: int
    offset: int
    numel: int


class Rows(NamedTuple):
    """The rows, of all spans that are read in rows, which lie whole in a tensor."""

    part: int
    first: int
    end: int


class Pieces(NamedTuple):
    """Elements that are in none of the rows, and the part that each belongs to."""

    parts: list[int]
    values: list[Tensor]


def located(spans: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Place] | None:
    """Where the parts lie; None where that is unclear, because spans or parts overlap."""
    numels = list(map(Tensor.numel, parts))
    if len(spans) == len(parts) and all(map(is_, spans, parts)):
        return list(map(Place, range(len(parts)), repeat(0), numels))
    full = [i for i, span in enumerate(spans) if span.numel()]
    full.sort(key=lambda i: spans[i].data_ptr())
    begins = [spans[i].data_ptr() for i in full]
    ends = [begin + spans[i].nbytes for i, begin in zip(full, begins, strict=True)]
    if any(end > begin for end, begin in zip(ends, begins[1:], strict=False)):
        return None
    itemsize = parts[0].itemsize
    places: list[Place] = []
    for begin, numel in zip(map(Tensor.data_ptr, parts), numels, strict=True):
        if not numel:
            places.append(Place(0, 0, 0))
            continue
        i = bisect_right(begins, begin) - 1
        if i < 0 or begin + numel * itemsize > ends[i]:
            return None
        places.append(Place(full[i], (begin - begins[i]) // itemsize, numel))
    return None if _overlap(places) else places


def _overlap(places: Sequence[Place]) -> bool:
    ordered = sorted(places)
    neighbours = pairwise(ordered)
    return any(a.span == b.span and a.offset + a.numel > b.offset for a, b in neighbours)


def are_whole(places: Sequence[Place], spans: Sequence[Tensor]) -> bool:
    return all(numel == spans[span].numel() for span, _, numel in places)


def divided(
    parts: Sequence[Tensor], places: Sequence[Place], first_row: dict[int, int], row: int
) -> tuple[list[Rows], Pieces]:
    """The rows of each part, and the pieces that are left.

    Args:
        first_row: of the spans that are read in rows of `row` elements.
    """
    if not first_row:
        return [], Pieces(list(range(len(parts))), list(parts))
    rows: list[Rows] = []
    pieces = Pieces([], [])
    for i, (span, offset, numel) in enumerate(places):
        begin, end = -(-offset // row), (offset + numel) // row
        if span not in first_row or begin >= end:
            pieces.parts.append(i)
            pieces.values.append(parts[i])
            continue
        rows.append(Rows(i, first_row[span] + begin, first_row[span] + end))
        if begin * row > offset:
            pieces.parts.append(i)
            pieces.values.append(flat(parts[i])[: begin * row - offset])
        if end * row < offset + numel:
            pieces.parts.append(i)
            pieces.values.append(flat(parts[i])[end * row - offset :])
    return rows, pieces


def add_rows_(sums: Tensor, norms: Tensor, rows: Sequence[Rows]) -> None:
    """Adds the squares of the norms of these rows to the sums of their parts."""
    rows = sorted(rows, key=lambda each: each.first)
    bounds = [bound for each in rows for bound in (each.first, each.end)]
    offsets = _indices([0, *bounds, len(norms)])
    found = torch.segment_reduce(norms.square(), "sum", offsets=offsets)[1::2]
    sums.index_add_(0, _indices([each.part for each in rows]), found)


def add_pieces_(sums: Tensor, pieces: Pieces) -> None:
    """Adds the squares of the elements of these pieces to the sums of their parts."""
    if not pieces.parts:
        return
    lengths = _indices(list(map(Tensor.numel, pieces.values)))
    values = _flatten(pieces.values).double().square_()
    found = torch.segment_reduce(values, "sum", lengths=lengths)
    sums.index_add_(0, _indices(pieces.parts), found)


def _indices(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
