"""The ranks that torch's own functions sum over: those of the tensors, and no pipeline stage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from distclip.sharding.mesh import axis_names, rank_list, widest_mesh


def any_dtensor(tensors: Iterable[Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def stage_mesh(
    tensors: Iterable[Tensor], slice_of: Callable[[DeviceMesh], DeviceMesh | None]
) -> DeviceMesh | None:
    """The smallest mesh that is known to hold these tensors; None where none is a DTensor.

    It is the mesh of one of them where all lie on its ranks, else `slice_of` their root mesh.
    """
    found = {id(t.device_mesh): t.device_mesh for t in tensors if isinstance(t, DTensor)}
    meshes = [mesh for mesh in found.values() if mesh.get_coordinate() is not None]
    if len(meshes) <= 1:
        return meshes[0] if meshes else None
    widest = max(meshes, key=lambda mesh: (mesh.size(), mesh.ndim))
    ranks = set(rank_list(widest.mesh))
    if all(ranks.issuperset(rank_list(mesh.mesh)) for mesh in meshes):
        return widest
    root = widest_mesh(meshes)
    return None if root is None else slice_of(root)


def without_axes(mesh: DeviceMesh, distinct: Collection[str]) -> DeviceMesh | None:
    """The slice of `mesh` that lacks these axes; None where nothing is left."""
    axes = axis_names(mesh)
    kept = tuple(axis for axis in axes if axis not in distinct)
    if kept == axes:
        return mesh
    return mesh[kept] if kept else None
