"""Every tensor of the whole model by name, and what this rank steps of it.

Ranks of other pipeline stages and with other experts hold nothing of a tensor but list it: norms
per tensor, and what policies remember of them, are then the same on all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from distclip.adapters.megatron.held_params import FlatRange, HeldParam
from distclip.adapters.megatron.names import global_names
from distclip.adapters.megatron.rank_groups import RankGroups
from distclip.sharding import BlockShard, FlatShard, Layout, ParamShard
from distclip.sharding.shard import FlatBlockShard

AXIS = "world"  # all ranks: each parameter says which of them count it


@dataclass(frozen=True)
class ModelShard:
    """One tensor of the model.

    Attributes:
        stepped: the tensor that the inner optimizer steps; None where this rank has nothing of it.
        counted: this rank adds the elements to the total.
    """

    shard: ParamShard
    stepped: Tensor | None
    counted: bool

    @property
    def layout(self) -> Layout:
        return Layout(frozenset({AXIS}), parts=(self.shard,), counted=self.counted)


class _Listed(NamedTuple):
    """What the other ranks learn of a tensor."""

    shard: ParamShard
    is_tied: bool
    is_tied_copy: bool


def model_shards(
    held: Sequence[HeldParam], chunks: Iterable[Any], groups: RankGroups, by_layer: bool
) -> list[ModelShard]:
    """The tensors of the whole model, in the same order on every rank.

    Args:
        by_layer: ranks that differ in their data alone step different parameters.

    Collective: all-gathers of names and shapes, over the ranks with other experts and over each
        pipeline; with a layer-wise optimizer over the data-parallel ranks too.
    """
    names = global_names(held, chunks, groups)
    own = {
        name: _Listed(_param_shard(name, one, groups), one.is_tied, one.is_tied_copy)
        for name, one in zip(names, held, strict=True)
    }
    stage = {name: one._replace(shard=_emptied(one.shard)) for name, one in own.items()}
    owners = [groups.data_group, groups.expert_data_group] if by_layer else []
    for group in (*owners, groups.experts):
        for other in _gathered(stage, group):
            stage = other | stage
        stage = dict(sorted(stage.items()))
    stages = _gathered(stage, groups.pipe)
    renamed = _renamed(stages)
    everything: dict[str, ParamShard] = {}
    for index, listed in enumerate(stages):
        for name, one in listed.items():
            shard = replace(one.shard, name=renamed[index, name])
            known = everything.setdefault(shard.name, shard)
            # A weight tied between stages may be cut at other elements in each.
            everything[shard.name] = _with_boundaries_of(known, shard)
    mine = {renamed[groups.stage, name]: i for i, name in enumerate(names)}
    found: list[ModelShard] = []
    for name, shard in everything.items():
        if (index := mine.get(name)) is None:
            found.append(ModelShard(shard, None, False))
            continue
        whole = replace(own[names[index]].shard, name=name)
        found.append(
            ModelShard(
                _with_boundaries_of(whole, shard),
                held[index].stepped,
                _is_counted(held[index], groups),
            )
        )
    return found


def _gathered(listed: dict[str, _Listed], group: dist.ProcessGroup) -> list[dict[str, _Listed]]:
    everyone: list[dict[str, _Listed]] = [listed] * dist.get_world_size(group)
    if len(everyone) > 1:
        dist.all_gather_object(everyone, listed, group=group)
    return everyone


def _renamed(stages: Sequence[dict[str, _Listed]]) -> dict[tuple[int, str], str]:
    """The name in the whole model of each name in each stage.

    A tied copy has the name of what it is a copy of. What several stages call alike is different.
    """
    originals = {
        one.shard.global_shape: name
        for listed in stages
        for name, one in listed.items()
        if one.is_tied and not one.is_tied_copy
    }
    uses = Counter(
        name for listed in stages for name, one in listed.items() if not one.is_tied_copy
    )
    renamed: dict[tuple[int, str], str] = {}
    for index, listed in enumerate(stages):
        for name, one in listed.items():
            if one.is_tied_copy:
                renamed[index, name] = originals.get(one.shard.global_shape, name)
            else:
                renamed[index, name] = f"{name}@pp{index}" if uses[name] > 1 else name
    return renamed


def _is_counted(held: HeldParam, groups: RankGroups) -> bool:
    """Whether this rank is the one that counts, of those that hold the same elements."""
    is_first = held.is_split or groups.tensor_ranks(held.is_expert)[0] == dist.get_rank()
    return held.is_first and is_first and not held.is_tied_copy


def _param_shard(name: str, held: HeldParam, groups: RankGroups) -> ParamShard:
    """What of the whole tensor lies here, as its own values."""
    shape = tuple(held.param.shape)
    elsewhere = held.is_owned or groups.num_stages > 1
    elsewhere |= held.is_expert and groups.num_expert_ranks > 1
    flat = held.flat
    if flat is not None and elsewhere and not flat.boundaries:
        flat = replace(flat, boundaries=(prod(shape),))
    ranks = groups.tensor_ranks(held.is_expert)
    if not held.is_split or len(ranks) == 1:
        if flat is not None:
            return ParamShard(name, prod(shape), _flat_shard(shape, flat))
        block = BlockShard.whole(shape, frozenset({0} if elsewhere else ()))
        return ParamShard(name, prod(shape), block)
    dim = held.param.partition_dim
    whole = tuple(size * len(ranks) if i == dim else size for i, size in enumerate(shape))
    index = list(ranks).index(dist.get_rank())
    if flat is not None and dim == 0:  # the parts follow each other
        return ParamShard(name, prod(whole), _flat_rows(whole, flat, prod(shape), index))
    offsets = tuple(size * index if i == dim else 0 for i, size in enumerate(shape))
    block = BlockShard(whole, offsets, shape, frozenset({dim}))
    if flat is None:
        return ParamShard(name, prod(whole), block)
    return ParamShard(name, prod(whole), FlatBlockShard(block, _flat_shard(shape, flat)))


def _flat_shard(shape: tuple[int, ...], flat: FlatRange) -> FlatShard:
    return FlatShard(shape, flat.start, 0, flat.numel, flat.boundaries)


def _flat_rows(whole: tuple[int, ...], flat: FlatRange, numel: int, index: int) -> FlatShard:
    """A range of one of the equal parts, each of `numel` elements, of dim 0."""
    inside = {0, *(b for b in flat.boundaries if b < numel)}
    starts = {numel * other + b for other in range(prod(whole) // numel) for b in inside}
    boundaries = tuple(sorted(starts - {0} | {prod(whole)}))
    return FlatShard(whole, numel * index + flat.start, 0, flat.numel, boundaries)


def _emptied(shard: ParamShard) -> ParamShard:
    """The same tensor on a rank that holds nothing of it."""
    own = shard.shard
    if isinstance(own, BlockShard):
        return replace(shard, shard=replace(own, sizes=(0,) * len(own.global_shape)))
    if isinstance(own, FlatShard):
        return replace(shard, shard=replace(own, start=0, numel=0))
    return replace(shard, shard=replace(own, flat=replace(own.flat, start=0, numel=0)))


def _with_boundaries_of(shard: ParamShard, other: ParamShard) -> ParamShard:
    if not (isinstance(shard.shard, FlatShard) and isinstance(other.shard, FlatShard)):
        return shard
    boundaries = tuple(sorted({*shard.shard.boundaries, *other.shard.boundaries}))
    return replace(shard, shard=replace(shard.shard, boundaries=boundaries))
