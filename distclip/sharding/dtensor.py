"""Reads DTensors: FSDP2, HSDP, tensor, sequence and expert parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from distclip.sharding.mesh import axis_names, rank_list
from distclip.sharding.shard import BlockShard, ParamShard
from distclip.sharding.tensor_layout import ParamReader, TensorLayout
from distclip.torch_private import local_shape_and_offset


def make_reader(modules: Sequence[nn.Module]) -> ParamReader:
    """A DTensor says itself how it lies on its mesh: `modules` are not needed."""
    return read_dtensor


def read_dtensor(name: str, param: Tensor) -> TensorLayout | None:
    """The layout of a DTensor; None for any other tensor."""
    if not isinstance(param, DTensor):
        return None
    coordinate = param.device_mesh.get_coordinate()
    if coordinate is None:  # this rank is not on the mesh and holds no element
        nothing = (0,) * param.ndim
        shard = BlockShard(tuple(param.shape), nothing, nothing)
        return TensorLayout.without_mesh(ParamShard(name, param.numel(), shard))
    ranks_by_axis = _ranks_by_axis(param.device_mesh, coordinate)
    placements = cast("tuple[Any, ...]", param.placements)
    dims = {
        axis: cast(int, placement.dim)
        for axis, placement in zip(ranks_by_axis, placements, strict=True)
        if is_sharding(placement)
    }
    cut = frozenset(dim for axis, dim in dims.items() if len(ranks_by_axis[axis]) > 1)
    shard = ParamShard(name, param.numel(), _block(param, cut))
    return TensorLayout((shard,), ranks_by_axis, frozenset(dims), param.device_mesh.device_type)


def is_sharding(placement: Any) -> bool:
    """Whether ranks hold different elements. Partial ones are copies once they are reduced."""
    return not (placement.is_replicate() or placement.is_partial())


def _ranks_by_axis(mesh: DeviceMesh, coordinate: Sequence[int]) -> dict[str, list[int]]:
    """For each axis, in the order of the mesh, the ranks along it through this one."""
    ranks = mesh.mesh
    return {
        axis: rank_list(ranks[(*coordinate[:i], slice(None), *coordinate[i + 1 :])])
        for i, axis in enumerate(axis_names(mesh))
    }


def _block(param: DTensor, sharded_dims: frozenset[int]) -> BlockShard:
    shape, mesh = tuple(param.shape), param.device_mesh
    sizes, offsets = local_shape_and_offset(shape, mesh, param.placements)
    return BlockShard(shape, tuple(offsets), tuple(sizes), sharded_dims)
