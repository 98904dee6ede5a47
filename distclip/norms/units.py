"""Units, the groups of elements smaller than the model: where the norm of each lies in one vector.

A *unit* is what shares one limit: a whole tensor, or one index of its first or last dim. Where
a boundary between ranks cuts a unit, its partial sums are reduced too, in a *slot* of the payload.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distclip import kernels
from distclip.arguments import in_short
from distclip.errors import LayoutError
from distclip.norms.unit_rows import RowIndexes, Rows
from distclip.policies import Policy, Scope
from distclip.sharding.layout import LocalParam
from distclip.sharding.shard import BlockShard, ParamShard, UnitView


def rows_of(views: Iterable[UnitView]) -> tuple[Rows, ...]:
    """The rows of each view of `Units.views`."""
    return tuple([Rows(v.first, 1 if v.dim is None else v.values.shape[v.dim]) for v in views])


@dataclass(frozen=True, slots=True)
class UnitSpan:
    """The units of one tensor that this rank holds elements of: `norms[row : row + count]`.

    Attributes:
        member: the index of the parameter in its group.
        dim: the dim of the tensor whose indices are units; None if the tensor is one unit.
        first_unit: the unit that `norms[row]` belongs to.
    """

    member: int
    shard: ParamShard
    dim: int | None
    row: int
    first_unit: int
    count: int

    def is_param(self) -> bool:
        """Whether the span is one unit, of which the parameter has all elements that it has."""
        return self.dim is None and isinstance(self.shard.shard, BlockShard)

    def views(self, values: Tensor) -> Iterator[UnitView]:
        """Views of a parameter's values in which units lie along one dim, and their first rows."""
        for view in self.shard.shard.unit_views(values, self.dim):
            yield view._replace(first=self.row + view.first - self.first_unit)


@dataclass(frozen=True)
class Units:
    """All units of a group that this rank holds elements of, and what is known of each.

    Shapes: counted, limited, sizes: [num_units]; sharded, slots: [number of sharded units here].

    Attributes:
        num_slots: how many units are sharded here or on other ranks that hold the same parameters.
        counted: this rank adds the unit's elements to sums; bool.
        limited: the policy does not exclude the unit; bool.
        sizes: how many elements the unit has over all ranks; float64.
        sharded: the rows whose unit a boundary between ranks cuts.
        slots: of each of these, its slot among those of ranks that hold the same parameters.
    """

    spans: Sequence[UnitSpan]
    num_units: int
    num_slots: int
    counted: Tensor
    limited: Tensor
    sizes: Tensor
    sharded: Tensor
    slots: Tensor

    def views(self, values: Sequence[Tensor | None]) -> Iterator[UnitView]:
        """The views of all spans, from the values of the group's parameters."""
        for span in self.spans:
            if (of_member := values[span.member]) is not None:
                yield from span.views(of_member)

    @cached_property
    def indexes(self) -> RowIndexes:
        """Which rows the numbers of views belong to."""
        return RowIndexes(self.sizes.device)

    def limited_without(self, members: tuple[int, ...]) -> Tensor:
        """`limited`, and false for the units of these parameters of the group."""

        def host() -> Tensor:
            others = torch.ones(self.num_units, dtype=torch.bool, device="cpu")
            for span in (span for member in members for span in self.spans_of.get(member, ())):
                others[span.row : span.row + span.count] = False
            return others

        return self.limited & self.indexes.uploaded(members, host)

    @cached_property
    def spans_of(self) -> dict[int, list[UnitSpan]]:
        """The spans of each parameter, by its index in the group."""
        spans: dict[int, list[UnitSpan]] = {}
        for span in self.spans:
            spans.setdefault(span.member, []).append(span)
        return spans

    def of_members(self, members: Sequence[int]) -> UnitsOfMembers:
        """The units of some parameters, by their indices in the group."""
        spans: list[UnitSpan] = []
        rows: list[int] = []
        for i, member in enumerate(members):
            for span in self.spans_of.get(member, ()):
                spans.append(replace(span, member=i, row=len(rows)))
                rows += range(span.row, span.row + span.count)
        sharded, slots, num_slots = _slots(spans)
        device = self.sizes.device
        index = torch.tensor(rows, dtype=torch.int64, device=device)
        units = Units(
            spans,
            len(rows),
            num_slots,
            # Where no other rank is asked, each rank adds what it has.
            counted=self.counted[index] if num_slots else torch.ones_like(self.counted[index]),
            limited=self.limited[index],
            sizes=self.sizes[index],
            sharded=torch.tensor(sharded, dtype=torch.int64, device=device),
            slots=torch.tensor(slots, dtype=torch.int64, device=device),
        )
        return UnitsOfMembers(units, index)

    @cached_property
    def are_params(self) -> bool:
        """Whether each parameter of the group is one unit, and has no element of another."""
        members = [span.member for span in self.spans]
        return members == list(range(len(members))) and all(map(UnitSpan.is_param, self.spans))

    @cached_property
    def row_names(self) -> list[str]:
        return [span.shard.name for span in self.spans for _ in range(span.count)]


class UnitsOfMembers(NamedTuple):
    """The units of some parameters of a group, and the rows of the group's units that they are.

    Shapes: rows: [units.num_units], int64.
    """

    units: Units
    rows: Tensor


def make_units(params: Sequence[LocalParam], policy: Policy[Any], device: torch.device) -> Units:
    """The units of a policy's scope.

    Raises:
        LayoutError: a boundary between ranks may cut units, and it is unknown which.
        ValueError: `exclude` names nothing.
    """
    spans: list[UnitSpan] = []
    num_units = 0
    for member, param in enumerate(params):
        for shard in param.shards:
            dim = _unit_dim(shard, policy)
            first, count = shard.shard.unit_range(dim)
            spans.append(UnitSpan(member, shard, dim, num_units, first, count))
            num_units += count
    rows, slots, num_slots = _slots(spans)
    excluded = _excluded_names(params, policy.exclude)
    counts = torch.tensor([span.count for span in spans], dtype=torch.int64, device="cpu")

    def per_unit(per_span: list[float]) -> Tensor:
        numbers = torch.tensor(per_span, dtype=torch.float64, device="cpu")
        return numbers.repeat_interleave(counts, output_size=num_units).to(device)

    return Units(
        spans,
        num_units,
        num_slots,
        counted=per_unit([float(params[span.member].counted) for span in spans]) > 0,
        limited=per_unit([float(span.shard.name not in excluded) for span in spans]) > 0,
        sizes=per_unit([_unit_size(span) for span in spans]),
        sharded=torch.tensor(rows, dtype=torch.int64, device=device),
        slots=torch.tensor(slots, dtype=torch.int64, device=device),
    )


@torch.no_grad()
def prepare_units(units: Units, params: Sequence[LocalParam], norm_type: float) -> None:
    """Compiles what steps will call for the units of accelerators."""
    on_accelerator = [None if p.param.is_cpu or p.param.is_meta else p.weights for p in params]
    views = list(units.views(on_accelerator))
    kernels.prepare_units([v.values for v in views], [v.dim for v in views], norm_type)


def _slots(spans: Sequence[UnitSpan]) -> tuple[list[int], list[int], int]:
    """Which rows are reduced, in which slots, and the number of slots on all ranks."""
    rows: list[int] = []
    slots: list[int] = []
    num_slots = 0
    for span in spans:
        cut = span.shard.shard.cut_units(span.dim)
        for slot, unit in enumerate(cut, num_slots):
            if span.first_unit <= unit < span.first_unit + span.count:
                rows.append(span.row + unit - span.first_unit)
                slots.append(slot)
        num_slots += len(cut)
    return rows, slots, num_slots


def _unit_size(span: UnitSpan) -> float:
    num_units = 1 if span.dim is None else max(1, span.shard.global_shape[span.dim])
    return span.shard.numel / num_units


def _unit_dim(shard: ParamShard, policy: Policy[Any]) -> int | None:
    shape = shard.global_shape
    if policy.scope is Scope.TENSOR or len(shape) < 2:
        return None
    if isinstance(shard.shard, BlockShard) and shard.shard.sharded_dims is None:
        raise LayoutError(
            f"cannot clip the units of {shard.name!r}: its layout is declared by axes. They do not "
            f"say along which dim its shards lie, and a unit may be whole on this rank or cut. "
            f"Make it a DTensor, whose placements say it, or give it a policy of another scope."
        )
    if policy.unit_dim == -1 and sum(size > 1 for size in shape) <= 1:
        return None  # optax takes such a tensor for a vector
    return policy.unit_dim % len(shape)


def _excluded_names(params: Sequence[LocalParam], exclude: Sequence[Any]) -> set[str]:
    """The names that `exclude` stands for: patterns of names, names of modules, or modules."""
    names = {shard.name for param in params for shard in param.shards}
    excluded: set[str] = set()
    for wanted in exclude:
        if isinstance(wanted, nn.Module):
            inside = {id(param) for param in wanted.parameters()}
            found = {s.name for param in params if id(param.param) in inside for s in param.shards}
        else:
            found = {n for n in names if fnmatchcase(n, wanted) or n.startswith(f"{wanted}.")}
        if not found:
            raise ValueError(
                f"cannot exclude {wanted!r}: no parameter of the group has such a name or lies in "
                f"such a module; it has {in_short(sorted(names))}. Pass a pattern of names such "
                f"as 'head.*', a module's name, or a module."
            )
        excluded |= found
    return excluded
