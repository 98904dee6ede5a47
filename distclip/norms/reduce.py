"""From local to total: the one collective of a step, and the norms that follow from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.norms import power_sums
from distclip.norms.agreement import HEADER_SIZE, Header, decode, encode
from distclip.norms.loss import average_loss, loss_slots, mean_loss
from distclip.norms.measure import GroupMeasurement, tensor_slots
from distclip.norms.plan import LOSS_SIZE, ParamGroup, Plan
from distclip.norms.shared_errors import disagreement
from distclip.sharding.failures import first_form
from distclip.sharding.rank_group import combine
from distclip.torch_private import has_values, host_has_values, is_capturing

T = TypeVar("T")
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class GroupNorms(NamedTuple):
    """The norms of one group, float64: its total, and those of its units and of their weights.

    Attributes:
        tensors: the norms of all tensors of the model, in the order of
            `ParamGroup.tensor_names`; None where they are not wanted.

    Shapes: total: []; units, weights: [num_units], None where the group has none.
    """

    total: Tensor
    units: Tensor | None
    weights: Tensor | None
    tensors: Tensor | None = None

    def scaled(self, scale: Tensor) -> GroupNorms:
        """The norms of the gradients times `scale`."""
        units = None if self.units is None else self.units * scale
        tensors = None if self.tensors is None else self.tensors * scale
        return GroupNorms(self.total * scale, units, self.weights, tensors)


class Totals(NamedTuple):
    """The norms of all groups, and what the ranks said beside their sums.

    Attributes:
        norms: of each group.
        reduce_gradients: some rank has gradients that must be reduced before they are measured.
        alike: all ranks have the same ones.
        fault: some rank has found an error that others cannot see.
        loss: the mean of the ranks' losses, NaN where none gave one; a float64 scalar. None where
            no policy judges it, or there is none and nothing is reduced.
    """

    norms: list[GroupNorms]
    reduce_gradients: bool
    alike: bool
    fault: bool
    loss: Tensor | None = None


def total_norms(
    measured: Sequence[GroupMeasurement],
    plan: Plan,
    header: Header,
    tensors: bool = False,
    loss: Tensor | None = None,
) -> Totals:
    """The norms of each group over all ranks; the same bits on every rank.

    Args:
        tensors: and of each tensor, which `measured` has the sums of.
        loss: this rank's, a float64 scalar on the plan's device.

    Raises:
        LayoutError: on every rank, where the ranks do not mean the same call. On an accelerator the
            norms are NaN in this step, and the error follows some steps later.

    Collective: one over the reduce mesh: an all-reduce, or an all-gather where some groups take
        sums and others maxima; one along each axis where no process group has exactly its ranks;
        none if the plan has no reduce mesh.
    """
    payload, of_tensors = [group.payload for group in measured], plan.tensor_groups
    if tensors:
        payload += [tensor_slots(*each) for each in zip(measured, of_tensors, strict=True)]
    mean = None
    if plan.reduce_mesh is None:
        parts, flags = (
            payload,
            _Flags(bool(header.unreduced) or header.missing, False, header.fault),
        )
        if plan.judges_loss and loss is not None:
            mean = average_loss(loss, plan)
    else:
        if plan.judges_loss:
            payload.append(loss_slots(loss, plan.device))
        reduced, flags = _reduce(payload, plan, header, tensors)
        parts = torch.split(reduced, [len(part) for part in payload])
        if plan.judges_loss:
            *parts, slots = parts
            mean = mean_loss(slots)
    each = zip(plan.groups, parts[: len(measured)], measured, strict=True)
    norms = [_norms(*one) for one in each]
    if tensors:
        each = zip(norms, of_tensors, parts[len(measured) :], strict=True)
        norms = [_with_tensor_norms(*one) for one in each]
    return Totals(norms, *flags, mean)


class _Flags(NamedTuple):
    reduce_gradients: bool
    alike: bool
    fault: bool


def _reduce(
    payload: Sequence[Tensor], plan: Plan, header: Header, tensors: bool
) -> tuple[Tensor, _Flags]:
    """The payloads of all groups, combined over the ranks, and what the ranks said beside them.

    On an accelerator, where nobody looks now, they become NaN where the ranks do not agree.
    """
    assert plan.reduce_mesh is not None
    ranks = plan.reduce_mesh.rank_group
    groups = [*plan.groups, *plan.tensor_groups] if tensors else plan.groups
    is_max = [math.isinf(group.norm_type) for group in groups]
    if plan.judges_loss:
        is_max.append(False)
    num_filled = HEADER_SIZE + sum(map(len, payload))
    call = header, all(is_max), ranks.num_combined
    encoded = encode(*call, plan.message_size - num_filled, payload[0])
    parts = [encoded.header, *payload, encoded.filling]
    message = _combined(parts, [all(is_max), *is_max, all(is_max)], plan, header.text)
    first, reduced = message[:HEADER_SIZE], message[HEADER_SIZE:num_filled]
    if not host_has_values(message):
        reduced = reduced.masked_fill(encoded.is_wrong(first), math.nan)
    return reduced, _read(first, plan, *call)


def _combined(parts: Sequence[Tensor], is_max: Sequence[bool], plan: Plan, call: str) -> Tensor:
    """The parts of all ranks, one after the other: of some the maxima, of others the sums."""
    assert plan.reduce_mesh is not None
    ranks = plan.reduce_mesh.rank_group
    plan.calls.number += 1
    doing = f"{call}; call {plan.calls.number}"
    if plan.one_shot is not None and has_values(parts[0]):
        messages = plan.one_shot.all_gather(parts)
    else:
        message = torch.cat([*parts])
        mixed = any(is_max) and not all(is_max)
        how = "gather" if mixed else "max" if is_max[0] else "sum"
        if plan.calls.number == 1 and plan.rule:
            _check_form(message, how, plan, call)
        if how != "gather":
            ranks.all_reduce_(message, _OPS[how], doing=doing)
            return message
        messages = ranks.all_gather(message, doing=doing)
    runs = [[*run] for _, run in groupby(zip(is_max, parts, strict=True), itemgetter(0))]
    columns = torch.split(messages, [sum(len(part) for _, part in run) for run in runs], dim=1)
    found = [combine(each, run[0][0]) for each, run in zip(columns, runs, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found)


def _check_form(message: Tensor, how: str, plan: Plan, call: str) -> None:
    """Raises the LayoutError of `total_norms` where the first message of a Clipper fits no other.

    A rank that finds another form in the store sends its header in that one: all ranks then find
    that the tags differ, and nobody gets a message of another length.

    Collective: none; where ranks have other forms, what they take for that of the step.
    """
    assert plan.reduce_mesh is not None
    ranks = plan.reduce_mesh.rank_group
    if len(ranks.lines) != 1 or ranks.is_fake or not host_has_values(message):
        return
    form = f"{how} of {len(message)} numbers"
    first = first_form(ranks.lines[0].group, form)
    if first == form:
        return
    call = f"{call}; {form}"
    how, _, size, _ = first.split()
    mine = message.new_tensor(Header(call).numbers(how == "max"))[:2]
    numbers = torch.cat([mine, message.new_zeros(int(size) - len(mine))])
    if how == "gather":
        agrees = bool((ranks.all_gather(numbers, doing=call)[:, :2] == mine).all())
    else:
        ranks.all_reduce_(numbers, _OPS[how], doing=call)
        agrees = numbers[:2].equal(mine if how == "max" else mine * ranks.num_combined)
    if not agrees:  # else the store had the form of another start, which they all have taken
        raise disagreement(plan, call)


def _read(first: Tensor, plan: Plan, header: Header, is_max: bool, num_ranks: int) -> _Flags:
    """What the ranks said: now if the host has it or must look, else some steps ago.

    Raises:
        LayoutError: the ranks do not mean the same call.

    Shapes: first: [HEADER_SIZE], combined over the ranks.
    """
    calls = plan.calls
    # What a rank lacks or has yet to reduce others cannot see, so all of them look or none.
    looks = not calls.is_settled and has_values(first)
    if host_has_values(first) or (looks and not is_capturing(first.device)):
        answer = decode(cast("list[float]", first.tolist()), header, is_max, num_ranks)
        # Whether a gradient has to be reduced depends on how the model is written, and not on its
        # input: where all were here and none had to, the host need not look again. Once reduced,
        # none has to in the second all-reduce of the step, but in the next step again.
        calls.reduces |= answer.unreduced
        calls.is_settled = not (calls.reduces or answer.missing)
        flags = _Flags(answer.unreduced, answer.alike and not answer.missing, answer.fault)
    else:
        late = calls.late.read_all(first, header)
        answer = None if late is None else decode(late.numbers, late.about, is_max, num_ranks)
        flags = _Flags(False, True, header.fault or (answer is not None and answer.is_wrong))
    if answer is not None and not answer.agrees:
        raise disagreement(plan, header.text)
    return flags


def check_same_call(plan: Plan, call: str) -> None:
    """Raises the LayoutError of `total_norms` where a rank means another call; waits.

    What meets it is the same, or the first step of a rank that does not ask for norms per tensor:
    both send messages of one size, and all ranks raise.

    Collective: that of a step.
    """
    if plan.reduce_mesh is None:
        return
    sizes = [group.payload_size for group in plan.groups] + [LOSS_SIZE] * plan.judges_loss
    nothing = torch.zeros(sum(sizes), dtype=torch.float64, device=plan.device)
    ranks = plan.reduce_mesh.rank_group
    is_max = [math.isinf(group.norm_type) for group in plan.groups] + [False] * plan.judges_loss
    header, num_filling = Header(call), plan.message_size - HEADER_SIZE - len(nothing)
    encoded = encode(header, all(is_max), ranks.num_combined, num_filling, nothing)
    parts = [encoded.header, *torch.split(nothing, sizes), encoded.filling]
    of_header = all(is_max)
    first = _combined(parts, [of_header, *is_max, of_header], plan, call)[:HEADER_SIZE]
    if not has_values(first):
        return
    reduced = cast("list[float]", first.tolist())
    if not decode(reduced, header, all(is_max), ranks.num_combined).agrees:
        raise disagreement(plan, call)


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
    doing = "comparing what has happened to gradients since the norm was measured"
    plan.reduce_mesh.rank_group.all_reduce_(largest.view(1), dist.ReduceOp.MAX, doing=doing)
    return int(largest)


def _norms(group: ParamGroup, reduced: Tensor, measured: GroupMeasurement) -> GroupNorms:
    if measured.norm is not None:
        return GroupNorms(measured.norm, None, None)
    if measured.units is None:
        return GroupNorms(power_sums.norm_from_partials(reduced, group.power), None, None)
    rows = reduced.view(-1, group.power.num_partials)
    total = power_sums.norm_from_partials(rows[0], group.power)
    of_units = rows[1 : 1 + group.num_slots]
    of_weights = rows[1 + group.num_slots :]
    weights = None
    if measured.weights is not None:
        weights = _unit_norms(measured.weights, of_weights, group)
    return GroupNorms(total, _unit_norms(measured.units, of_units, group), weights)


def _with_tensor_norms(norms: GroupNorms, group: ParamGroup, slots: Tensor) -> GroupNorms:
    partials = slots.view(-1, group.power.num_partials)
    return norms._replace(tensors=power_sums.norm_from_partials(partials, group.power))


def _unit_norms(partials: Tensor, slots: Tensor, group: ParamGroup) -> Tensor:
    """The norms of this rank's units; those of sharded units from the sums of all ranks."""
    assert group.units is not None
    complete = partials.clone()
    complete[group.units.sharded] = slots[group.first_slot + group.units.slots]
    return power_sums.norm_from_partials(complete, group.power)
