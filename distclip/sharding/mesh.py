"""The ranks that train together, and the mesh axes that they are laid out on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distclip.arguments import in_short
from distclip.errors import LayoutError
from distclip.sharding.rank_group import RankGroup
from distclip.torch_private import root_mesh, with_real_values


@dataclass(frozen=True, eq=False)
class ReduceMesh:
    """All ranks that share one total norm, as this rank sees them.

    It keeps no DeviceMesh alive: only the ranks of one, and process groups.

    Attributes:
        ranks: global ranks, in the shape of the mesh.
        axes: the names of the mesh axes.
        distinct: the axes whose ranks hold different parameters.
        rank_group: how these ranks communicate.
        from_user: the user passed the mesh, which must then be the same on all ranks. A mesh found
            from parameters may differ between pipeline stages.
    """

    ranks: Tensor
    axes: tuple[str, ...]
    distinct: frozenset[str]
    rank_group: RankGroup
    from_user: bool = False

    @classmethod
    def of(
        cls,
        mesh: DeviceMesh,
        distinct: Iterable[str],
        from_user: bool,
        tensors: Iterable[Tensor] = (),
    ) -> ReduceMesh:
        """The ranks of `mesh`, which contains this rank and holds `tensors`."""
        axes = axis_names(mesh)
        distinct = frozenset(distinct) & set(axes)
        return cls(mesh.mesh, axes, distinct, RankGroup.of(mesh, tensors), from_user)

    @classmethod
    def world(cls, device: torch.device, tensors: Iterable[Tensor] = ()) -> ReduceMesh:
        """All ranks of the default process group, on one axis."""
        ranks = torch.arange(dist.get_world_size(), device="cpu")
        return cls(ranks, ("world",), frozenset(), RankGroup.world(device, tensors))

    @cached_property
    @with_real_values()
    def coordinate(self) -> dict[str, int]:
        """The index of this rank on each axis."""
        indices = self._indices_of([dist.get_rank()])
        return {axis: int(index) for axis, index in zip(self.axes, indices, strict=True)}

    @property
    def shares_copies(self) -> bool:
        """Whether ranks along some axis may hold copies."""
        return any(self.size(axis) > 1 for axis in self.axes if axis not in self.distinct)

    @property
    def holds_distinct(self) -> bool:
        """Whether ranks along some axis hold different parameters."""
        return any(self.size(axis) > 1 for axis in self.distinct)

    def size(self, axis: str) -> int:
        return int(self.ranks.shape[self.axes.index(axis)])

    @with_real_values()
    def ranks_along(self, axis: str) -> list[int]:
        """The ranks along `axis` through this one."""
        index = [slice(None) if a == axis else self.coordinate[a] for a in self.axes]
        return rank_list(self.ranks[tuple(index)])

    def axes_beside(self, rank_lists: Iterable[Sequence[int]], name: str) -> frozenset[str]:
        """The axes along which the ranks of no list differ.

        Args:
            rank_lists: for each axis of another mesh, the ranks along it.
            name: the parameter that lies on that mesh, for the error.

        Raises:
            LayoutError: the lists cover some ranks along these axes but not all.
        """
        key = tuple(tuple(ranks) for ranks in rank_lists)
        if key not in self._axes_by_ranks:
            self._axes_by_ranks[key] = frozenset(self.axes) - self._find_axes_along(key, name)
        return self._axes_by_ranks[key]

    def _find_axes_along(self, rank_lists: Sequence[Sequence[int]], name: str) -> frozenset[str]:
        found: set[str] = set()
        for ranks in rank_lists:
            indices = zip(self.axes, self._indices_of(ranks), strict=True)
            found |= {axis for axis, index in indices if bool((index != index[0]).any())}
        covered, whole = prod(map(len, rank_lists)), prod(map(self.size, found))
        if covered != whole:
            raise LayoutError(
                f"cannot tell which ranks hold copies of {name!r}: it lies on {covered} of the "
                f"{whole} ranks along the mesh axes {sorted(found)}, and nothing says what the "
                f"others hold. Pass `mesh=` with a DeviceMesh over all ranks that train together, "
                f"one axis for each use of ranks."
            )
        return frozenset(found)

    @cached_property
    def _axes_by_ranks(self) -> dict[tuple[tuple[int, ...], ...], frozenset[str]]:
        """Results of `axes_beside`: one takes 0.4 ms, and thousands of parameters need few."""
        return {}

    @cached_property
    def _flat_index_by_rank(self) -> Tensor:
        index = torch.full((int(self.ranks.max()) + 1,), -1, device="cpu")
        index[self.ranks.flatten().long()] = torch.arange(self.ranks.numel(), device="cpu")
        return index

    def _indices_of(self, ranks: Sequence[int]) -> tuple[Tensor, ...]:
        """For each axis the indices of `ranks`."""
        wanted, by_rank = torch.tensor(ranks, device="cpu"), self._flat_index_by_rank
        last = len(by_rank) - 1
        found = torch.where(wanted <= last, by_rank[wanted.clamp(max=last)], -1)
        if bool((found < 0).any()):
            raise LayoutError(
                f"cannot use the mesh with axes {list(self.axes)}: it holds the ranks "
                f"{_named(self.ranks)}, but a parameter lies on rank "
                f"{int(wanted[found < 0][0])} as well, whose elements would not be counted. "
                f"Pass `mesh=` with a DeviceMesh over all ranks that train together."
            )
        return torch.unravel_index(found, self.ranks.shape)


def widest_mesh(meshes: Sequence[DeviceMesh]) -> DeviceMesh | None:
    """Of `meshes` and their roots the one with most ranks, then with most axes, then the first."""
    roots = [root for root in map(root_mesh, meshes) if root.get_coordinate() is not None]
    return max((*roots, *meshes), key=lambda mesh: (mesh.size(), mesh.ndim), default=None)


def check_mesh(mesh: DeviceMesh | None, found: DeviceMesh | None, distinct: Sequence[str]) -> None:
    """Checks a user's mesh, or the widest mesh `found` from the parameters.

    A mesh over a part of the world means that these ranks train together, and no others. Whether a
    parameter lies on ranks outside of it shows in `ReduceMesh.axes_beside`.

    Raises:
        LayoutError: `mesh` lacks this rank; `distinct` names no axis.
    """
    chosen = mesh if mesh is not None else found
    axes = axis_names(chosen) if chosen is not None else ()
    if unknown := sorted(set(distinct) - {"pp"} - set(axes)):
        raise LayoutError(
            f"cannot read `distinct={tuple(distinct)}`: no mesh has an axis {unknown}, the axes "
            f"are {list(axes)}, and nothing would be distinct along it. Correct the name, or pass "
            f"the `mesh=` that has it."
        )
    if mesh is not None and mesh.get_coordinate() is None:
        raise LayoutError(
            f"cannot use the mesh with axes {list(axes)}: this process is rank "
            f"{dist.get_rank()}, but the mesh holds the ranks {_named(mesh.mesh)}, and this "
            f"rank's gradients would not be counted. Pass `mesh=` with a DeviceMesh over all "
            f"ranks that train together."
        )


def axis_names(mesh: DeviceMesh) -> tuple[str, ...]:
    return tuple(mesh.mesh_dim_names or (f"axis{i}" for i in range(mesh.ndim)))


def rank_list(ranks: Tensor) -> list[int]:
    """The ranks of a tensor of any shape, in row-major order."""
    return cast("list[int]", ranks.flatten().tolist())


def world_id() -> int | None:
    """Distinguishes the default process group from one made after it was destroyed."""
    initialized = dist.is_available() and dist.is_initialized()
    return id(dist.group.WORLD) if initialized else None


def _named(ranks: Tensor) -> str:
    return in_short([str(rank) for rank in rank_list(ranks)])
