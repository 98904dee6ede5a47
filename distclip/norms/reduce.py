"""From local to total: the one collective of a step, and the norms that follow from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.norms import power_sums
from distclip.norms.measure import GroupMeasurement
from distclip.norms.plan import ParamGroup, Plan
from distclip.sharding.mesh import all_gather_objects

T = TypeVar("T")
RankGroup: TypeAlias = dist.ProcessGroup


class GroupNorms(NamedTuple):
    """The norms of one group, float64: its total, and those of its units and of their weights.

    Shapes: total: []; units, weights: [num_units], None where the group has none.
    """

    total: Tensor
    units: Tensor | None
    weights: Tensor | None

    def scaled(self, scale: Tensor) -> GroupNorms:
        """The norms of the gradients times `scale`."""
        units = None if self.units is None else self.units * scale
        return GroupNorms(self.total * scale, units, self.weights)


def total_norms(measured: Sequence[GroupMeasurement], plan: Plan) -> list[GroupNorms]:
    """The norms of each group over all ranks; the same bits on every rank.

    Collective: see `all_reduce_`.
    """
    reduced = torch.cat([group.payload for group in measured])
    all_reduce_(reduced, plan)
    parts = [reduced]
    if len(plan.groups) > 1:
        parts = list(torch.split(reduced, [group.payload_size for group in plan.groups]))
    return [_norms(*each) for each in zip(plan.groups, parts, measured, strict=True)]


def all_reduce_(payload: Tensor, plan: Plan) -> None:
    """Combines the payloads of all ranks in place; the same bits on every rank afterwards.

    Shapes: payload: those of all groups, one after the other; float64, flat.
    Collective: one over the reduce mesh: an all-reduce, or an all-gather where some groups take
        sums and others maxima; none if the plan has no reduce mesh.
    """
    if plan.reduce_mesh is None:
        return
    process_group = plan.reduce_mesh.group
    is_max = [math.isinf(group.norm_type) for group in plan.groups]
    if all(is_max) or not any(is_max):
        op = dist.ReduceOp.MAX if any(is_max) else dist.ReduceOp.SUM
        dist.all_reduce(payload, op, group=process_group)
        return
    everyone = payload.new_empty(dist.get_world_size(process_group), len(payload))
    dist.all_gather(list(everyone.unbind()), payload, group=process_group)
    parts = torch.split(everyone, [group.payload_size for group in plan.groups], dim=1)
    combined = [p.amax(0) if is_ else p.sum(0) for p, is_ in zip(parts, is_max, strict=True)]
    payload.copy_(torch.cat(combined))


def sum_(sums: Tensor, groups: Sequence[dist.ProcessGroup]) -> None:
    """Adds up `sums` over the ranks of each process group in turn, in place.

    Collective: one all-reduce for each group.
    """
    for group in groups:
        dist.all_reduce(sums, group=group)


def maximum_of_ranks(number: int, plan: Plan) -> int:
    """The largest of the ranks' numbers. Waits for the device.

    Collective: one all-reduce over the reduce mesh; none if the plan has no reduce mesh.
    """
    if plan.reduce_mesh is None:
        return number
    largest = torch.tensor(number, dtype=torch.int64, device=plan.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=plan.reduce_mesh.group)
    return int(largest)


def rank_group(plan: Plan) -> RankGroup | None:
    """The ranks that a plan's sums are reduced over; None for this rank alone."""
    return None if plan.reduce_mesh is None else plan.reduce_mesh.group


def gather_objects(mine: T, group: RankGroup | None) -> dict[int, T]:
    """`mine` of every rank, by global rank. For what is rare, such as a failure on all ranks.

    Collective: an all-gather of objects over `group`; none where it is None.
    """
    if group is None:
        return {dist.get_rank() if dist.is_initialized() else 0: mine}
    return all_gather_objects(mine, group)


def _norms(group: ParamGroup, reduced: Tensor, measured: GroupMeasurement) -> GroupNorms:
    if measured.units is None:
        return GroupNorms(power_sums.norm_from_partials(reduced, group.norm_type), None, None)
    rows = reduced.view(-1, power_sums.num_partials(group.norm_type))
    total = power_sums.norm_from_partials(rows[0], group.norm_type)
    of_units = rows[1 : 1 + group.num_slots]
    of_weights = rows[1 + group.num_slots :]
    weights = None
    if measured.weights is not None:
        weights = _unit_norms(measured.weights, of_weights, group)
    return GroupNorms(total, _unit_norms(measured.units, of_units, group), weights)


def _unit_norms(partials: Tensor, slots: Tensor, group: ParamGroup) -> Tensor:
    """The norms of this rank's units; those of sharded units from the sums of all ranks."""
    assert group.units is not None
    complete = partials.clone()
    complete[group.units.sharded] = slots[group.first_slot + group.units.slots]
    return power_sums.norm_from_partials(complete, group.norm_type)
