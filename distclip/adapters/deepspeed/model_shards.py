"""Every tensor of the whole model, by name, and what this rank holds of it.

Ranks in other pipeline stages and with other experts hold nothing of a tensor, but know it: norms by tensor, and what
policies remember of them, are then the same on all ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch.distributed as dist
from torch import nn

from distclip.adapters.deepspeed.partitions import Fragment, Partition
from distclip.sharding import BlockShard, FlatShard, Layout, ParamShard

AXIS = "world"  # all ranks in a row: which of them hold copies is known here, parameter by parameter
_EXPERT = re.compile(r"(.*\.deepspeed_experts\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Place:
    """One tensor of the model.

    Attributes:
        at: the partition and the fragment that hold it on this rank; None where nothing of it lies here.
        counted: this rank adds these elements to the total.
    """

    part: ParamShard
    at: tuple[int, int] | None
    counted: bool

    @property
    def layout(self) -> Layout:
        return Layout(frozenset({AXIS}), parts=(self.part,), counted=self.counted)


@dataclass(frozen=True)
class Ranks:
    """The groups of this rank: those that split tensors, hold other layers, hold copies of whole parameters."""

    tensor: Sequence[int]
    pipe: Any
    data: Sequence[int]
    experts: dict[str, Sequence[int]]
    experts_data: dict[str, Sequence[int]]


def places(engine: Any, found: Sequence[Partition]) -> list[Place]:
    """The tensors of the whole model, in the same order on every rank.

    Collective: with pipeline stages, an all-gather of names and shapes over each pipeline.
    """
    ranks = _ranks_of(engine)
    names = {id(param): name for name, param in engine.module.named_parameters()}
    counts = _expert_counts(names.values())
    own: dict[str, Place] = {}
    for i, partition in enumerate(found):
        for j, fragment in enumerate(partition.fragments):
            name = names.get(id(fragment.param), f"#{i}.{j}")
            for place in _of_fragment(name, fragment, (i, j), partition.ranks, ranks, counts):
                own[place.part.name] = place
    return list(own.values()) if ranks.pipe is None else _with_other_stages(own, ranks.pipe)


def nothing_apart(engine: Any, found: Sequence[Partition]) -> bool:
    """Whether every rank holds all of the model, so that there is nothing to declare."""
    ranks = _ranks_of(engine)
    apart = len(ranks.tensor) > 1 or ranks.pipe is not None or any(len(line) > 1 for line in ranks.experts.values())
    return not apart and all(fragment.whole for partition in found for fragment in partition.fragments)


def _of_fragment(
    name: str,
    fragment: Fragment,
    at: tuple[int, int],
    sharing: Sequence[int],
    ranks: Ranks,
    counts: dict[str, int],
) -> Iterator[Place]:
    """The tensor of a fragment; of an expert also those at its place on the ranks that have other experts."""
    param: Any = fragment.param
    kind = getattr(param, "group_name", None) if not getattr(param, "allreduce", True) else None
    line: Sequence[int] = () if kind is None else ranks.experts[kind]
    part, copies = _part(fragment, ranks, elsewhere=ranks.pipe is not None or len(line) > 1)
    data = ranks.data if kind is None else ranks.experts_data[kind]
    first_of = [data] if fragment.whole else []
    if copies and not set(sharing) >= set(ranks.tensor):
        first_of.append(ranks.tensor)
    me = dist.get_rank()
    counted = not getattr(param, "ds_pipe_replicated", False) and all(group[0] == me for group in first_of)
    if len(line) < 2:
        yield Place(replace(part, name=name), at, counted)
        return
    for index, rank in enumerate(line):
        here = replace(part, name=_name_of_expert(name, index, counts))
        yield Place(here, at, counted) if rank == me else Place(_emptied(here), None, False)


def _part(fragment: Fragment, ranks: Ranks, elsewhere: bool) -> tuple[ParamShard, bool]:
    """What of the whole tensor lies here, as its own values, and whether tensor-parallel ranks hold copies."""
    param: Any = fragment.param
    numel = prod(fragment.shape)
    beyond = (numel,) if elsewhere else ()  # ranks that hold nothing of it begin behind its end
    if len(ranks.tensor) > 1 and (
        getattr(param, "model_parallel", False) or getattr(param, "tensor_model_parallel", False)
    ):
        return _tensor_parallel(fragment, ranks), False
    if fragment.whole:
        cut = frozenset({0} if elsewhere else ())
        box = BlockShard(fragment.shape, (0,) * len(fragment.shape), fragment.shape, cut)
        return ParamShard("", numel, box), True
    return ParamShard(
        "", numel, FlatShard(fragment.shape, fragment.first, 0, fragment.size, fragment.boundaries + beyond)
    ), True


def _tensor_parallel(fragment: Fragment, ranks: Ranks) -> ParamShard:
    """A tensor that is split over tensor-parallel ranks too: along dim 0 its runs follow each other."""
    size, numel = len(ranks.tensor), prod(fragment.shape)
    if getattr(fragment.param, "partition_dim", None) != 0 or getattr(fragment.param, "partition_stride", 1) != 1:
        none = (0,) * len(fragment.shape)
        return ParamShard("", numel * size, BlockShard(fragment.shape, none, fragment.shape, sharded_dims=None))
    before = numel * list(ranks.tensor).index(dist.get_rank())
    inside = {b for b in fragment.boundaries if 0 < b < numel}
    begins = {numel * index + b for index in range(size + 1) for b in {0, *inside}}
    shape = (fragment.shape[0] * size, *fragment.shape[1:])
    boundaries = tuple(sorted(b for b in begins if 0 < b <= numel * size))
    return ParamShard("", numel * size, FlatShard(shape, before + fragment.first, 0, fragment.size, boundaries))


def _emptied(part: ParamShard) -> ParamShard:
    piece = part.shard
    if isinstance(piece, BlockShard):
        return replace(part, shard=replace(piece, sizes=(0,) * len(piece.global_shape)))
    return replace(part, shard=replace(piece, start=0, numel=0))


def _expert_counts(names: Any) -> dict[str, int]:
    """How many experts of each layer lie on one rank."""
    counts: dict[str, int] = {}
    for found in filter(None, map(_EXPERT.fullmatch, names)):
        counts[found[1]] = max(counts.get(found[1], 0), int(found[2]) + 1)
    return counts


def _name_of_expert(name: str, rank: int, counts: dict[str, int]) -> str:
    """The name that it would have if one rank held all experts, as in DeepSpeed's checkpoints."""
    found = _EXPERT.fullmatch(name)
    if found is None:
        return f"{name}@{rank}"
    return f"{found[1]}{rank * counts[found[1]] + int(found[2])}{found[3]}"


def _with_other_stages(own: dict[str, Place], pipe: Any) -> list[Place]:
    everyone: list[list[ParamShard]] = [[] for _ in range(dist.get_world_size(pipe))]
    mine = [_emptied(place.part) for place in own.values()]
    dist.all_gather_object(everyone, mine, group=pipe)
    whole: dict[str, ParamShard] = {}
    for part in (part for stage in everyone for part in stage):
        known = whole.setdefault(part.name, part)
        if isinstance(known.shard, FlatShard) and isinstance(part.shard, FlatShard):
            # A weight tied between stages is cut at other places in each.
            both = tuple(sorted({*known.shard.boundaries, *part.shard.boundaries}))
            whole[part.name] = replace(known, shard=replace(known.shard, boundaries=both))
    return [_joined(part, own.get(name)) for name, part in whole.items()]


def _joined(part: ParamShard, own: Place | None) -> Place:
    if own is None:
        return Place(part, None, False)
    if isinstance(part.shard, FlatShard) and isinstance(own.part.shard, FlatShard):
        piece = replace(own.part.shard, boundaries=part.shard.boundaries)
        return replace(own, part=replace(own.part, shard=piece))
    return own


def _ranks_of(engine: Any) -> Ranks:
    pipe = _asked(engine.mpu, "get_pipeline_model_parallel_group", "get_pipe_parallel_group")
    tensor = _asked(
        engine.mpu, "get_tensor_model_parallel_group", "get_slice_parallel_group", "get_model_parallel_group"
    )
    listed = dist.get_process_group_ranks
    return Ranks(
        [dist.get_rank()] if tensor is None else listed(tensor),
        pipe if pipe is not None and len(listed(pipe)) > 1 else None,
        listed(engine.seq_data_parallel_group),
        _listed(engine.expert_parallel_group),
        _listed(engine.expert_data_parallel_group),
    )


def _listed(groups: dict[str, Any] | None) -> dict[str, Sequence[int]]:
    return {name: dist.get_process_group_ranks(group) for name, group in (groups or {}).items()}


def _asked(mpu: Any, *methods: str) -> Any:
    """The answer of the first method that there is: as newer Megatrons, DeepSpeed's own grid and older ones call it."""
    return next((getattr(mpu, name)() for name in methods if hasattr(mpu, name)), None)


def module_names(module: nn.Module, inside: nn.Module) -> list[str]:
    """The names in `module` of the parameters of one of its modules."""
    wanted = {id(param) for param in inside.parameters()}
    return [name for name, param in module.named_parameters() if id(param) in wanted]
