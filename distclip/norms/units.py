"""Groups of elements smaller than the model: where the norm of each lies in one vector, and which norms travel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from distclip.errors import LayoutError
from distclip.policies import Policy, Scope
from distclip.sharding.layout import LocalParam
from distclip.sharding.shard import BlockShard, ParamShard, UnitView as View


@dataclass(frozen=True, slots=True)
class Span:
    """The units of one tensor that this rank holds elements of: norms[base : base + count].

    Attributes:
        held: the place of the parameter in its group.
        dim: of the tensor, whose indices are units; None if the tensor is one.
        first: the unit that norms[base] belongs to.
    """

    held: int
    part: ParamShard
    dim: int | None
    base: int
    first: int
    count: int

    def views(self, values: Tensor) -> Iterator[View]:
        """The pieces of a parameter's values in which units lie along one dim, and where their norms begin."""
        for piece, dim, unit in self.part.shard.unit_views(values, self.dim):
            yield piece, dim, self.base + unit - self.first


@dataclass(frozen=True)
class Units:
    """All spans of a group, and what is known of every norm that this rank keeps: tensors of shape [num].

    Attributes:
        counted: this rank adds the unit's elements to sums.
        limited: the policy does not leave the unit out.
        sizes: how many elements the unit has over all ranks; float64.
        cut: the places of the norms that travel, because a boundary between ranks cuts their unit.
        slots: the place of each of these among all that travel from ranks that hold the same parameters.
        num_slots: how many units are cut on this rank or on others that hold the same parameters.
    """

    spans: Sequence[Span]
    num: int
    num_slots: int
    counted: Tensor
    limited: Tensor
    sizes: Tensor
    cut: Tensor
    slots: Tensor

    def views(self, values: Sequence[Tensor | None]) -> Iterator[View]:
        """Those of all spans, from the values of the group's parameters; None has none."""
        for span in self.spans:
            if (held := values[span.held]) is not None:
                yield from span.views(held)

    def index_of(self, bases: list[int]) -> Tensor:
        """`bases` on the device, where they are already if the last call had the same: a copy there is waited for."""
        if self._latest.get("bases") != bases:
            self._latest.update(bases=bases, index=torch.tensor(bases, device=self.sizes.device))
        return self._latest["index"]

    @cached_property
    def _latest(self) -> dict[str, Any]:
        return {}

    @cached_property
    def spans_of(self) -> dict[int, list[Span]]:
        """By the place of the parameter in its group."""
        found: dict[int, list[Span]] = {}
        for span in self.spans:
            found.setdefault(span.held, []).append(span)
        return found

    @cached_property
    def row_names(self) -> list[str]:
        return [span.part.name for span in self.spans for _ in range(span.count)]


def make_units(members: Sequence[LocalParam], policy: Policy[Any], device: torch.device) -> Units:
    """The units of a policy's scope.

    Raises:
        LayoutError: a boundary between ranks may cut units, and nothing tells which.
        ValueError: `exclude` names nothing.
    """
    spans: list[Span] = []
    num = num_slots = 0
    for place, held in enumerate(members):
        for part in held.shards:
            dim = _unit_dim(part, policy)
            first, count = part.shard.unit_range(dim)
            spans.append(Span(place, part, dim, num, first, count))
            num += count
    cut: list[int] = []
    slots: list[int] = []
    for span in spans:
        travelling = span.part.shard.cut_units(span.dim)
        here = [(i, unit) for i, unit in enumerate(travelling) if span.first <= unit < span.first + span.count]
        cut += [span.base + unit - span.first for _, unit in here]
        slots += [num_slots + i for i, _ in here]
        num_slots += len(travelling)
    left_out = _excluded(members, getattr(policy, "exclude", ()))
    counts = torch.tensor([span.count for span in spans], dtype=torch.int64, device="cpu")

    def of_spans(numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device="cpu").repeat_interleave(counts).to(device)

    return Units(
        spans,
        num,
        num_slots,
        counted=of_spans([float(members[span.held].counted) for span in spans]) > 0,
        limited=of_spans([float(span.part.name not in left_out) for span in spans]) > 0,
        sizes=of_spans([span.part.numel / _num_units(span) for span in spans]),
        cut=torch.tensor(cut, dtype=torch.int64, device=device),
        slots=torch.tensor(slots, dtype=torch.int64, device=device),
    )


def _num_units(span: Span) -> int:
    return 1 if span.dim is None else max(1, span.part.global_shape[span.dim])


def _unit_dim(part: ParamShard, policy: Policy[Any]) -> int | None:
    if policy.scope is Scope.TENSOR or len(part.global_shape) < 2:
        return None
    if isinstance(part.shard, BlockShard) and part.shard.sharded_dims is None:
        raise LayoutError(
            f"cannot clip the units of {part.name!r}: its layout is declared by axes, which do not tell along which "
            f"dim its shards lie, so that a unit may be whole on this rank or cut. Make it a DTensor, whose placements "
            f"tell it, or give it a policy of another scope."
        )
    dim = getattr(policy, "unit_dim", 0)
    if dim == -1 and sum(size > 1 for size in part.global_shape) <= 1:
        return None  # optax takes such a tensor for a vector
    return dim % len(part.global_shape)


def _excluded(members: Sequence[LocalParam], exclude: Sequence[Any]) -> set[str]:
    """The names that `exclude` leaves out: patterns of names, names of modules, or modules."""
    names = {part.name for held in members for part in held.shards}
    left_out: set[str] = set()
    for wanted in exclude:
        if isinstance(wanted, nn.Module):
            inside = {id(param) for param in wanted.parameters()}
            found = {part.name for held in members if id(held.param) in inside for part in held.shards}
        else:
            found = {n for n in names if fnmatchcase(n, wanted) or n.startswith(f"{wanted}.")}
        if not found:
            raise ValueError(
                f"cannot exclude {wanted!r}: no parameter of the group has such a name or lies in such a module; it "
                f"has {_listed(sorted(names))}. Pass a pattern of names such as 'head.*', a module's name, or a module."
            )
        left_out |= found
    return left_out


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= 8 else [*names[:6], "...", names[-1]])
