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
    """A reader of DTensors, which say themselves how they lie on their mesh."""
    # By the mesh's id: to find the ranks of one takes longer than to read a parameter.
    found: dict[int, dict[str, list[int]]] = {}

    def read(name: str, param: Tensor) -> TensorLayout | None:
        if not isinstance(param, DTensor):
            return None
        mesh = param.device_mesh
        if id(mesh) not in found:
            found[id(mesh)] = _ranks_by_axis(mesh)
        return _layout(name, param, found[id(mesh)])

    return read


def is_sharding(placement: Any) -> bool:
    """Whether ranks hold different elements. Partial ones are copies once they are reduced."""
    return not (placement.is_replicate() or placement.is_partial())


def _ranks_by_axis(mesh: DeviceMesh) -> dict[str, list[int]]:
    """For each axis the ranks along it through this one; nothing if this one is not on the mesh."""
    ranks, here = mesh.mesh, mesh.get_coordinate()
    if here is None:
        return {}
    return {
        axis: rank_list(ranks[(*here[:i], slice(None), *here[i + 1 :])])
        for i, axis in enumerate(axis_names(mesh))
    }


def _layout(name: str, param: DTensor, ranks_by_axis: dict[str, list[int]]) -> TensorLayout:
    shape, numel = tuple(param.shape), param.numel()
    if not ranks_by_axis:  # this rank is not on the mesh and holds no element
        nothing = (0,) * len(shape)
        return TensorLayout.without_mesh(
            ParamShard(name, numel, BlockShard(shape, nothing, nothing))
        )
    placements = cast("tuple[Any, ...]", param.placements)
    dims = {
        axis: cast(int, placement.dim)
        for axis, placement in zip(ranks_by_axis, placements, strict=True)
        if is_sharding(placement)
    }
    cut = frozenset(dim for axis, dim in dims.items() if len(ranks_by_axis[axis]) > 1)
    sizes, offsets = local_shape_and_offset(shape, param.device_mesh, placements)
    shard = ParamShard(name, numel, BlockShard(shape, tuple(offsets), tuple(sizes), cut))
    device_type = param.device_mesh.device_type
    return TensorLayout((shard,), ranks_by_axis, frozenset(dims), device_type)
