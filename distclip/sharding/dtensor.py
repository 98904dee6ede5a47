"""What a tensor or its wrapper tells of itself: the ranks that share it, and which part of it lies here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distclip.errors import LayoutError
from distclip.sharding.mesh import axis_names, numbers
from distclip.sharding.shard import BlockShard, FlatShard, ParamShard

# What wrappers put into the names of parameters: state is kept under the names of the bare model.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """What a tensor tells of itself.

    Attributes:
        parts: the tensors of the model that it holds elements of: several in a flat parameter, else one.
        lines: the ranks along each axis of its own mesh.
        sharded: those of these axes that shard it.
        device_type: where FSDP1 computes, and its process group works; offloaded parameters lie elsewhere.
    """

    parts: tuple[ParamShard, ...]
    lines: dict[str, list[int]] = field(default_factory=dict[str, "list[int]"])
    sharded: frozenset[str] = frozenset()
    device_type: str = "cpu"


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module under the names that they have in the bare model; each once."""
    while isinstance(module, DistributedDataParallel):
        module = cast(nn.Module, module.module)
    return ((bare(name), param) for name, param in module.named_parameters())


def bare(name: str) -> str:
    """The name of a parameter in the model without wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def read(name: str, param: Tensor, units: dict[int, TensorLayout]) -> TensorLayout:
    """Raises LayoutError where nothing on the tensor says how it is sharded."""
    if (own := units.get(id(param))) is not None:
        return own
    if isinstance(param, DTensor):
        return _dtensor(name, param)
    if getattr(param, "_fsdp_flattened", False):
        raise LayoutError(
            f"cannot tell which ranks hold {name!r}: FullyShardedDataParallel has flattened it, and nothing on the "
            f"tensor says how it is sharded, so that the norm would be that of this rank's shard alone. "
            f"Pass the wrapped module, for example `clip_grad_norm_(model, ...)`, instead of its parameters."
        )
    return TensorLayout((_whole(name, param),))


def _whole(name: str, param: Tensor) -> ParamShard:
    return ParamShard(name, param.numel(), BlockShard(tuple(param.shape), (0,) * param.ndim, tuple(param.shape)))


def _dtensor(name: str, param: DTensor) -> TensorLayout:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, here = param.device_mesh, param.device_mesh.get_coordinate()
    shape = tuple(param.shape)
    if here is None:  # not on its mesh: this rank holds no element of it
        return TensorLayout((ParamShard(name, param.numel(), BlockShard(shape, (0,) * len(shape), (0,) * len(shape))),))
    axes = axis_names(mesh)
    lines = {axis: numbers(mesh.mesh[(*here[:i], slice(None), *here[i + 1 :])]) for i, axis in enumerate(axes)}
    kinds = [(axis, p) for axis, p in zip(axes, param.placements, strict=True) if not _is_copy(p)]
    with torch.device("cpu"):  # it computes with tensors of the default device
        size, start = compute_local_shape_and_global_offset(shape, mesh, param.placements)
    cut = frozenset(cast(int, cast(Any, p).dim) for axis, p in kinds if len(lines[axis]) > 1)
    box = BlockShard(shape, tuple(start), tuple(size), cut)
    return TensorLayout((ParamShard(name, param.numel(), box),), lines, frozenset(axis for axis, _ in kinds))


def _is_copy(placement: Any) -> bool:
    return placement.is_replicate() or placement.is_partial()


def fsdp1_units(module: nn.Module) -> dict[int, TensorLayout]:
    """What every FSDP1 unit inside `module` tells of its parameters, by their id."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    found: dict[int, TensorLayout] = {}
    for name, inner in cast("Iterator[tuple[str, nn.Module]]", module.named_modules()):
        if isinstance(inner, FullyShardedDataParallel) and cast(Any, inner)._handle is not None:
            found.update(_fsdp1_unit(bare(f"{name}." if name else ""), inner))
    return found


def _fsdp1_unit(prefix: str, unit: Any) -> Iterator[tuple[int, TensorLayout]]:
    handle, flat = unit._handle, unit._handle.flat_param
    lines = {"fsdp": dist.get_process_group_ranks(unit.process_group)}
    if (across := getattr(unit, "_inter_node_pg", None)) is not None:
        lines["fsdp_replicate"] = dist.get_process_group_ranks(across)
    sharded = frozenset({"fsdp"} if handle.uses_sharded_strategy else ())
    parts = [
        ParamShard(bare(prefix + fqn), shape.numel(), run)
        for fqn, shape, run in zip(flat._fqns, flat._shapes, _runs(handle), strict=True)
    ]
    device_type = unit.compute_device.type
    if flat._params is None:
        yield id(flat), TensorLayout(tuple(parts), lines, sharded, device_type)
        return
    for param, part in zip(flat._params, parts, strict=True):
        # Original parameters are views of the flat one: their own values begin at 0.
        run = cast(FlatShard, part.piece)
        piece = FlatShard(run.shape, run.first, 0, run.size, run.boundaries) if sharded else _whole("", param).piece
        yield id(param), TensorLayout((ParamShard(part.name, part.numel, piece),), lines, sharded, device_type)
    for param in flat._shared_params:
        yield id(param), TensorLayout((_whole("shared", param),), lines, sharded, device_type)


def _runs(handle: Any) -> Iterator[FlatShard]:
    """Of each tensor in the flat parameter, the run that lies on this rank."""
    flat = handle.flat_param
    ends = accumulate(flat._numels_with_padding)
    kept = zip(ends, flat._numels_with_padding, flat._is_padding_mask, strict=True)
    begins = [end - numel for end, numel, padding in kept if not padding]
    if not handle.uses_sharded_strategy:
        yield from (FlatShard(tuple(s), 0, b, s.numel(), ()) for s, b in zip(flat._shapes, begins, strict=True))
        return
    every = flat._sharded_size.numel()
    for shape, begin, here in zip(flat._shapes, begins, flat._shard_param_infos, strict=True):
        boundaries = tuple(every * rank - begin for rank in range(1, handle.world_size))
        first, size = here.intra_param_start_idx or 0, here.numel_in_shard or 0
        yield FlatShard(tuple(shape), first, here.offset_in_shard or 0, size, boundaries)
