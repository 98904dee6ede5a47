"""The records of a layout: which ranks hold which elements of a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from torch import Tensor

from distclip.arguments import as_flag, items, shown
from distclip.errors import LayoutError
from distclip.sharding.local_tensors import local_values
from distclip.sharding.shard import ParamShard


@dataclass(frozen=True, slots=True)
class Layout:
    """How the ranks of a mesh share one gradient: each axis shards it or replicates it.

    Attributes:
        sharded: axes whose ranks hold different elements. An axis whose ranks hold different
            *tensors* (pipeline stages, experts) counts here.
        replicated: axes whose ranks hold identical copies, of which the one at index 0 counts. If
            that rank has no copy (a weight tied between two inner pipeline stages), the rank that
            is to count declares the axis as sharded, and the others as replicated.
        parts: for a piece of a flat buffer, the tensors of the model that it has elements of. All
            ranks must declare the same tensors in the same order, even those that hold none of
            their elements.
        counted: whether this rank adds the elements to the total, where no axis says it. Of the
            ranks that hold the same elements, exactly one must pass True. None: go by `replicated`.

    Raises:
        LayoutError: an axis is named in both.

    Example:
        >>> from distclip import Layout
        >>> print(Layout(sharded={"ep"}, replicated={"dp"}))
        sharded over ep; copies over dp
    """

    sharded: frozenset[str] = frozenset()
    replicated: frozenset[str] = frozenset()
    parts: tuple[ParamShard, ...] = ()
    counted: bool | None = None

    def __post_init__(self) -> None:
        for field_name in ("sharded", "replicated"):
            axes = _axes(field_name, getattr(self, field_name))
            object.__setattr__(self, field_name, axes)
        parts = cast(Any, self.parts)
        listed = items(parts)
        if listed is None or not all(isinstance(part, ParamShard) for part in listed):
            raise LayoutError(
                f"cannot make a Layout with parts={shown(parts)}: they say which elements of the "
                f"model's tensors a flat buffer holds. Pass a tuple of "
                f"`distclip.sharding.ParamShard`, or ()."
            )
        object.__setattr__(self, "parts", tuple(listed))
        if self.counted is not None:
            object.__setattr__(self, "counted", as_flag("counted", self.counted))
        if both := sorted(self.sharded & self.replicated):
            raise LayoutError(
                f"cannot make a Layout: the mesh axes {both} are given as sharded and as "
                f"replicated, but the ranks along an axis hold either different elements or "
                f"copies. Name each axis once."
            )

    def counted_at(self, coordinate: Mapping[str, int]) -> bool:
        """Whether the rank at `coordinate` adds this tensor to the total.

        Of the ranks that hold the same elements, the one at index 0 of every replicated axis counts
        them. Summed over the mesh, every element then counts once.
        """
        if self.counted is not None:
            return self.counted
        return all(coordinate[axis] == 0 for axis in self.replicated)

    def __str__(self) -> str:
        texts = [
            f"{verb} {', '.join(sorted(axes))}"
            for verb, axes in (("sharded over", self.sharded), ("copies over", self.replicated))
            if axes
        ]
        return "; ".join(texts) or "this rank alone"


# What users pass as `layouts=`: from the name and the parameter, None to read the tensor itself.
LayoutFunction: TypeAlias = Callable[[str, Tensor], Layout | None]


@dataclass(frozen=True, slots=True)
class LocalParam:
    """One parameter as this rank holds it.

    Attributes:
        coordinate: the index of this rank on each axis of the layout.
        mesh: for each of these axes its size and the distance between its ranks, as text. The same
            on all ranks that hold copies.
        counted: whether this rank adds the elements to the total. Others that hold them add zero.
        shards: the tensors of the model that the parameter has elements of.
        assumed: the replicated axes that neither the tensor nor the user speaks of.
    """

    name: str
    param: Tensor
    layout: Layout
    coordinate: Mapping[str, int]
    mesh: str
    counted: bool
    shards: tuple[ParamShard, ...]
    assumed: frozenset[str] = frozenset()

    @property
    def weights(self) -> Tensor:
        """The dense values of the parameter on this rank."""
        return local_values(self.param.detach())


def _axes(field_name: str, given: object) -> frozenset[str]:
    """`given` as a set of axis names. Users may pass a tuple or a list."""
    if hasattr(given, "__iter__") and not isinstance(given, str):
        axes = list(cast("Iterable[Any]", given))
        if all(isinstance(axis, str) for axis in axes) and len(set(axes)) == len(axes):
            return frozenset(axes)
    raise LayoutError(
        f"cannot make a Layout with {field_name}={given!r}: it must be a set of names of mesh "
        f"axes, each once, because an axis shards a tensor or does not. Pass, for example, "
        f"`{field_name}=frozenset({{'tp'}})`."
    )
