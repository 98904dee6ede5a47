"""From local to total: the one collective of a step, and the root that follows it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.norms import power_sums as powers

if TYPE_CHECKING:
    from distclip.norms.plan import Group, Plan

T = TypeVar("T")


def all_reduce_(numbers: Tensor, plan: Plan) -> None:
    """Joins the numbers of all ranks in place; the same bits on every rank afterwards.

    Shapes: numbers: those of all groups, float64, flat.
    Collective: one over the team: an all-reduce, or an all-gather where some groups take sums and others maxima;
        none if the plan has no team.
    """
    if plan.reduce_mesh is None:
        return
    maxima = [math.isinf(group.norm_type) for group in plan.groups]
    if all(maxima) or not any(maxima):
        dist.all_reduce(numbers, dist.ReduceOp.MAX if any(maxima) else dist.ReduceOp.SUM, group=plan.reduce_mesh.group)
        return
    everyone = numbers.new_empty(dist.get_world_size(plan.reduce_mesh.group), len(numbers))
    dist.all_gather(list(everyone.unbind()), numbers, group=plan.reduce_mesh.group)
    parts = torch.split(everyone, [group.num_numbers for group in plan.groups], dim=1)
    joined = [part.amax(0) if maximum else part.sum(0) for part, maximum in zip(parts, maxima, strict=True)]
    numbers.copy_(torch.cat(joined))


class GroupNorms(NamedTuple):
    """The norms of one group, float64: its total, and those of its units and of their weights, if it has any."""

    total: Tensor
    units: Tensor | None
    weights: Tensor | None

    def times(self, inverse_scale: Tensor) -> GroupNorms:
        """As if the gradients had been unscaled before."""
        units = None if self.units is None else self.units * inverse_scale
        return GroupNorms(self.total * inverse_scale, units, self.weights)


def norms(
    numbers: Tensor, units: Sequence[Tensor | None], weights: Sequence[Tensor | None], plan: Plan
) -> list[GroupNorms]:
    """The norms of each group, from joined numbers and the columns of this rank's own units."""
    sizes = [group.num_numbers for group in plan.groups]
    parts = [numbers] if len(sizes) == 1 else torch.split(numbers, sizes)
    return [_joined(*each) for each in zip(plan.groups, parts, units, weights, strict=True)]


def _joined(group: Group, numbers: Tensor, units: Tensor | None, weights: Tensor | None) -> GroupNorms:
    if units is None:
        return GroupNorms(powers.root(numbers, group.norm_type), None, None)
    columns = numbers.view(-1, powers.num_columns(group.norm_type))
    total = powers.root(columns[0], group.norm_type)
    travelled = torch.split(columns[1:], group.num_slots) if group.num_slots else (columns[1:], columns[1:])
    return GroupNorms(
        total,
        _complete(units, travelled[0], group),
        None if weights is None else _complete(weights, travelled[1], group),
    )


def _complete(columns: Tensor, travelled: Tensor, group: Group) -> Tensor:
    """The norms of this rank's units, those of cut ones from all ranks."""
    assert group.units is not None
    complete = columns.clone()
    complete[group.units.cut] = travelled[group.first_slot + group.units.slots]
    return powers.root(complete, group.norm_type)


def sum_(sums: Tensor, groups: Sequence[dist.ProcessGroup]) -> None:
    """Adds up `sums` over the ranks of each group in turn, in place.

    Collective: one all-reduce a group.
    """
    for group in groups:
        dist.all_reduce(sums, group=group)


def gathered(mine: Any, plan: Plan) -> dict[int, Any]:
    """`mine` of every rank, by global rank. For what happens rarely: after a failure on all ranks together.

    Collective: an all-gather of objects over the team; none if the plan has no team.
    """
    if plan.reduce_mesh is None:
        return {dist.get_rank() if dist.is_initialized() else 0: mine}
    return all_gather_objects(mine, plan.reduce_mesh.group)


def all_gather_objects(mine: T, group: dist.ProcessGroup) -> dict[int, T]:
    """`mine` of every rank, by global rank."""
    ranks = dist.get_process_group_ranks(group)
    everyone: list[Any] = [None] * len(ranks)
    dist.all_gather_object(everyone, mine, group=group)
    return dict(zip(ranks, everyone, strict=True))
