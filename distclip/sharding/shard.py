"""Where the elements on this rank belong in the whole tensor, and to which units.

A *unit* is what shares one limit: a whole tensor, or one index of its first or last dim. A boundary
between ranks may cut units, and then their sums must be joined across ranks. Which units are cut
follows from the records below alone, which name the boundaries of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, TypeAlias, cast

from torch import Tensor

from distclip.arguments import as_int, as_ints, shown
from distclip.errors import LayoutError


class UnitView(NamedTuple):
    """A view of a parameter's values whose units lie along one dim.

    Attributes:
        dim: the dim of `values` whose indices are units; None if all values belong to one unit.
        first: the index of the first unit in the whole tensor.
    """

    values: Tensor
    dim: int | None
    first: int


class UnitRange(NamedTuple):
    """The units of a whole tensor that this rank holds elements of."""

    first: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]


@dataclass(frozen=True, slots=True)
class BlockShard:
    """A block of a tensor: a range of indices on every dim.

    Attributes:
        global_shape: the shape of the whole tensor.
        offsets: the first index of the block on each dim.
        sizes: the size of the block on each dim.
        sharded_dims: the dims that some boundary between ranks divides. None where nothing says
            which, and any unit may be cut.
    """

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    sharded_dims: frozenset[int] | None = frozenset()

    def __post_init__(self) -> None:
        for name in ("global_shape", "offsets", "sizes"):
            _store(self, name, as_ints("BlockShard", name, getattr(self, name)))
        num_dims = {len(self.global_shape), len(self.offsets), len(self.sizes)}
        dims = zip(self.global_shape, self.offsets, self.sizes, strict=False)
        if len(num_dims) > 1 or any(min(at, n) < 0 or at + n > size for size, at, n in dims):
            raise LayoutError(
                f"cannot make a BlockShard of sizes {self.sizes} at {self.offsets}: it does not "
                f"lie inside a tensor of shape {self.global_shape}, and other elements would be "
                f"counted. Pass for each dim of the whole tensor its size, the first index on this "
                f"rank, and how many follow."
            )
        if self.sharded_dims is not None:
            _store(self, "sharded_dims", frozenset(_dims(self.sharded_dims, len(self.sizes))))

    @classmethod
    def whole(
        cls, shape: Sequence[int], sharded_dims: frozenset[int] | None = frozenset()
    ) -> BlockShard:
        """The block that is all of a tensor of this shape."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape), sharded_dims)

    def unit_range(self, dim: int | None) -> UnitRange:
        """The units on this rank. dim: the dim whose indices are units; None: the tensor is one."""
        return UnitRange(0, 1) if dim is None else UnitRange(self.offsets[dim], self.sizes[dim])

    def unit_views(self, values: Tensor, dim: int | None) -> Iterator[UnitView]:
        """Views that cover the block once. values: the block, of shape `sizes`."""
        if values.numel():
            yield UnitView(values, dim, self.unit_range(dim).first)

    def cut_units(self, dim: int | None) -> Sequence[int]:
        """The units that several ranks hold elements of, ascending; the same on every rank."""
        cut = self.sharded_dims is None or bool(self.sharded_dims - {dim})
        return range(1 if dim is None else self.global_shape[dim]) if cut else ()


@dataclass(frozen=True, slots=True)
class FlatShard:
    """A range of a tensor's elements in row-major order, inside a flat buffer.

    Attributes:
        global_shape: the shape of the whole tensor.
        start: the index in the whole tensor of the first element on this rank.
        offset: the index of that element in the flat values of the parameter.
        numel: how many elements of the tensor lie on this rank.
        boundaries: the indices in the whole tensor, other than 0, at which the range of a rank
            begins. Indices beyond the tensor are allowed; a rank that holds nothing has one there.
    """

    global_shape: tuple[int, ...]
    start: int
    offset: int
    numel: int
    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("start", "offset", "numel"):
            _store(self, name, as_int("FlatShard", name, getattr(self, name)))
        for name in ("global_shape", "boundaries"):
            _store(self, name, as_ints("FlatShard", name, getattr(self, name)))
        last = prod(self.global_shape) - self.numel
        if self.numel < 0 or (self.numel and not (0 <= self.start <= last and self.offset >= 0)):
            raise LayoutError(
                f"cannot make a FlatShard of {self.numel} elements from {self.start}, at "
                f"{self.offset} in its buffer: a tensor of shape {self.global_shape} has "
                f"{prod(self.global_shape)}, and others would be counted as its own. Pass the "
                f"first index in the whole tensor, and how many elements of it lie on this rank."
            )

    def unit_range(self, dim: int | None) -> UnitRange:
        """The units on this rank. dim: 0 or the last; None: the tensor is one unit."""
        if dim is None:
            return UnitRange(0, 1)
        if dim:  # a range of a few rows has elements in every column
            return UnitRange(0, self.global_shape[-1])
        if not self.numel:
            return UnitRange(0, 0)
        first = self.start // self._row_numel
        last = (self.start + self.numel - 1) // self._row_numel
        return UnitRange(first, last - first + 1)

    def unit_views(self, values: Tensor, dim: int | None) -> Iterator[UnitView]:
        """Views that cover the range once. values: those of the whole parameter."""
        if not self.numel:
            return
        flat = values.view(-1)[self.offset : self.offset + self.numel]
        if dim is None:
            yield UnitView(flat, None, 0)
            return
        width = self.global_shape[-1] if dim else self._row_numel
        # The end of a row that began on another rank, whole rows, the start of one that ends there.
        head = min(-self.start % width, self.numel)
        tail = head + (self.numel - head) // width * width
        for begin, end in ((0, head), (head, tail), (tail, self.numel)):
            if begin < end:
                yield self._rows(flat[begin:end], self.start + begin, dim, width)

    def cut_units(self, dim: int | None) -> Sequence[int]:
        """The units that several ranks hold elements of, ascending; the same on every rank."""
        if dim is None:  # ranks that hold nothing need the norm too: policies remember it
            return range(1 if self.boundaries else 0)
        inside = [b for b in self.boundaries if 0 < b < prod(self.global_shape)]
        if dim:
            return range(self.global_shape[-1] if inside else 0)
        return sorted({b // self._row_numel for b in inside if b % self._row_numel})

    @property
    def _row_numel(self) -> int:
        return prod(self.global_shape[1:])

    def _rows(self, flat: Tensor, start: int, dim: int, width: int) -> UnitView:
        """A part of one row, or whole rows. start: the index of the first element."""
        part = flat.numel() < width
        if dim:
            return (
                UnitView(flat, 0, start % width) if part else UnitView(flat.view(-1, width), 1, 0)
            )
        return UnitView(flat.view(1, -1) if part else flat.view(-1, width), 0, start // width)


@dataclass(frozen=True, slots=True)
class FlatBlockShard:
    """A range of the elements of a block: FSDP1 has flattened a shard of tensor parallelism.

    Attributes:
        block: where the block lies in the whole tensor.
        flat: the range, as if the block were the whole tensor.
    """

    block: BlockShard
    flat: FlatShard

    @property
    def global_shape(self) -> tuple[int, ...]:
        return self.block.global_shape

    def unit_range(self, dim: int | None) -> UnitRange:
        """The units on this rank. dim: 0 or the last; None: the tensor is one unit."""
        first, count = self.flat.unit_range(dim)
        return UnitRange(first + self._first(dim), count)

    def unit_views(self, values: Tensor, dim: int | None) -> Iterator[UnitView]:
        """Views that cover the range once. values: those of the whole parameter."""
        for view in self.flat.unit_views(values, dim):
            yield view._replace(first=view.first + self._first(dim))

    def cut_units(self, dim: int | None) -> Sequence[int]:
        """The units that several ranks may hold elements of; the same on every rank.

        Those of other blocks are cut elsewhere: all units count as cut where any may be.
        """
        cut = self.flat.boundaries or self.block.cut_units(dim)
        return range(1 if dim is None else self.global_shape[dim]) if cut else ()

    def _first(self, dim: int | None) -> int:
        return 0 if dim is None else self.block.offsets[dim]


Shard: TypeAlias = BlockShard | FlatShard | FlatBlockShard


@dataclass(frozen=True, slots=True)
class ParamShard:
    """What one parameter on this rank holds of one tensor of the model.

    Attributes:
        name: the name of the tensor in the model without wrappers.
        numel: how many elements the whole tensor has.
    """

    name: str
    numel: int
    shard: Shard

    def __post_init__(self) -> None:
        _store(self, "numel", as_int("ParamShard", "numel", self.numel))
        name, shard = cast(Any, self.name), cast(Any, self.shard)
        is_shard = isinstance(shard, BlockShard | FlatShard | FlatBlockShard)
        if not isinstance(name, str) or not is_shard or self.numel < 0:
            raise LayoutError(
                f"cannot make a ParamShard of name={shown(name)}, numel={self.numel}, "
                f"shard={shown(shard)}: statistics are kept under the name, and norms need to know "
                f"which elements are here. Pass a string, the number of elements of the whole "
                f"tensor, and a BlockShard or a FlatShard."
            )

    @property
    def global_shape(self) -> tuple[int, ...]:
        return self.shard.global_shape


def _store(record: object, name: str, value: object) -> None:
    object.__setattr__(record, name, value)  # the records are frozen


def _dims(given: Any, ndim: int) -> Iterator[int]:
    if not isinstance(given, Iterable) or isinstance(given, str):
        given = (given,)
    for dim in cast("Iterable[Any]", given):
        if type(dim) is not int or not -ndim <= dim < max(ndim, 1):
            raise LayoutError(
                f"cannot make a BlockShard with sharded_dims={shown(given)}: {shown(dim)} is no "
                f"dim of a tensor with {ndim} dims, and units that ranks share would be missed. "
                f"Pass a set of dims, such as {{0}}, or None where it is unknown."
            )
        yield dim % max(ndim, 1)
