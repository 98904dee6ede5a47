"""Shards of a tensor, against a plain enumeration of its elements."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distclip.sharding import BlockShard, FlatShard, ParamShard
from distclip.sharding.shard import FlatBlockShard, UnitRange, UnitView

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
Shape = tuple[int, ...]
Units = dict[int, list[int]]  # by unit, the flat indices of its elements in the whole tensor


def unit_dims(shape: Shape) -> list[int | None]:
    """What policies ask for: the tensor as one unit, or the indices of its first or last dim."""
    return [None] if len(shape) < 2 else [None, 0, len(shape) - 1]


def units_of(elements: Iterable[int], shape: Shape, dim: int | None) -> Units:
    found: Units = {}
    for element in sorted(elements):
        unit = 0 if dim is None else int(torch.unravel_index(torch.tensor(element), shape)[dim])
        found.setdefault(unit, []).append(element)
    return found


def viewed_units(views: Iterable[UnitView]) -> Units:
    found: Units = {}
    for view in views:
        rows = [view.values] if view.dim is None else view.values.unbind(view.dim)
        for unit, row in enumerate(rows, view.first):
            found.setdefault(unit, []).extend(row.flatten().tolist())
    return {unit: sorted(elements) for unit, elements in sorted(found.items())}


def check_range(units: Units, given: UnitRange) -> None:
    assert set(units) <= set(range(given.first, given.first + given.count))


def units_on_several_ranks(ranks: Sequence[Units]) -> list[int]:
    held_by = Counter(itertools.chain.from_iterable(ranks))
    return sorted(unit for unit, count in held_by.items() if count > 1)


@st.composite
def flat_shards(draw: st.DrawFn) -> tuple[Shape, list[FlatShard]]:
    """A tensor in a flat buffer that is cut at any indices; some ranks hold nothing of it."""
    shape = draw(SHAPES)
    numel = prod(shape)
    cuts = sorted(draw(st.lists(st.integers(0, numel), max_size=4)))
    beyond = draw(st.lists(st.integers(numel, numel + 3), max_size=1))  # of ranks that hold nothing
    boundaries = (*(cut for cut in cuts if cut), *beyond)
    shards: list[FlatShard] = []
    for start, end in itertools.pairwise([0, *cuts, numel]):
        before = draw(st.integers(0, 2)) if end > start else 0  # elements of another tensor
        shards.append(FlatShard(shape, start, before, end - start, boundaries))
    return shape, shards


def flat_values(shard: FlatShard) -> Tensor:
    """The parameter on the rank. Each element is its index in the whole tensor, -1 in others."""
    others = torch.full((shard.offset,), -1)
    own = torch.arange(shard.start, shard.start + shard.numel)
    return torch.cat([others, own, torch.tensor([-1])])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(flat_shards())
def test_flat_shards_hold_each_element_in_its_unit(drawn: tuple[Shape, list[FlatShard]]) -> None:
    shape, shards = drawn
    for dim in unit_dims(shape):
        for shard in shards:
            units = units_of(range(shard.start, shard.start + shard.numel), shape, dim)
            assert viewed_units(shard.unit_views(flat_values(shard), dim)) == units
            check_range(units, shard.unit_range(dim))
            if dim == 0:  # slots are made for these: none too many
                assert shard.unit_range(dim).count == len(units)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(flat_shards())
def test_every_rank_knows_which_units_of_flat_shards_are_cut(
    drawn: tuple[Shape, list[FlatShard]],
) -> None:
    shape, shards = drawn
    for dim in unit_dims(shape):
        held = [units_of(range(s.start, s.start + s.numel), shape, dim) for s in shards]
        several = units_on_several_ranks(held)
        known = {tuple(shard.cut_units(dim)) for shard in shards}
        assert len(known) == 1
        (cut,) = known
        assert list(cut) == sorted(set(cut))
        if dim == 0:
            assert list(cut) == several
        else:
            assert set(several) <= set(cut)
        if all(len(units) in (0, prod(shape)) for units in held) and dim is not None:
            assert set(several) == set()


@st.composite
def block_shards(draw: st.DrawFn) -> tuple[Shape, list[BlockShard]]:
    """A tensor cut into blocks along some dims, into uneven and empty ones too."""
    shape = draw(SHAPES)
    cuts = [[0, *sorted(draw(st.lists(st.integers(0, size), max_size=2))), size] for size in shape]
    sharded = frozenset(dim for dim, points in enumerate(cuts) if len(points) > 2)
    blocks: list[BlockShard] = []
    for ranges in itertools.product(*map(itertools.pairwise, cuts)):
        offsets, ends = zip(*ranges, strict=True)
        sizes = tuple(end - start for start, end in ranges)
        blocks.append(BlockShard(shape, offsets, sizes, sharded))
        assert ends == tuple(o + s for o, s in zip(offsets, sizes, strict=True))
    return shape, blocks


def block_values(shard: BlockShard) -> Tensor:
    whole = torch.arange(prod(shard.global_shape)).view(shard.global_shape)
    ranges = zip(shard.offsets, shard.sizes, strict=True)
    return whole[tuple(slice(start, start + size) for start, size in ranges)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(block_shards())
def test_block_shards_hold_each_element_in_its_unit(drawn: tuple[Shape, list[BlockShard]]) -> None:
    shape, shards = drawn
    for dim in unit_dims(shape):
        held: list[Units] = []
        for shard in shards:
            values = block_values(shard)
            held.append(units_of(values.flatten().tolist(), shape, dim))
            assert viewed_units(shard.unit_views(values, dim)) == held[-1]
            check_range(held[-1], shard.unit_range(dim))
        several = units_on_several_ranks(held)
        (cut,) = {tuple(shard.cut_units(dim)) for shard in shards}
        assert set(several) <= set(cut)
        assert list(cut) in ([], list(range(1 if dim is None else shape[dim])))
        if not shards[0].sharded_dims or shards[0].sharded_dims == {dim}:
            assert list(cut) == []  # a unit lies on one rank, and its norm is not reduced


@pytest.mark.parametrize(("dim", "cut"), [(None, [0]), (0, [0, 1, 2]), (1, [0, 1])])
def test_every_unit_may_be_cut_where_the_sharded_dim_is_unknown(
    dim: int | None, cut: list[int]
) -> None:
    assert list(BlockShard.whole((3, 2), sharded_dims=None).cut_units(dim)) == cut


def test_an_empty_tensor_has_no_units() -> None:
    shard = FlatShard((0, 3), 0, 0, 0, (0,))
    for dim in (0, 1):
        assert not list(shard.unit_views(torch.empty(0), dim))
        assert not list(shard.cut_units(dim))
    assert shard.unit_range(0) == UnitRange(0, 0)


def test_a_flat_shard_on_one_rank_needs_no_reduction() -> None:
    shard = FlatShard((2, 3), 0, 4, 6, ())
    assert [list(shard.cut_units(dim)) for dim in (None, 0, 1)] == [[], [], []]


def test_a_rank_without_elements_takes_part_in_the_norm_of_the_tensor() -> None:
    """Policies remember norms of tensors: these must be the same on all ranks."""
    shard = FlatShard((2, 3), 0, 0, 0, (6,))
    assert shard.unit_range(None) == UnitRange(0, 1)
    assert list(shard.cut_units(None)) == [0]
    assert list(shard.cut_units(0)) == []


@pytest.mark.parametrize("boundaries", [(), (1,)], ids=["whole block", "cut block"])
def test_a_part_of_a_block_is_cut_where_the_block_or_the_tensor_is(
    boundaries: tuple[int, ...],
) -> None:
    """The block of tensor parallelism cuts rows, the flat range cuts the block."""
    block = BlockShard((4, 3), (0, 1), (4, 1), frozenset({1}))
    shard = FlatBlockShard(block, FlatShard((4, 1), 0, 0, 4, boundaries))
    assert [list(shard.cut_units(dim)) for dim in (None, 0)] == [[0], [0, 1, 2, 3]]
    columns = [0, 1, 2] if boundaries else []  # each column lies in one block
    assert list(shard.cut_units(1)) == columns


def test_the_global_shape_is_that_of_the_shard() -> None:
    assert ParamShard("weight", 6, BlockShard.whole((2, 3))).global_shape == (2, 3)
    assert BlockShard.whole((2, 3)) == BlockShard((2, 3), (0, 0), (2, 3))
