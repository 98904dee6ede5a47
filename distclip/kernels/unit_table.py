"""The units of a list of tensors, in a table by which few launches reach all of them.

A tensor is a matrix here: its inner dim is contiguous, and each outer index begins `stride`
elements after the last. Units are the outer indices (rows) or the inner ones (columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distclip.kernels.upload import upload

# int64 in each row of a table; arrays after it are aligned to 16 bytes.
ROW_SIZE = 10
# What a row of a table holds, beside `first_unit`.
ADDRESS, STRIDE, NUM_UNITS, LENGTH, NUM_CHUNKS, FIRST_PROGRAM, FIRST_PARTIAL = range(7)
FIRST_UNIT, FIRST_SPLIT, ALIGNED = 7, 8, 9
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_ALIGNED = 16  # bytes: the widest load
WIDEST = 8  # elements: as many of 16 bits as the widest load has
PER_PROGRAM = 1 << 15  # elements that one program reads at most


class Tile(NamedTuple):
    """The block of a matrix that a program reads at a time: `outer` by `inner` elements.

    Attributes:
        reads: blocks that are read before they are added up: as many loads are under way.
        columns: units are columns.
    """

    outer: int
    inner: int
    reads: int
    columns: bool

    @property
    def num_units(self) -> int:
        return self.inner if self.columns else self.outer

    @property
    def chunk(self) -> int:
        """Elements of one unit that a program reads at most."""
        return PER_PROGRAM // self.num_units


# By arithmetic, not yet by measurement: a block gives each thread of 128 one load of 16 bytes of 16
# bits. Short units share a warp, others have one of their own, and long ones the whole program.
SHORT, MEDIUM, LONG = Tile(32, 32, 1, False), Tile(4, 256, 4, False), Tile(1, 1024, 4, False)
NARROW, BROAD = Tile(128, 8, 4, True), Tile(16, 64, 4, True)


class Matrix(NamedTuple):
    """A tensor as a matrix; see the module."""

    stride: int
    num_units: int
    length: int
    columns: bool

    @property
    def tile(self) -> Tile:
        if self.columns:
            return NARROW if self.num_units <= NARROW.inner else BROAD
        if self.length <= 4 * SHORT.inner:
            return SHORT
        return MEDIUM if self.length <= 4096 else LONG

    def is_aligned(self, address: int) -> bool:
        """Whether loads of 16 bytes reach all, and nothing else."""
        inner = self.num_units if self.columns else self.length
        return not (address % _ALIGNED or self.stride % WIDEST or inner % WIDEST)


class Launch(NamedTuple):
    """The programs of one dtype and tile. owners: of each the index of its tensor; int32."""

    dtype: torch.dtype
    tile: Tile
    owners: Tensor


class UnitTable(NamedTuple):
    """A list of tensors on their device.

    Attributes:
        rows: for each tensor what the constants above name: its address and matrix; in how many
            chunks each of its units is split; the first of its programs, within its launch; where
            its partial numbers begin; the first of its units, and of its split units, among all.
        split: of each unit that several programs read, the index of its tensor; int32.
        num_units: of all tensors.
        num_partials: one for each unit, and behind them one for each chunk of split units.
        others: the indices of the tensors that a table cannot hold, because of their dtype or of
            gaps between their elements.
        units: the first unit of each tensor, and their number.

    Shapes: rows: [num, ROW_SIZE], int64.
    """

    rows: Tensor
    launches: Sequence[Launch]
    split: Tensor
    num_units: int
    num_partials: int
    others: Sequence[int]
    units: Sequence[slice]


def unit_table(tensors: Sequence[Tensor], dims: Sequence[int | None]) -> UnitTable:
    """The table of tensors of one device. It keeps none of them alive.

    It is kept while addresses, shapes and strides stay, and uploaded without a wait for the device
    when they change. A CUDA graph under capture gets its own table.
    """
    device = tensors[0].device
    entries = tuple(
        [
            (t.data_ptr(), t.dtype, t.shape, t.stride(), dim)
            for t, dim in zip(tensors, dims, strict=True)
        ]
    )
    if device.type != "cuda":
        return _kept(device, 0, entries)
    if torch.cuda.is_current_stream_capturing():
        return _new(device, entries)
    # Only the stream that uploaded a table may read it without a wait.
    return _kept(device, torch.cuda.current_stream(device).cuda_stream, entries)


def matrix(shape: Sequence[int], strides: Sequence[int], dim: int | None) -> Matrix | None:
    """The matrix whose units are the indices of `dim`; None if the tensor is no such matrix."""
    unit = None if dim is None else dim % len(shape)
    num_units = 1 if unit is None else shape[unit]
    rest = [(strides[i], size) for i, size in enumerate(shape) if i != unit and size != 1]
    length, step = 1, 1
    for stride, size in sorted(rest):
        if length == 1:
            step = stride
        elif stride != step * length:
            return None
        length *= size
    stride = 0 if unit is None or num_units == 1 else strides[unit]
    if step == 1 or length <= 1:
        return Matrix(stride, num_units, length, False)
    if stride == 1 or num_units == 1:
        return Matrix(step, num_units, length, True)
    return None


def tile_of(tensor: Tensor, dim: int | None) -> Tile | None:
    """The tile of a tensor's units; None if a table cannot hold it."""
    found = matrix(tensor.shape, tensor.stride(), dim)
    return None if found is None or tensor.dtype not in DTYPES else found.tile


_Entry = tuple[int, torch.dtype, Sequence[int], Sequence[int], int | None]


@lru_cache(maxsize=16)
def _kept(device: torch.device, stream: int, entries: tuple[_Entry, ...]) -> UnitTable:
    return _new(device, entries)


def _new(device: torch.device, entries: tuple[_Entry, ...]) -> UnitTable:
    programs: dict[tuple[torch.dtype, Tile], list[_Owned]] = {}
    split: list[_Owned] = []
    rows: list[list[int]] = []
    others: list[int] = []
    units: list[slice] = []
    num_units = sum(1 if dim is None else shape[dim] for _, _, shape, _, dim in entries)
    first = 0
    num_partials = num_units
    for i, (address, dtype, shape, strides, dim) in enumerate(entries):
        found = matrix(shape, strides, dim)
        count = 1 if dim is None else shape[dim]
        if found is None or dtype not in DTYPES:
            others.append(i)
            rows.append([0] * ROW_SIZE)
        else:
            tile = found.tile
            num_chunks = max(1, -(-found.length // tile.chunk))
            owned = programs.setdefault((dtype, tile), [])
            first_program = _own(owned, i, -(-count // tile.num_units) * num_chunks)
            first_partial, first_split = first, 0
            if num_chunks > 1:
                first_partial, first_split = num_partials, _own(split, i, count)
                num_partials += count * num_chunks
            row = [address, found.stride, count, found.length, num_chunks, first_program]
            aligned = int(found.is_aligned(address))
            rows.append([*row, first_partial, first, first_split, aligned])
        units.append(slice(first, first + count))
        first += count
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    owners = [_owners(owned) for owned in [*programs.values(), split]]
    padded = [nn.functional.pad(each, (0, -len(each) % 4)) for each in owners]  # to 16 bytes
    uploaded = upload(torch.cat([table.view(torch.int32).flatten(), *padded]), device)
    parts = torch.split(uploaded, [2 * table.numel(), *map(len, padded)])
    there = [part[: len(each)] for part, each in zip(parts[1:], owners, strict=True)]
    launches = [Launch(*key, each) for key, each in zip(programs, there[:-1], strict=True)]
    return UnitTable(
        parts[0].view(torch.int64).view(table.shape),
        [launch for launch in launches if len(launch.owners)],
        there[-1],
        num_units,
        num_partials,
        others,
        units,
    )


class _Owned(NamedTuple):
    """How many programs belong to the tensor of an index, and how many to it and those before."""

    owner: int
    num: int
    end: int


def _own(owned: list[_Owned], owner: int, num: int) -> int:
    """Appends `num` programs of a tensor, and returns the first."""
    first = owned[-1].end if owned else 0
    owned.append(_Owned(owner, num, first + num))
    return first


def _owners(owned: Sequence[_Owned]) -> Tensor:
    owner, num, _ = torch.tensor(owned, dtype=torch.int64, device="cpu").view(-1, 3).unbind(1)
    return owner.int().repeat_interleave(num)
