"""Reads DTensors: FSDP2, HSDP, tensor, sequence and expert parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
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
            found[id(mesh)] = ranks_by_axis(mesh)
        placements = cast("tuple[Any, ...]", param.placements)
        return layout_on(name, param.shape, mesh, placements, found[id(mesh)])

    return read


def is_sharding(placement: Any) -> bool:
    """Whether ranks hold different elements. Partial ones are copies once they are reduced."""
    return not (placement.is_replicate() or placement.is_partial())


def ranks_by_axis(mesh: DeviceMesh) -> dict[str, list[int]]:
    """For each axis the ranks along it through this one; nothing if this one is not on the mesh."""
    ranks, here = mesh.mesh, mesh.get_coordinate()
    if here is None:
        return {}
    return {
        axis: rank_list(ranks[(*here[:i], slice(None), *here[i + 1 :])])
        for i, axis in enumerate(axis_names(mesh))
    }


def layout_on(
    name: str,
    shape: torch.Size,
    mesh: DeviceMesh,
    placements: Sequence[Any],
    along: dict[str, list[int]],
) -> TensorLayout:
    """How a tensor of the global `shape` lies on a mesh. along: `ranks_by_axis(mesh)`."""
    if not along:  # this rank is not on the mesh and holds no element
        nothing = (0,) * len(shape)
        return TensorLayout.without_mesh(
            ParamShard(name, shape.numel(), BlockShard(tuple(shape), nothing, nothing))
        )
    dims = {
        axis: cast(int, placement.dim)
        for axis, placement in zip(along, placements, strict=True)
        if is_sharding(placement)
    }
    cut = frozenset(dim for axis, dim in dims.items() if len(along[axis]) > 1)
    sizes, offsets = local_shape_and_offset(shape, mesh, placements)
    block = BlockShard(tuple(shape), tuple(offsets), tuple(sizes), cut)
    shard = ParamShard(name, shape.numel(), block)
    return TensorLayout((shard,), along, frozenset(dims), torch.device(mesh.device_type), mesh)
