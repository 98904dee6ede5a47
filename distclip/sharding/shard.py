"""Where the elements that lie on this rank belong in the whole tensor, and to which units.

A *unit* is what shares one limit: a whole tensor, or one index of its first or last dim. A shard boundary may cut
units, and then their sums must be joined across ranks; which units are cut follows from what every rank knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

View = tuple[Tensor, int | None, int]  # values; the dim that its units lie on, None if all are one; the first unit


@dataclass(frozen=True, slots=True)
class BlockShard:
    """A block of a tensor.

    Attributes:
        shape: of the whole tensor.
        start, size: the block's first index and its size on each dim.
        cut: the dims that some boundary between ranks divides; None where it is unknown which.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    cut: frozenset[int] | None = frozenset()

    def span(self, dim: int | None) -> tuple[int, int]:
        return (0, 1) if dim is None else (self.start[dim], self.size[dim])

    def views(self, values: Tensor, dim: int | None) -> Iterator[View]:
        if values.numel():
            yield values, dim, 0 if dim is None else self.start[dim]

    def cut_units(self, dim: int | None) -> Sequence[int]:
        divided = self.cut is None or bool(self.cut - {dim})
        return range(1 if dim is None else self.shape[dim]) if divided else ()


@dataclass(frozen=True, slots=True)
class FlatShard:
    """A run of a tensor's elements in row-major order, inside a flat buffer.

    Attributes:
        shape: of the whole tensor.
        first: its first element on this rank.
        offset, size: where the run lies in the flat values of the parameter.
        boundaries: the elements, other than 0, at which a rank's run begins.
    """

    shape: tuple[int, ...]
    first: int
    offset: int
    size: int
    boundaries: tuple[int, ...]

    @property
    def _row(self) -> int:
        return prod(self.shape[1:])

    @property
    def _column(self) -> int:
        return self.shape[-1]

    def span(self, dim: int | None) -> tuple[int, int]:
        if dim is None:
            return 0, 1
        if dim:
            return 0, self._column
        first = self.first // self._row if self.size else 0
        return first, (-(-(self.first + self.size) // self._row) - first) if self.size else 0

    def views(self, values: Tensor, dim: int | None) -> Iterator[View]:
        run = values.view(-1)[self.offset : self.offset + self.size]
        if not self.size:
            return
        if dim is None:
            yield run, None, 0
            return
        # The end of a line that began on another rank, whole lines, the beginning of one that ends elsewhere.
        width = self._column if dim else self._row
        head = min(-self.first % width, self.size)
        lines = (self.size - head) // width
        tail = head + lines * width
        yield from self._rest(run[:head], self.first, dim, width)
        if lines:
            first = 0 if dim else (self.first + head) // width
            yield run[head:tail].view(lines, width), (1 if dim else 0), first
        yield from self._rest(run[tail:], self.first + tail, dim, width)

    def _rest(self, part: Tensor, first: int, dim: int, width: int) -> Iterator[View]:
        if part.numel() and dim:
            yield part, 0, first % width
        elif part.numel():
            yield part.view(1, -1), 0, first // width

    def cut_units(self, dim: int | None) -> Sequence[int]:
        if dim is None:  # the ranks that hold nothing of it must know its norm too, for what policies remember
            return range(1 if self.boundaries else 0)
        inside = [b for b in self.boundaries if 0 < b < prod(self.shape)]
        if not inside:
            return ()
        if dim:
            return range(self._column)
        return sorted({b // self._row for b in inside if b % self._row})


@dataclass(frozen=True, slots=True)
class ParamShard:
    """One tensor of the model, as far as it lies in one parameter on this rank.

    Attributes:
        numel: of the whole tensor.
    """

    name: str
    numel: int
    piece: BlockShard | FlatShard

    @property
    def shape(self) -> tuple[int, ...]:
        return self.piece.shape


def spread(part: ParamShard, ranks: int) -> ParamShard:
    """A part that is declared to lie on `ranks` ranks, as equal shards along a dim that nobody told."""
    piece = part.piece
    return ParamShard(
        part.name, part.numel * ranks, BlockShard(piece.shape, (0,) * len(piece.shape), piece.shape, cut=None)
    )
