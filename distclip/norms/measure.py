"""The partial sums that this rank adds to the norm. Nothing here communicates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter, is_
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from distclip import kernels
from distclip.kernels.kept_indices import KeptIndices
from distclip.norms import power_sums
from distclip.norms.plan import ParamGroup, Plan
from distclip.norms.power_sums import Power
from distclip.norms.units import Units, rows_of
from distclip.policies import Scope
from distclip.sharding.layout import LocalParam
from distclip.sharding.shard import UnitView

TensorLists = list[list[Tensor]]  # as `kernels.tensor_lists` returns them


class GroupMeasurement(NamedTuple):
    """What this rank measured of one parameter group.

    Attributes:
        payload: what is reduced: the partials of the total, of the sharded units and of their
            weights; float64, flat.
        names, per_tensor: of every parameter, or of every unit, a number that is not finite where
            the gradient is not: its sum of powers or its norm; float64. 0 without a gradient.
        units, weights: the partials of every unit on this rank, [num_units, num_partials]; None
            where the group has no units, or its policy does not ask for weights.
        tensor_lists: the memory of the gradients; None where nothing needed to know it.
        norm: of the group, where no other rank adds to it and the kernels have computed it.
        tensors: the partials of every tensor on this rank, [num_tensors, num_partials]; None where
            they are not wanted.
    """

    payload: Tensor
    names: Sequence[str]
    per_tensor: Tensor
    units: Tensor | None = None
    weights: Tensor | None = None
    tensor_lists: TensorLists | None = None
    norm: Tensor | None = None
    tensors: Tensor | None = None


def measure(
    gradients: Sequence[Tensor | None], plan: Plan, tensors: bool = False
) -> list[GroupMeasurement]:
    """Reads every gradient once, and every weight where a policy asks for its norm.

    Args:
        gradients: on this rank, in the order of `plan.params`; None where there is none.
        tensors: fill `tensors`. Nothing else changes, down to its bits.
    """
    found = [_measure_group(gradients, plan, group) for group in plan.groups]
    return with_tensors(found, gradients, plan) if tensors else found


def with_tensors(
    measured: Sequence[GroupMeasurement], gradients: Sequence[Tensor | None], plan: Plan
) -> list[GroupMeasurement]:
    """What was measured, and the partials of every tensor."""
    each = zip(plan.groups, plan.tensor_groups, measured, strict=True)
    return [
        found._replace(tensors=_tensor_partials(found, gradients, group, of_tensors))
        for group, of_tensors, found in each
    ]


def _tensor_partials(
    measured: GroupMeasurement,
    gradients: Sequence[Tensor | None],
    group: ParamGroup,
    of_tensors: ParamGroup,
) -> Tensor:
    units = cast(Units, of_tensors.units)
    if group.scope is Scope.TENSOR:
        return cast(Tensor, measured.units)
    if group.units is None and units.are_params:
        return power_sums.partials(measured.per_tensor, group.power)
    # Limits per unit, or several tensors in one parameter.
    return _unit_partials(gradients[group.members], group.power, units)


def tensor_slots(measured: GroupMeasurement, group: ParamGroup) -> Tensor:
    """What is reduced for a group of `Plan.tensor_groups`; float64, flat."""
    units, partials = cast(Units, group.units), cast(Tensor, measured.tensors)
    added = partials if group.counted is None else _added(partials, group, units)
    after = group.num_slots - group.first_slot - units.num_units
    if after or group.first_slot:
        added = pad(added, (0, 0, group.first_slot, after))
    return added.flatten()


def _measure_group(
    gradients: Sequence[Tensor | None], plan: Plan, group: ParamGroup
) -> GroupMeasurement:
    params, grads = plan.params[group.members], gradients[group.members]
    if group.units is not None:
        partials = _unit_partials(grads, group.power, group.units)
        return _of_units(partials, params, group, group.units)
    here, lists = [grad for grad in grads if grad is not None], None
    if plan.device.type != "cpu":
        lists = kernels.tensor_lists(here)
    if len(here) < len(grads):
        nothing = here[0].new_empty(0) if here else torch.empty(0, device=plan.device)
        here = [nothing if grad is None else grad for grad in grads]
    elif lists is not None and len(lists) == 1 and _are_same(lists[0], here):
        here = lists[0]  # it may know where its tensors lie, which is then looked up once
    return _of_tensors(_per_tensor(here, group.power, plan.device), group, plan, lists)


def _of_tensors(
    per_tensor: Tensor, group: ParamGroup, plan: Plan, lists: TensorLists | None = None
) -> GroupMeasurement:
    """What a number for each parameter gives; see `GroupMeasurement.per_tensor`."""
    added, names = per_tensor, plan.names[group.members]
    if group.counted is not None:  # copies add nothing but NaN and inf, which any of them may have
        added = torch.where(group.counted | ~per_tensor.isfinite(), per_tensor, 0.0)
    if plan.reduce_mesh is None and len(added) and not group.power.needs_norms:
        power_sum, norm = kernels.total(added, group.norm_type)
        payload = power_sum.unsqueeze(0)
        return GroupMeasurement(payload, names, per_tensor, tensor_lists=lists, norm=norm)
    return GroupMeasurement(_payload(added, group), names, per_tensor, tensor_lists=lists)


def _are_same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _payload(per_tensor: Tensor, group: ParamGroup) -> Tensor:
    """What is reduced of one number per tensor."""
    if len(per_tensor) and not (group.power.needs_norms or math.isinf(group.norm_type)):
        return kernels.total(per_tensor, group.norm_type).power_sum.unsqueeze(0)
    return power_sums.combine(power_sums.partials(per_tensor, group.power), group.norm_type)


def _of_units(
    partials: Tensor, params: Sequence[LocalParam], group: ParamGroup, units: Units
) -> GroupMeasurement:
    added = _added(partials, group, units)
    total = power_sums.combine(added, group.norm_type)
    payload, weights = [total, _in_slots(added, group, units)], None
    if group.needs_weights:
        counted = units.counted.unsqueeze(1)
        weights = _unit_partials([weights_of(param) for param in params], group.power, units)
        payload.append(_in_slots(torch.where(counted, weights, 0.0), group, units))
    flat = torch.cat([part.flatten() for part in payload])
    norms = power_sums.norm_from_partials(partials, group.power)
    return GroupMeasurement(flat, units.row_names, norms, partials, weights)


def _added(partials: Tensor, group: ParamGroup, units: Units) -> Tensor:
    """What this rank adds to the sums of units: of copies nothing but what is not finite."""
    if math.isinf(group.norm_type):  # copies leave a maximum as it is
        return partials
    return torch.where(units.counted.unsqueeze(1) | ~partials.isfinite(), partials, 0.0)


def weights_of(param: LocalParam) -> Tensor | None:
    """None for what has no gradient to limit: its values may be yet to be made, or NaN."""
    tensor = param.param
    is_frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    return None if tensor.is_meta or (is_frozen and tensor.grad is None) else param.weights


def _in_slots(partials: Tensor, group: ParamGroup, units: Units) -> Tensor:
    slots = partials.new_zeros(group.num_slots, partials.shape[1])
    slots[group.first_slot + units.slots] = partials[units.sharded]
    return slots


def _unit_partials(values: Sequence[Tensor | None], power: Power, units: Units) -> Tensor:
    return _partials_of_rows(list(units.views(values)), 0, units.num_units, power, units)


def _add_units_(partials: Tensor, views: Iterable[UnitView], power: Power, units: Units) -> None:
    """Combines what views hold with the partials of their rows, in place and without a wait."""
    if not (views := list(views)):
        return
    rows = rows_of(views)
    first, end = min(r.first for r in rows), max(r.first + r.count for r in rows)
    more = _partials_of_rows(views, first, end - first, power, units)
    power_sums.combine_rows_(partials[first:end], more, power.norm_type)


def _partials_of_rows(
    views: Sequence[UnitView], first: int, num_rows: int, power: Power, units: Units
) -> Tensor:
    """The partials of `num_rows` units from `first`; zeros where no view holds elements."""
    device = units.sizes.device
    if not views:
        return torch.zeros(num_rows, power.num_partials, dtype=torch.float64, device=device)
    per_unit = _per_unit([v.values for v in views], [v.dim for v in views], power, device)
    index = units.indexes.of_rows(rows_of(views), first, num_rows)
    return power_sums.gathered(power_sums.partials(per_unit, power), index, power.norm_type)


def _per_tensor(values: Sequence[Tensor], power: Power, device: torch.device) -> Tensor:
    """Of each tensor, on any device, what `power_sums.partials` takes; together on `device`."""
    if device.type == "cpu" and all(map(attrgetter("is_cpu"), values)):
        kernel = kernels.norms if power.needs_norms else kernels.power_sums
        return kernel(values, power.norm_type)
    return _per_unit(values, [None] * len(values), power, device)


def _per_unit(
    values: Sequence[Tensor], dims: Sequence[int | None], power: Power, device: torch.device
) -> Tensor:
    """As `_per_tensor`, for every index of the dim of each tensor."""
    kernel = kernels.unit_norms if power.needs_norms else kernels.unit_power_sums
    devices = dict.fromkeys(v.device for v in values)
    if len(devices) <= 1:
        return kernel(values, dims, power.norm_type).to(device)
    each: dict[torch.device, Iterator[Tensor]] = {}
    for there in devices:
        here = [(v, dim) for v, dim in zip(values, dims, strict=True) if v.device == there]
        counts = [1 if dim is None else v.shape[dim] for v, dim in here]
        found = kernel([v for v, _ in here], [dim for _, dim in here], power.norm_type)
        each[there] = iter(torch.split(found.to(device), counts))
    return torch.cat([next(each[v.device]) for v in values])


class NormBuffer:
    """The measurements of one group's gradients, written at different times.

    Attributes:
        per_tensor: as `GroupMeasurement.per_tensor`, of every parameter; or the partials of every
            unit, [num_units, num_partials]. What was not put counts as zero.
    """

    def __init__(self, group: ParamGroup, plan: Plan) -> None:
        self._group, self._plan = group, plan
        self._params = plan.params[group.members]
        shape = [len(self._params)]
        if group.units is not None:
            shape = [group.units.num_units, group.power.num_partials]
        self.per_tensor = torch.zeros(shape, dtype=torch.float64, device=plan.device)
        self._rows = KeptIndices(plan.device)  # the same come together in every step

    def put_many(self, members: Sequence[int], grads: Sequence[Tensor]) -> None:
        """Measures the gradients of these members of the group together, without a wait.

        One by one in groups with units.
        """
        power, units = self._group.power, self._group.units
        if units is None:
            per_tensor = _per_tensor(grads, power, self._plan.device)
            self.per_tensor.index_copy_(0, self._rows.on_device(members), per_tensor)
            return
        self.clear(members)
        for member, grad in zip(members, grads, strict=True):
            for span in units.spans_of[member]:
                _add_units_(self.per_tensor, span.views(grad), power, units)

    def put_measured(self, rows: Tensor, measured: GroupMeasurement) -> None:
        """Keeps what was measured of a part of the group; see `plan.PlanOfMembers`."""
        per_row = measured.per_tensor if measured.units is None else measured.units
        self.per_tensor.index_copy_(0, rows, per_row)

    def clear_all(self) -> None:
        """From now on everything counts as zero."""
        self.per_tensor.zero_()

    def clear(self, members: Sequence[int]) -> None:
        """From now on these count as zero."""
        if (units := self._group.units) is None:
            self.per_tensor.index_fill_(0, self._rows.on_device(members), 0.0)
            return
        for span in (span for member in members for span in units.spans_of[member]):
            self.per_tensor[span.row : span.row + span.count] = 0.0

    def refresh(self, members: Sequence[int], grads: Sequence[Tensor], changed: Tensor) -> None:
        """Measures again where `changed`, a bool for each, is true; without a wait.

        For groups without units.
        """
        p, rows = self._group.norm_type, self._rows.on_device(members)
        before = self.per_tensor.index_select(0, rows)
        if self._group.power.needs_norms:
            now = torch.where(changed, kernels.norms(grads, p), before)
        else:
            now = kernels.power_sums_where(grads, p, changed, before)
        self.per_tensor.index_copy_(0, rows, now)

    def measurement(self, rest: Sequence[Tensor | None]) -> GroupMeasurement:
        """Of what was put, and of the other gradients, which are measured now.

        Args:
            rest: in the order of `plan.params`, as `measure` takes them; None for what was put.
        """
        group, per_tensor = self._group, self.per_tensor.clone()
        grads = rest[group.members]
        if (units := group.units) is not None:
            _add_units_(per_tensor, units.views(grads), group.power, units)
            return _of_units(per_tensor, self._params, group, units)
        if any(grad is not None for grad in grads):
            per_tensor += _measure_group(rest, self._plan, group).per_tensor  # one of them is 0
        return _of_tensors(per_tensor, group, self._plan)
