"""Which ranks hold which elements of a gradient: the one room that knows kinds of parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from distclip.errors import LayoutError
from distclip.sharding.dtensor import TensorLayout, fsdp1_units, read
from distclip.sharding.local_tensors import local_values
from distclip.sharding.mesh import ReduceMesh, check_mesh, widest
from distclip.sharding.shard import ParamShard, spread


@dataclass(frozen=True, slots=True)
class Layout:
    """How the ranks of a mesh share one gradient: each axis shards it or replicates it.

    Attributes:
        sharded: axes whose ranks hold different elements. An axis whose ranks hold different
            *tensors* (pipeline stages, experts) counts here.
        replicated: axes whose ranks hold identical copies, of which the one at index 0 counts. Where that rank holds
            none (a weight tied between two inner pipeline stages), let the rank that is to count declare the axis as
            sharded, and the others as replicated.
        parts: the tensors of the model that it holds elements of, and which, where it is a piece of a flat buffer.
            All ranks must declare the same parts in the same order, also those that hold nothing of them.
        counted: whether this rank adds the elements to the total, where no axis tells: of the ranks that hold the
            same elements, exactly one must say True. None goes by `replicated`.

    Raises:
        LayoutError: an axis is named in both.
    """

    sharded: frozenset[str] = frozenset()
    replicated: frozenset[str] = frozenset()
    parts: tuple[ParamShard, ...] = ()
    counted: bool | None = None

    def __post_init__(self) -> None:
        for field_name in ("sharded", "replicated"):
            object.__setattr__(self, field_name, _axes(field_name, getattr(self, field_name)))
        if both := sorted(self.sharded & self.replicated):
            raise LayoutError(
                f"cannot make a Layout: the mesh axes {both} are given as sharded and as replicated, "
                f"but the ranks along an axis hold either different elements or copies. Name each axis once."
            )

    def counted_at(self, coordinate: dict[str, int]) -> bool:
        """Whether the rank at `coordinate` adds this tensor to the total.

        Of the ranks that hold the same elements, the one at the origin of every replicated axis
        counts them. Summed over the mesh, every element then counts once.
        """
        if self.counted is not None:
            return self.counted
        return all(coordinate[axis] == 0 for axis in self.replicated)

    def __str__(self) -> str:
        parts = (("sharded over", self.sharded), ("copies over", self.replicated))
        return "; ".join(f"{verb} {', '.join(sorted(axes))}" for verb, axes in parts if axes) or "this rank alone"


def _axes(field_name: str, given: Any) -> frozenset[str]:
    """`given` as a set of axis names, for users who write a tuple or a list."""
    listed: list[Any] = [] if isinstance(given, str) else list(given)
    if isinstance(given, str) or not all(isinstance(axis, str) for axis in listed) or len(set(listed)) < len(listed):
        raise LayoutError(
            f"cannot make a Layout with {field_name}={given!r}: it must be a set of names of mesh axes, each once, "
            f"since an axis shards a tensor or does not. Pass, for example, `{field_name}=frozenset({{'tp'}})`."
        )
    return frozenset(listed)


Layouts = Callable[[str, Tensor], Layout | None]


@dataclass(frozen=True, slots=True)
class LocalParam:
    """One parameter as this rank holds it.

    Attributes:
        coordinate: where this rank stands on the axes of the layout.
        mesh: the sizes of those axes and how far apart their ranks lie; alike on ranks that hold copies.
        counted: this rank adds the elements to the total. Other ranks that hold them add zero.
        parts: the tensors of the model that it holds elements of.
    """

    name: str
    param: Tensor
    layout: Layout
    coordinate: dict[str, int]
    mesh: str
    counted: bool
    parts: tuple[ParamShard, ...]

    @property
    def weights(self) -> Tensor:
        """The dense values of the parameter on this rank."""
        return local_values(self.param.detach())


def read_layouts(
    named: Sequence[tuple[str, Tensor]],
    modules: Sequence[nn.Module] = (),
    mesh: DeviceMesh | None = None,
    distinct: tuple[str, ...] = ("pp",),
    layouts: Layouts | None = None,
) -> tuple[list[LocalParam], ReduceMesh | None]:
    """How this rank holds each parameter, and the team that sums are reduced over: None if no rank shards any.

    Raises:
        LayoutError: the tensors and the declarations do not tell it.

    Collective: see `Team.of`.
    """
    units = {key: own for module in modules for key, own in fsdp1_units(module).items()}
    owns = [read(name, param, units) for name, param in named]
    team = _team(named, {own.device_type for own in units.values()}, mesh, distinct)
    held = [_held(name, p, own, team, layouts) for (name, p), own in zip(named, owns, strict=True)]
    if team is None or _sharded_anywhere(held, team):
        return held, team
    return [replace(h, counted=True) for h in held], None


def _team(
    named: Sequence[tuple[str, Tensor]], unit_devices: set[str], mesh: DeviceMesh | None, distinct: tuple[str, ...]
) -> ReduceMesh | None:
    meshes = {id(p.device_mesh): p.device_mesh for _, p in named if isinstance(p, DTensor)}
    found = widest([m for m in meshes.values() if m.get_coordinate() is not None])
    check_mesh(mesh, found, distinct)
    if (chosen := mesh if mesh is not None else found) is not None:
        return ReduceMesh.of(chosen, distinct, given=mesh is not None)
    if _alone():
        return None
    if not named:
        raise LayoutError(
            "cannot tell which ranks train together: this rank was given no parameter, and a mesh is found through "
            "parameters, so that the other ranks would wait for this one. "
            "Pass `mesh=` with a DeviceMesh over all ranks that train together."
        )
    return ReduceMesh.world((unit_devices - {"cpu"} or unit_devices).pop()) if unit_devices else None


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def _held(name: str, param: Tensor, own: TensorLayout, team: ReduceMesh | None, layouts: Layouts | None) -> LocalParam:
    outside = set[str]()
    if team is not None:
        outside = set(team.axes) - team.axes_along(own.lines.values(), name)
    lines = dict(own.lines)
    sharded, parts = own.sharded, own.parts
    if team is not None:
        lines |= {axis: team.ranks_along(axis) for axis in outside}
        sharded |= outside & team.distinct
    coordinate = {axis: line.index(dist.get_rank()) for axis, line in lines.items()}
    declared = None if layouts is None else _declared(name, layouts(name, param))
    if declared is not None:
        sharded = _overruled(name, sharded, declared, sorted(lines))
        apart = sharded - own.sharded - (team.distinct if team is not None else frozenset())
        if declared.parts:
            parts = declared.parts
        elif apart:
            parts = tuple(spread(part, prod(len(lines.get(axis, ())) for axis in apart)) for part in parts)
    real = {axis for axis, line in lines.items() if len(line) > 1}  # an axis of one rank divides nothing
    layout = Layout(sharded & real, frozenset(real - sharded), counted=declared and declared.counted)
    mesh = ", ".join(f"{axis}={len(lines[axis])}/{lines[axis][1] - lines[axis][0]}" for axis in sorted(real))
    return LocalParam(name, param, layout, coordinate, mesh, layout.counted_at(coordinate), parts)


def _declared(name: str, given: Any) -> Layout | None:
    if given is None or isinstance(given, Layout):
        return given
    raise LayoutError(
        f"cannot use the layout declared for {name!r}: `layouts=` returned {given!r}, which says nothing about "
        f"mesh axes. Return a `distclip.Layout(sharded=..., replicated=...)`, or None to read the tensor itself."
    )


def _overruled(name: str, sharded: frozenset[str], declared: Layout, axes: list[str]) -> frozenset[str]:
    """The axes that shard `name` by the declaration, and by what was read where it says nothing."""
    unknown = sorted((declared.sharded | declared.replicated) - set(axes))
    if unknown and not _alone():  # one process needs no mesh to hold everything itself
        raise LayoutError(
            f"cannot use the layout declared for {name!r}: it names the axes {unknown}, but the axes known are "
            f"{axes}. Correct the names, or pass the `mesh=` that has these axes."
        )
    return (sharded - declared.replicated) | declared.sharded


def _sharded_anywhere(held: Sequence[LocalParam], team: ReduceMesh) -> bool:
    """Whether some rank of the team holds elements that another lacks; the same answer on every rank."""
    if not held or any(team.size(axis) > 1 for axis in team.distinct):
        return team.ranks.numel() > 1
    return any(h.layout.sharded for h in held)
