"""Reads how this rank holds each parameter, and which ranks share the total norm.

A new kind of tensor or wrapper is one file with a `make_reader`, listed in `READERS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distclip.errors import LayoutError
from distclip.sharding import ddp, dtensor, fsdp1
from distclip.sharding.copies import check_copies
from distclip.sharding.layout import Layout, LayoutFunction, LocalParam
from distclip.sharding.mesh import ReduceMesh, check_mesh, widest_mesh
from distclip.sharding.names import bare_names
from distclip.sharding.rank_group import RankGroup
from distclip.sharding.shard import BlockShard, ParamShard
from distclip.sharding.tensor_layout import MakeReader, ParamReader, TensorLayout
from distclip.torch_private import with_real_values

# The first that recognises a tensor reads it. What none recognises is a plain tensor, whole here.
READERS: tuple[MakeReader, ...] = (fsdp1.make_reader, ddp.make_reader, dtensor.make_reader)


class ShardedParams(NamedTuple):
    """All parameters of this rank, and the ranks that their sums are reduced over.

    Attributes:
        reduce_mesh: None where no rank holds elements that another lacks: nothing is reduced then.
        mesh: the ranks that train together, where a mesh says it, even if nothing is reduced.
        ranks: those that train together, where a mesh or a DistributedDataParallel module says it.
        may_differ: ranks may hold other parameters than this one.
    """

    params: list[LocalParam]
    reduce_mesh: ReduceMesh | None
    mesh: ReduceMesh | None = None
    ranks: RankGroup | None = None
    may_differ: bool = False


@with_real_values()
def read_layouts(
    named: Sequence[tuple[str, Tensor]],
    modules: Sequence[nn.Module] = (),
    mesh: DeviceMesh | None = None,
    distinct: tuple[str, ...] = ("pp",),
    layouts: LayoutFunction | None = None,
    during_a_call: bool = False,
) -> ShardedParams:
    """How this rank holds each parameter, in the order of `named`.

    Args:
        modules: those that the parameters were taken from; FSDP1 keeps its layout there.
        mesh: all ranks that train together; by default the widest mesh of a parameter.
        distinct: the mesh axes whose ranks hold different parameters.
        layouts: for sharding that the tensors do not show.
        during_a_call: see `check_copies`.

    Raises:
        LayoutError: the tensors and the declarations do not say how a parameter is sharded, they
            contradict the mesh, or what would count as copies differs.

    Collective: see `check_copies`.
    """
    read = [make_reader(modules) for make_reader in READERS]
    found = [_tensor_layout(name, param, read) for name, param in named]
    reduce_mesh = _reduce_mesh(named, found, mesh, distinct)
    params = [
        _local_param(name, param, layout, reduce_mesh, _declared(name, param, layouts))
        for (name, param), layout in zip(named, found, strict=True)
    ]
    if reduce_mesh is None:
        return ShardedParams(params, None, ranks=ddp.ranks_of_ddp(modules))
    check_copies(params, reduce_mesh, during_a_call)
    ranks = reduce_mesh.rank_group
    if _any_rank_shards(params, reduce_mesh):
        may_differ = reduce_mesh.holds_distinct or layouts is not None
        return ShardedParams(params, reduce_mesh, reduce_mesh, ranks, may_differ)
    counted = [replace(param, counted=True) for param in params]
    return ShardedParams(counted, None, reduce_mesh, ranks)


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module, each once, by their names in the model without wrappers."""
    bare_name = bare_names(module)
    found = {id(param): (name, param) for name, param in module.named_parameters()}
    for name, param in ddp.hidden_parameters(module):
        found.setdefault(id(param), (name, param))
    return ((bare_name(name), param) for name, param in found.values())


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of `named_parameters`, in less time."""
    found = {id(param): param for param in module.parameters()}
    found.update((id(param), param) for _, param in ddp.hidden_parameters(module))
    return list(found.values())


def _tensor_layout(name: str, param: Tensor, readers: Sequence[ParamReader]) -> TensorLayout:
    for read in readers:
        if (layout := read(name, param)) is not None:
            return layout
    whole = BlockShard.whole(param.shape)
    return TensorLayout.without_mesh(ParamShard(name, param.numel(), whole))


def _reduce_mesh(
    named: Sequence[tuple[str, Tensor]],
    found: Sequence[TensorLayout],
    mesh: DeviceMesh | None,
    distinct: tuple[str, ...],
) -> ReduceMesh | None:
    """The user's mesh; else the widest of a DTensor; else the world, where there is FSDP1."""
    tensors = [tensor for _, tensor in named]
    by_id = {id(layout.mesh): layout.mesh for layout in found if layout.mesh is not None}
    widest = widest_mesh([m for m in by_id.values() if m.get_coordinate() is not None])
    check_mesh(mesh, widest, distinct)
    if mesh is not None:
        return ReduceMesh.of(mesh, distinct, from_user=True, tensors=tensors)
    if widest is not None:
        return ReduceMesh.of(widest, distinct, from_user=False, tensors=tensors)
    if _one_process():
        return None
    if not named:
        raise LayoutError(
            "cannot tell which ranks train together: this rank was given no parameter, and a mesh "
            "is found through parameters. The other ranks would wait for this one. "
            "Pass `mesh=` with a DeviceMesh over all ranks that train together."
        )
    devices = [layout.device for layout in found if layout.device is not None]
    if not devices:
        return None
    on_accelerator = (device for device in devices if device.type != "cpu")
    return ReduceMesh.world(next(on_accelerator, devices[0]), tensors)


def _one_process() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def _local_param(
    name: str,
    param: Tensor,
    own: TensorLayout,
    reduce_mesh: ReduceMesh | None,
    declared: Layout | None,
) -> LocalParam:
    added: frozenset[str] = frozenset()
    distinct: frozenset[str] = frozenset()
    full = own
    if reduce_mesh is not None:
        added = reduce_mesh.axes_beside(own.ranks_by_axis.values(), name)
        distinct = reduce_mesh.distinct
        own = _without_clashes(own, added)
        full = _on_all_axes(own, added, reduce_mesh)
    if declared is not None:
        full = _as_declared(name, full, declared, own.sharded | distinct)
    # An axis of one rank divides nothing.
    axes = {axis for axis, ranks in full.ranks_by_axis.items() if len(ranks) > 1}
    counted = None if declared is None else declared.counted
    layout = Layout(full.sharded & axes, frozenset(axes - full.sharded), counted=counted)
    coordinate = {a: ranks.index(dist.get_rank()) for a, ranks in full.ranks_by_axis.items()}
    mesh = _mesh_text({axis: full.ranks_by_axis[axis] for axis in sorted(axes)}, reduce_mesh)
    counts = layout.counted_at(coordinate)
    assumed = added & layout.replicated if declared is None else frozenset[str]()
    return LocalParam(name, param, layout, coordinate, mesh, counts, full.shards, assumed)


def _without_clashes(own: TensorLayout, added: frozenset[str]) -> TensorLayout:
    """Renames axes of the tensor's own mesh whose names other axes of the reduce mesh have."""
    if added.isdisjoint(own.ranks_by_axis):
        return own
    names = {axis: f"own {axis}" if axis in added else axis for axis in own.ranks_by_axis}
    ranks_by_axis = {names[axis]: ranks for axis, ranks in own.ranks_by_axis.items()}
    sharded = frozenset(names[axis] for axis in own.sharded)
    return replace(own, ranks_by_axis=ranks_by_axis, sharded=sharded)


def _on_all_axes(own: TensorLayout, added: frozenset[str], reduce_mesh: ReduceMesh) -> TensorLayout:
    """Adds the axes of the mesh that the tensor's own axes do not run along.

    The ranks along these hold copies of the tensor, or other tensors where the axis is distinct.
    """
    ranks_by_axis = {**own.ranks_by_axis, **{a: reduce_mesh.ranks_along(a) for a in added}}
    sharded = own.sharded | (added & reduce_mesh.distinct)
    return replace(own, ranks_by_axis=ranks_by_axis, sharded=sharded)


def _as_declared(
    name: str, read: TensorLayout, declared: Layout, accounted: frozenset[str]
) -> TensorLayout:
    """What was read, overruled by the declaration where that names an axis.

    Args:
        accounted: the axes that `read.shards` take into account.
    """
    unknown = sorted((declared.sharded | declared.replicated) - set(read.ranks_by_axis))
    if unknown and not _one_process():  # one process needs no mesh to hold everything itself
        raise LayoutError(
            f"cannot use the layout declared for {name!r}: it names the axes {unknown}, but the "
            f"axes known are {sorted(read.ranks_by_axis)}. Correct the names, or pass the `mesh=` "
            f"that has these axes."
        )
    sharded = (read.sharded - declared.replicated) | declared.sharded
    num_ranks = prod(
        len(ranks) for axis, ranks in read.ranks_by_axis.items() if axis in sharded - accounted
    )
    shards = declared.parts or tuple(_over_ranks(shard, num_ranks) for shard in read.shards)
    return replace(read, shards=shards, sharded=sharded)


def _over_ranks(shard: ParamShard, num_ranks: int) -> ParamShard:
    """The shard of a tensor that is declared to lie on several ranks, along an unknown dim."""
    if num_ranks == 1:
        return shard
    block = BlockShard.whole(shard.global_shape, sharded_dims=None)
    return ParamShard(shard.name, shard.numel * num_ranks, block)


def _declared(name: str, param: Tensor, layouts: LayoutFunction | None) -> Layout | None:
    declared: Any = None if layouts is None else layouts(name, param)
    if declared is None or isinstance(declared, Layout):
        return declared
    raise LayoutError(
        f"cannot use the layout declared for {name!r}: `layouts=` returned {declared!r}, which "
        f"says nothing about mesh axes. Return a `distclip.Layout(sharded=..., replicated=...)`, "
        f"or None to read the tensor itself."
    )


def _mesh_text(ranks_by_axis: Mapping[str, Sequence[int]], reduce_mesh: ReduceMesh | None) -> str:
    """The size of each axis, and the distance between its ranks if it is none of the reduce mesh.

    Along an axis of a mesh whose ranks are in no order, ranks lie at various distances.
    """
    texts: list[str] = []
    for axis, ranks in ranks_by_axis.items():
        of_mesh = None
        if reduce_mesh is not None and axis in reduce_mesh.axes:
            of_mesh = reduce_mesh.ranks_along(axis)
        same = [*ranks] == of_mesh
        texts.append(
            f"{axis}={len(ranks)}" if same else f"{axis}={len(ranks)}/{ranks[1] - ranks[0]}"
        )
    return ", ".join(texts)


def _any_rank_shards(params: Sequence[LocalParam], reduce_mesh: ReduceMesh) -> bool:
    """Whether some rank holds elements that another lacks; the same answer on every rank."""
    if not params or reduce_mesh.holds_distinct:
        return reduce_mesh.ranks.numel() > 1
    return any(param.layout.sharded for param in params)
