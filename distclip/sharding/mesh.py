"""The ranks that train together, and the mesh axes that they are laid out on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distclip.errors import LayoutError


@dataclass(frozen=True)
class ReduceMesh:
    """All ranks that share one total norm, as this rank sees them.

    Attributes:
        ranks: global ranks, in the shape of the mesh.
        axes: the names of the mesh axes.
        distinct: the axes whose ranks hold different parameters.
        group: the process group over all of `ranks`.
        device_type: where the group's collectives run.
        given: by hand, so that it must be the same on all ranks; found meshes may differ between pipeline stages.
        coordinate: where this rank stands, by axis.
    """

    ranks: Tensor
    axes: tuple[str, ...]
    distinct: frozenset[str]
    group: dist.ProcessGroup
    device_type: str
    from_user: bool = False
    coordinate: dict[str, int] = field(init=False)
    _places: Tensor = field(init=False)
    # Thousands of parameters lie on a few sets of lines, and reading one takes 0.4 ms.
    _moved: dict[tuple[tuple[int, ...], ...], set[str]] = field(
        init=False, default_factory=dict[tuple[tuple[int, ...], ...], "set[str]"]
    )

    def __post_init__(self) -> None:
        places = torch.full((int(self.ranks.max()) + 1,), -1, device="cpu")
        places[self.ranks.flatten().long()] = torch.arange(self.ranks.numel(), device="cpu")
        object.__setattr__(self, "_places", places)
        here = [int(index) for index in self._coordinates([dist.get_rank()])]
        object.__setattr__(self, "coordinate", dict(zip(self.axes, here, strict=True)))

    @classmethod
    def of(cls, mesh: DeviceMesh, distinct: Iterable[str], given: bool) -> ReduceMesh:
        """The team on `mesh`, which contains this rank.

        Collective: the making of a process group, once a mesh, if `mesh` has several axes and leaves out ranks.
        """
        axes = axis_names(mesh)
        return cls(mesh.mesh, axes, frozenset(distinct) & set(axes), _group(mesh), mesh.device_type, given)

    @classmethod
    def world(cls, device_type: str) -> ReduceMesh:
        """All ranks of the default process group, on one axis."""
        return cls(
            torch.arange(dist.get_world_size(), device="cpu"), ("world",), frozenset(), world_group(), device_type
        )

    def size(self, axis: str) -> int:
        return int(self.ranks.shape[self.axes.index(axis)])

    def ranks_along(self, axis: str) -> list[int]:
        """The ranks along `axis` through this one."""
        place = [slice(None) if a == axis else self.coordinate[a] for a in self.axes]
        return numbers(self.ranks[tuple(place)])

    def axes_along(self, lines: Iterable[Sequence[int]], name: str) -> set[str]:
        """The axes that `lines` move along, each line being the ranks on one axis of another mesh.

        Raises:
            LayoutError: the lines cover these axes in part.
        """
        lines = tuple(tuple(line) for line in lines)
        if (known := self._moved.get(lines)) is not None:
            return known
        moved: set[str] = set()
        for line in lines:
            found = zip(self.axes, self._coordinates(line), strict=True)
            moved |= {axis for axis, index in found if bool((index != index[0]).any())}
        covered, whole = prod(map(len, lines)), prod(map(self.size, moved))
        if covered != whole:
            raise LayoutError(
                f"cannot tell which ranks hold copies of {name!r}: it lies on {covered} of the {whole} ranks along the "
                f"mesh axes {sorted(moved)}, and nothing says what the others hold. "
                f"Pass `mesh=` with a DeviceMesh over all ranks that train together, one axis for each use of ranks."
            )
        self._moved[lines] = moved
        return moved

    def _coordinates(self, ranks: Sequence[int]) -> tuple[Tensor, ...]:
        asked = torch.tensor(ranks, device="cpu")
        places = torch.where(asked < len(self._places), self._places[asked.clamp(max=len(self._places) - 1)], -1)
        if bool((places < 0).any()):
            raise LayoutError(
                f"cannot use the mesh with axes {list(self.axes)}: it holds the ranks {_listed(self.ranks)}, but a "
                f"parameter lies on rank {int(asked[places < 0][0])} as well, whose elements would not be counted. "
                f"Pass `mesh=` with a DeviceMesh over all ranks that train together."
            )
        return torch.unravel_index(places, self.ranks.shape)


def widest(meshes: Sequence[DeviceMesh]) -> DeviceMesh | None:
    """Of `meshes` and their roots: most ranks, then most axes, then the first."""
    around = [root for root in map(_root, meshes) if root.get_coordinate() is not None]
    return max((*around, *meshes), key=lambda mesh: (mesh.size(), mesh.ndim), default=None)


def check_mesh(mesh: DeviceMesh | None, found: DeviceMesh | None, distinct: Sequence[str]) -> None:
    """Raises LayoutError unless a mesh given by hand holds this rank and all those of the mesh found from parameters.

    A mesh over a part of the world is right only where the parameters lie on no wider one.
    """
    chosen = mesh if mesh is not None else found
    axes = axis_names(chosen) if chosen is not None else ()
    if unknown := sorted(set(distinct) - {"pp"} - set(axes)):
        raise LayoutError(
            f"cannot read `distinct={tuple(distinct)}`: no mesh has an axis {unknown}, the axes are {list(axes)}, so "
            f"that nothing would be distinct along it. Correct the name, or pass the `mesh=` that has it."
        )
    if mesh is not None and mesh.get_coordinate() is None:
        raise LayoutError(
            f"cannot use the mesh with axes {list(axes)}: this process is rank {dist.get_rank()}, but the mesh holds "
            f"the ranks {_listed(mesh.mesh)}, so that this rank's gradients would not be counted. "
            f"Pass `mesh=` with a DeviceMesh over all ranks that train together."
        )
    need = found.size() if found is not None else dist.get_world_size() if mesh is not None else 0
    if mesh is not None and mesh.size() < need:
        whose = f"the mesh of the parameters, {list(axis_names(found))}," if found is not None else "the world"
        raise LayoutError(
            f"cannot use the mesh with axes {list(axes)}: it holds the {mesh.size()} ranks {_listed(mesh.mesh)}, "
            f"but {need} ranks may train together ({whose} has them), and what the others hold would not be counted. "
            f"Pass `mesh=` with a DeviceMesh over all ranks that train together."
        )


def numbers(ranks: Tensor) -> list[int]:
    return cast("list[int]", ranks.flatten().tolist())


def axis_names(mesh: DeviceMesh) -> tuple[str, ...]:
    return tuple(mesh.mesh_dim_names or (f"axis{i}" for i in range(mesh.ndim)))


def _root(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that `mesh` was sliced from."""
    if hasattr(mesh, "_get_root_mesh"):
        return cast(Any, mesh)._get_root_mesh()
    from torch.distributed import device_mesh

    return cast(Any, device_mesh)._mesh_resources.get_root_mesh(mesh)  # can go with torch < 2.8


def world_group() -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.group.WORLD)


def _group(mesh: DeviceMesh) -> dist.ProcessGroup:
    if mesh.size() == dist.get_world_size():
        return world_group()
    if mesh.ndim == 1:
        return mesh.get_group()
    holder = cast(Any, mesh)  # the group is kept on the mesh: made once, and gone with it
    if not hasattr(holder, "_distclip_group"):
        ranks = sorted(numbers(mesh.mesh))
        holder._distclip_group = dist.new_group(ranks, use_local_synchronization=True)
    return cast(dist.ProcessGroup, holder._distclip_group)


def _listed(ranks: Tensor) -> str:
    texts = [str(rank) for rank in numbers(ranks)]
    return ", ".join(texts if len(texts) <= 8 else [*texts[:4], "...", texts[-1]])
