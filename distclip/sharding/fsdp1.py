"""Reads FullyShardedDataParallel (FSDP1), whose layout lies on its modules, under private names.

Goes when torch removes FSDP1. Every name is read as an attribute without a default. Where a name
was absent, two could pass for a layout, and the norm would silently be that of one shard: the mark
of flattened parameters and the process group across replicas. Both raise where torch lacks them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, repeat
from math import prod
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distclip.errors import LayoutError
from distclip.sharding.dtensor import layout_on, ranks_by_axis
from distclip.sharding.names import bare_names
from distclip.sharding.shard import BlockShard, FlatBlockShard, FlatShard, ParamShard
from distclip.sharding.tensor_layout import ParamReader, TensorLayout


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


def wrapper_class() -> Any:
    """`FullyShardedDataParallel`; None where torch has been built without torch.distributed."""
    if not dist.is_available():
        return None
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel


def check_root(module: object) -> None:
    """Raises where `module` is an FSDP1 unit inside another, as FSDP1's own `clip_grad_norm_`.

    Raises:
        NotRootError: the gradients of the other units would keep their size.
    """
    if not _may_be_used():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    # None before the first forward. The public `check_is_root()` would then make a unit a root.
    if isinstance(module, FullyShardedDataParallel) and cast(Any, module)._is_root is False:
        raise NotRootError(
            "cannot clip the gradients of one unit of a model: `clip_grad_norm_()` should only be "
            "called on the root FSDP instance, because the norm is that of the whole model, and "
            "the other units would not be clipped. Pass the whole wrapped model, or a Clipper "
            "with a parameter group for each part."
        )


class NotRootError(LayoutError, RuntimeError):
    """As torch, which raises a RuntimeError."""


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

    bare_name = bare_names(module)
    for path, inner in cast("Iterator[tuple[str, nn.Module]]", module.named_modules()):
        if isinstance(inner, FullyShardedDataParallel) and cast(Any, inner)._handle is not None:
            names = [
                bare_name(f"{path}.{fqn}") for fqn in cast(Any, inner)._handle.flat_param._fqns
            ]
            yield from _layouts_of_unit(inner, names)


def _layouts_of_unit(unit: Any, names: Sequence[str]) -> Iterator[tuple[int, TensorLayout]]:
    """A flat parameter has one layout; original parameters, which are views of it, one each."""
    flat = unit._handle.flat_param
    each = list(_layouts_of_tensors(unit, names))
    if flat._params is not None:
        # A tied parameter, one of `_shared_params`, is one of `_params` as well.
        yield from zip(map(id, flat._params), each, strict=True)
        return
    if len({(layout.sharded, *layout.ranks_by_axis) for layout in each}) > 1:
        raise LayoutError(
            f"cannot count the flat parameter of {names[0]!r} and {len(names) - 1} others: "
            f"FullyShardedDataParallel has flattened tensors that lie on their ranks in different "
            f"ways, because tensor parallelism shards some of them only, and a rank counts a flat "
            f"parameter as a whole or not at all. Wrap the model with `use_orig_params=True`."
        )
    shards = tuple(shard for layout in each for shard in layout.shards)
    yield id(flat), replace(each[0], shards=shards)


def _layouts_of_tensors(unit: Any, names: Sequence[str]) -> Iterator[TensorLayout]:
    """Of each tensor of a unit, by the axes of FSDP1 and those of tensor parallelism."""
    handle, flat = unit._handle, unit._handle.flat_param
    along_unit = _ranks_along_unit(unit)
    sharded = frozenset({"fsdp"} if handle.uses_sharded_strategy else ())
    device: torch.device = unit.compute_device
    found = _flat_shards(handle) if flat._params is None else _original_shards(handle)
    # DTensors lie in the flat parameter as their local values, and their specs beside it.
    for name, shard, spec in zip(names, found, flat._param_extensions, strict=True):
        if spec is None:
            of_tensor = ParamShard(name, prod(shard.global_shape), shard)
            yield TensorLayout((of_tensor,), along_unit, sharded, device)
            continue
        inner = layout_on(name, spec.shape, spec.mesh, spec.placements, ranks_by_axis(spec.mesh))
        (block,) = inner.shards
        if isinstance(shard, FlatShard):
            block = replace(block, shard=FlatBlockShard(cast(BlockShard, block.shard), shard))
        along = {**along_unit, **inner.ranks_by_axis}
        yield TensorLayout((block,), along, sharded | inner.sharded, device, spec.mesh)


def _ranks_along_unit(unit: Any) -> dict[str, list[int]]:
    along = {"fsdp": dist.get_process_group_ranks(unit.process_group)}
    if (replicas := _group_across_replicas(unit)) is not None:
        along["fsdp_replicate"] = dist.get_process_group_ranks(replicas)
    return along


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
