"""Every tensor of the whole model by name, and what this rank holds of it.

Ranks of other pipeline stages and with other experts hold nothing of a tensor but list it: norms
per tensor, and what policies remember of them, are then the same on all ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from math import prod
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from distclip.adapters.deepspeed.param_slices import ParamSlice
from distclip.adapters.deepspeed.partitions import Partition
from distclip.adapters.deepspeed.rank_groups import RankGroups
from distclip.sharding import BlockShard, FlatShard, Layout, ParamShard

AXIS = "world"  # all ranks: each parameter says which of them count it
_EXPERT = re.compile(r"(?P<layer>.*\.deepspeed_experts\.)(?P<index>\d+)(?P<rest>\..*)")


class SliceIndex(NamedTuple):
    """`partitions[partition].slices[slice]`."""

    partition: int
    slice: int


@dataclass(frozen=True)
class ModelShard:
    """One tensor of the model.

    Attributes:
        index: the slice that holds it on this rank; None where this rank holds nothing of it.
        counted: this rank adds the elements to the total.
    """

    shard: ParamShard
    index: SliceIndex | None
    counted: bool

    @property
    def layout(self) -> Layout:
        return Layout(frozenset({AXIS}), parts=(self.shard,), counted=self.counted)


def is_replicated(engine: Any, partitions: Sequence[Partition]) -> bool:
    """Whether every rank holds all of the model: then there is nothing to declare."""
    are_whole = (one.is_whole for partition in partitions for one in partition.slices)
    return RankGroups.of(engine).are_copies and all(are_whole)


def model_shards(engine: Any, partitions: Sequence[Partition]) -> list[ModelShard]:
    """The tensors of the whole model, in the same order on every rank.

    Collective: with pipeline stages, an all-gather of names and shapes over each pipeline.
    """
    groups = RankGroups.of(engine)
    names = {param: name for name, param in engine.module.named_parameters()}
    experts = _ExpertNames(names.values())
    tied = _tied_copies(engine.module)
    own: dict[str, ModelShard] = {}
    for i, partition in enumerate(partitions):
        for j, held in enumerate(partition.slices):
            shard = _param_shard(names.get(held.param, f"#{i}.{j}"), held, groups)
            is_counted = held.param not in tied and _is_first(held, partition.ranks, groups)
            mine = ModelShard(shard, SliceIndex(i, j), is_counted)
            for one in _with_other_experts(mine, held.param, groups, experts):
                own[one.shard.name] = one
    return list(own.values()) if groups.pipe is None else _with_other_stages(own, groups.pipe)


def _tied_copies(module: nn.Module) -> set[Tensor]:
    """The parameters that another pipeline stage holds too, and counts."""
    pipe: Any = import_module("deepspeed.pipe")
    if not isinstance(module, pipe.PipelineModule):
        return set()
    tied_modules: Any = module.tied_modules
    return {param for param in tied_modules.parameters() if param.ds_pipe_replicated}


def _is_first(held: ParamSlice, sharing: Sequence[int], groups: RankGroups) -> bool:
    """Whether this rank is the first of those that hold the same elements."""
    same: list[Sequence[int]] = []
    if held.is_whole:
        kind = _expert_kind(held.param)
        same.append(groups.data if kind is None else groups.expert_data[kind])
    if not _is_split(held.param, groups) and not set(sharing) >= set(groups.tensor):
        same.append(groups.tensor)
    return all(ranks[0] == dist.get_rank() for ranks in same)


def _expert_kind(param: Any) -> str | None:
    """The group of experts that a parameter belongs to; None where every rank has the parameter."""
    return None if getattr(param, "allreduce", True) else param.group_name


def _is_split(param: Tensor, groups: RankGroups) -> bool:
    """Whether tensor-parallel ranks hold different parts of it."""
    names = ("model_parallel", "tensor_model_parallel")
    return len(groups.tensor) > 1 and any(getattr(param, name, False) for name in names)


def _param_shard(name: str, held: ParamSlice, groups: RankGroups) -> ParamShard:
    """What of the whole tensor lies here, as its own values."""
    shard, kind = held.shard, _expert_kind(held.param)
    numel = prod(shard.global_shape)
    if _is_split(held.param, groups):
        return _tensor_parallel_shard(name, held, groups)
    elsewhere = groups.pipe is not None or (kind is not None and len(groups.experts[kind]) > 1)
    if held.is_whole:
        sharded = frozenset({0} if elsewhere else ())
        return ParamShard(name, numel, _whole_block(shard.global_shape, sharded))
    # Ranks that hold nothing of it begin behind its end.
    boundaries = shard.boundaries + ((numel,) if elsewhere else ())
    return ParamShard(name, numel, replace(shard, offset=0, boundaries=boundaries))


def _tensor_parallel_shard(name: str, held: ParamSlice, groups: RankGroups) -> ParamShard:
    """A tensor that is split over tensor-parallel ranks too.

    Where they split dim 0 the parts follow each other, and the boundaries are known.
    """
    shard, num_ranks = held.shard, len(groups.tensor)
    shape, numel = shard.global_shape, prod(shard.global_shape)
    # Megatron sets these; what sets only `model_parallel` does not say which dim is split.
    stride = getattr(held.param, "partition_stride", 1)
    if getattr(held.param, "partition_dim", None) != 0 or stride != 1:
        return ParamShard(name, numel * num_ranks, _whole_block(shape, None))
    before = numel * list(groups.tensor).index(dist.get_rank())
    inside = {0, *(b for b in shard.boundaries if 0 < b < numel)}
    starts = {numel * index + b for index in range(num_ranks + 1) for b in inside}
    boundaries = tuple(sorted(b for b in starts if 0 < b <= numel * num_ranks))
    whole_shape = (shape[0] * num_ranks, *shape[1:])
    flat = FlatShard(whole_shape, before + shard.start, 0, shard.numel, boundaries)
    return ParamShard(name, numel * num_ranks, flat)


def _whole_block(shape: tuple[int, ...], sharded_dims: frozenset[int] | None) -> BlockShard:
    return BlockShard(shape, (0,) * len(shape), shape, sharded_dims)


def _emptied(shard: ParamShard) -> ParamShard:
    """The same tensor on a rank that holds nothing of it."""
    own = shard.shard
    if isinstance(own, BlockShard):
        return replace(shard, shard=replace(own, sizes=(0,) * len(own.global_shape)))
    return replace(shard, shard=replace(own, start=0, numel=0))


class _ExpertNames:
    """The names that experts would have if one rank held all, as in DeepSpeed's checkpoints."""

    def __init__(self, names: Iterable[str]) -> None:
        self._per_rank: dict[str, int] = {}  # by layer
        for found in filter(None, map(_EXPERT.fullmatch, names)):
            count = max(self._per_rank.get(found["layer"], 0), int(found["index"]) + 1)
            self._per_rank[found["layer"]] = count

    def on_rank(self, name: str, rank: int) -> str:
        """The name of what rank number `rank` of the experts' group calls `name`."""
        found = _EXPERT.fullmatch(name)
        if found is None:
            return f"{name}@{rank}"
        index = rank * self._per_rank[found["layer"]] + int(found["index"])
        return f"{found['layer']}{index}{found['rest']}"


def _with_other_experts(
    mine: ModelShard, param: Tensor, groups: RankGroups, experts: _ExpertNames
) -> Iterator[ModelShard]:
    """The tensor itself; of an expert also those that other ranks hold instead of it."""
    kind = _expert_kind(param)
    ranks: Sequence[int] = () if kind is None else groups.experts[kind]
    if len(ranks) < 2:
        yield mine
        return
    for index, rank in enumerate(ranks):
        shard = replace(mine.shard, name=experts.on_rank(mine.shard.name, index))
        if rank == dist.get_rank():
            yield replace(mine, shard=shard)
        else:
            yield ModelShard(_emptied(shard), None, False)


def _with_other_stages(own: dict[str, ModelShard], pipe: dist.ProcessGroup) -> list[ModelShard]:
    by_stage: list[list[ParamShard]] = [[] for _ in range(dist.get_world_size(pipe))]
    dist.all_gather_object(by_stage, [_emptied(one.shard) for one in own.values()], group=pipe)
    whole: dict[str, ParamShard] = {}
    for shard in (shard for stage in by_stage for shard in stage):
        known = whole.setdefault(shard.name, shard)
        # A weight tied between stages is cut at other elements in each.
        whole[shard.name] = _with_boundaries_of(known, shard)
    return [
        replace(own[name], shard=_with_boundaries_of(own[name].shard, shard))
        if name in own
        else ModelShard(shard, None, False)
        for name, shard in whole.items()
    ]


def _with_boundaries_of(shard: ParamShard, other: ParamShard) -> ParamShard:
    if not (isinstance(shard.shard, FlatShard) and isinstance(other.shard, FlatShard)):
        return shard
    boundaries = tuple(sorted({*shard.shard.boundaries, *other.shard.boundaries}))
    return replace(shard, shard=replace(shard.shard, boundaries=boundaries))


def module_names(module: nn.Module, inside: nn.Module) -> list[str]:
    """The names in `module` of the parameters of one of its modules."""
    wanted = set(inside.parameters())
    return [name for name, param in module.named_parameters() if param in wanted]
