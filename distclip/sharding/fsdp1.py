"""Reads FullyShardedDataParallel (FSDP1), whose layout lies on its modules, under private names.

Goes when torch removes FSDP1. Every name is read as an attribute without a default. Where a name
was absent, two could pass for a layout, and the norm would silently be that of one shard: the mark
of flattened parameters and the process group across replicas. Both raise where torch lacks them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, repeat
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distclip.errors import LayoutError
from distclip.sharding.shard import BlockShard, FlatShard, ParamShard
from distclip.sharding.tensor_layout import ParamReader, TensorLayout, bare_name


def make_reader(modules: Sequence[nn.Module]) -> ParamReader:
    """A reader of the parameters of every FSDP1 unit in `modules`.

    It raises a LayoutError for a parameter of a unit that lies in none of them.
    """
    found = {key: layout for module in modules for key, layout in _layouts_in(module)}
    mark = _flattened_mark()

    def read(name: str, param: Tensor) -> TensorLayout | None:
        if (layout := found.get(id(param))) is not None:
            return layout
        if mark is not None and hasattr(param, mark) and not isinstance(param, DTensor):
            raise LayoutError(
                f"cannot tell which ranks hold {name!r}: FullyShardedDataParallel has flattened "
                f"it, and nothing on the tensor says how it is sharded. The norm would be that of "
                f"this rank's shard alone. Pass the wrapped module, for example "
                f"`clip_grad_norm_(model, ...)`, instead of its parameters."
            )
        return None

    return read


def any_flattened(params: Iterable[Tensor]) -> bool:
    """Whether FSDP1 has flattened one of the parameters."""
    mark = _flattened_mark()
    return mark is not None and any(map(hasattr, params, repeat(mark)))


def _flattened_mark() -> str | None:
    """The attribute of parameters that FSDP1 has flattened; None if nobody uses FSDP1.

    Raises:
        ImportError: this torch has FSDP1, but not the mark.
    """
    if not _may_be_used():
        return None
    try:
        from torch.distributed.fsdp._common_utils import FSDP_FLATTENED
    except ImportError as error:
        raise ImportError(_missing("FSDP_FLATTENED")) from error
    return FSDP_FLATTENED


def _may_be_used() -> bool:
    """Whether somebody has imported FSDP1: that takes 0.2 s, and a later torch may not have it."""
    return hasattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel")


def _missing(name: str) -> str:
    return (
        f"cannot read FullyShardedDataParallel: torch {torch.__version__} has no `{name}`, and "
        f"without it a shard would pass for a whole parameter. This version of distclip was tested "
        f"with torch 2.13. Use that torch, or `fully_shard` (FSDP2) in place of FSDP1."
    )


def _layouts_in(module: nn.Module) -> Iterator[tuple[int, TensorLayout]]:
    """The layout of every parameter of every FSDP1 unit in `module`, by the parameter's id."""
    if not _may_be_used():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    for name, inner in cast("Iterator[tuple[str, nn.Module]]", module.named_modules()):
        if isinstance(inner, FullyShardedDataParallel) and cast(Any, inner)._handle is not None:
            yield from _layouts_of_unit(inner, f"{name}." if name else "")


def _layouts_of_unit(unit: Any, prefix: str) -> Iterator[tuple[int, TensorLayout]]:
    """A flat parameter has one layout; original parameters, which are views of it, one each."""
    handle, flat = unit._handle, unit._handle.flat_param
    ranks_by_axis = _ranks_by_axis(unit)
    sharded = frozenset({"fsdp"} if handle.uses_sharded_strategy else ())
    device_type: str = unit.compute_device.type
    names = [bare_name(prefix + name) for name in flat._fqns]
    numels = [shape.numel() for shape in flat._shapes]
    if flat._params is None:
        shards = tuple(map(ParamShard, names, numels, _flat_shards(handle)))
        yield id(flat), TensorLayout(shards, ranks_by_axis, sharded, device_type)
        return
    # A tied parameter, one of `_shared_params`, is one of `_params` as well.
    shards = map(ParamShard, names, numels, _original_shards(handle))
    for param, shard in zip(flat._params, shards, strict=True):
        yield id(param), TensorLayout((shard,), ranks_by_axis, sharded, device_type)


def _ranks_by_axis(unit: Any) -> dict[str, list[int]]:
    ranks_by_axis = {"fsdp": dist.get_process_group_ranks(unit.process_group)}
    if (replicas := _group_across_replicas(unit)) is not None:
        ranks_by_axis["fsdp_replicate"] = dist.get_process_group_ranks(replicas)
    return ranks_by_axis


def _group_across_replicas(unit: Any) -> dist.ProcessGroup | None:
    """The process group of the ranks with copies of a unit's shard; None without HYBRID_SHARD."""
    if "_inter_node_pg" in vars(unit):
        return unit._inter_node_pg
    from torch.distributed.fsdp import ShardingStrategy

    strategies: Any = ShardingStrategy
    if unit.sharding_strategy in (strategies.HYBRID_SHARD, strategies._HYBRID_SHARD_ZERO2):
        raise RuntimeError(_missing("_inter_node_pg"))
    return None


def _original_shards(handle: Any) -> Iterator[BlockShard | FlatShard]:
    """What original parameters hold: their own values, which begin at 0."""
    for shard in _flat_shards(handle):
        shape, numel, boundaries = shard.global_shape, shard.numel, shard.boundaries
        if handle.uses_sharded_strategy:
            yield FlatShard(shape, shard.start, 0, numel, boundaries)
        else:
            yield BlockShard.whole(shape)


def _flat_shards(handle: Any) -> Iterator[FlatShard]:
    """For each tensor in the flat parameter, the range of its elements that lies on this rank."""
    flat = handle.flat_param
    starts = _starts(flat)
    if not handle.uses_sharded_strategy:
        for shape, start in zip(flat._shapes, starts, strict=True):
            yield FlatShard(tuple(shape), 0, start, shape.numel(), ())
        return
    step = flat._sharded_size.numel()
    infos = zip(flat._shapes, starts, flat._shard_param_infos, strict=True)
    for shape, start, here in infos:
        boundaries = tuple(step * rank - start for rank in range(1, handle.world_size))
        first, numel = here.intra_param_start_idx or 0, here.numel_in_shard or 0
        yield FlatShard(tuple(shape), first, here.offset_in_shard or 0, numel, boundaries)


def _starts(flat: Any) -> list[int]:
    """Where each tensor begins in the whole flat parameter, which has padding between some."""
    ends = accumulate(flat._numels_with_padding)
    listed = zip(ends, flat._numels_with_padding, flat._is_padding_mask, strict=True)
    return [end - numel for end, numel, is_padding in listed if not is_padding]
