"""The partial sums that this rank adds to the norm. Nothing here communicates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from operator import is_
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from distclip import kernels
from distclip.kernels.kept_indices import KeptIndices
from distclip.norms import power_sums
from distclip.norms.plan import ParamGroup, Plan
from distclip.norms.power_sums import Power
from distclip.norms.unit_rows import Rows
from distclip.norms.units import Units, rows_of
from distclip.sharding.layout import LocalParam
from distclip.sharding.shard import UnitView
from distclip.torch_private import host_has_values

TensorLists = list[list[Tensor]]  # as `kernels.tensor_lists` returns them


class GroupMeasurement(NamedTuple):
    """What this rank measured of one parameter group.

    Attributes:
        payload: what is reduced: the partials of the total, of the sharded units and of their
            weights; float64, flat.
        names, per_tensor: of every parameter that has a gradient, or of every unit, a number that
            is not finite where the gradient is not: its sum of powers or its norm; float64. Empty
            where all are finite and a number for each would take longer.
        units, weights: the partials of every unit on this rank, [num_units, num_partials]; None
            where the group has no units, or its policy does not ask for weights.
        tensor_lists: the memory of the gradients; None where it was not looked at.
        norm: of the group, where no other rank adds to it and the kernels have computed it.
        tensors: the partials of every tensor on this rank, [num_tensors, num_partials]; None where
            they are not wanted, or where the group's units are its tensors.
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
    gradients: Sequence[Tensor | None],
    plan: Plan,
    per_tensor: bool = False,
    tensors: bool = False,
) -> list[GroupMeasurement]:
    """Reads every gradient once, and every weight where a policy asks for its norm.

    Args:
        gradients: on this rank, in the order of `plan.params`; None where there is none.
        per_tensor: fill `names` and `per_tensor` in any case.
        tensors: fill `tensors`. Nothing else changes, down to its bits.
    """
    of_tensors = plan.tensor_groups if tensors else [None] * len(plan.groups)
    groups = zip(plan.groups, of_tensors, strict=True)
    found = [_measure_group(gradients, plan, *each, per_tensor) for each in groups]
    return with_tensors(found, gradients, plan) if tensors else found


def with_tensors(
    measured: Sequence[GroupMeasurement], gradients: Sequence[Tensor | None], plan: Plan
) -> list[GroupMeasurement]:
    """What was measured, and the partials of every tensor. Reads gradients again if need be."""
    return [
        each
        if of_tensors is group or each.tensors is not None
        else each._replace(tensors=_tensor_partials(gradients, plan, of_tensors, each))
        for group, of_tensors, each in zip(plan.groups, plan.tensor_groups, measured, strict=True)
    ]


def _tensor_partials(
    gradients: Sequence[Tensor | None],
    plan: Plan,
    group: ParamGroup,
    measured: GroupMeasurement,
) -> Tensor:
    units, grads = cast(Units, group.units), gradients[group.members]
    here = [i for i, grad in enumerate(grads) if grad is not None]
    is_known = here and units.are_params and len(measured.per_tensor) == len(here)
    if not is_known or measured.units is not None:
        return _unit_partials(grads, group.power, units)
    if group.has_copies:  # in the order of `_measure_each`
        params = plan.params[group.members]
        here.sort(key=lambda i: not params[i].counted)
    index = units.indexes.of_rows(tuple([Rows(i, 1) for i in here]), 0, units.num_units)
    partials = power_sums.partials(measured.per_tensor, group.power)
    return power_sums.gathered(partials, index, group.norm_type)


def tensor_slots(measured: GroupMeasurement, group: ParamGroup) -> Tensor:
    """What is reduced of the tensors of a group of `Plan.only_measured`; float64, flat."""
    units, partials = cast(Units, group.units), cast(Tensor, measured.tensors)
    added = _added(partials, group, units) if group.has_copies else partials
    if units.all_in_slots and group.num_slots == units.num_slots:
        return added.flatten()
    return _in_slots(added, group, units).flatten() if group.num_slots else added[:0, 0]


def _measure_group(
    gradients: Sequence[Tensor | None],
    plan: Plan,
    group: ParamGroup,
    of_tensors: ParamGroup | None,
    per_tensor: bool,
) -> GroupMeasurement:
    params, grads = plan.params[group.members], gradients[group.members]
    if group.units is not None:
        partials = _unit_partials(grads, group.power, group.units)
        return _of_units(partials, params, group, group.units)
    # An accelerator's kernels give a number for each tensor at no cost.
    if not per_tensor and plan.device.type == "cpu" and not group.power.needs_norms:
        together = _measure_together(params, grads, group, of_tensors, plan.device)
        added = together.payload.sum()
        if not host_has_values(added) or math.isfinite(added.item()):
            return together
    return _measure_each(params, grads, group, plan)


def _measure_together(
    params: Sequence[LocalParam],
    grads: Sequence[Tensor | None],
    group: ParamGroup,
    of_tensors: ParamGroup | None,
    device: torch.device,
) -> GroupMeasurement:
    counted, copies = _by_counted(params, grads, group)
    lists, lists_of_copies = kernels.tensor_lists(counted), kernels.tensor_lists(copies)
    p, tensors = group.norm_type, None
    if of_tensors is not None and all(each.is_cpu for each in [*counted, *copies]):
        both, tensors = _sums_and_tensors(lists, lists_of_copies, params, grads, of_tensors)
        sums = both[: len(lists)] + list(map(_only_nonfinite, both[len(lists) :]))
    else:
        sums = [kernels.power_sum(each, p).to(device) for each in lists]
        sums += [_only_nonfinite(kernels.power_sum(each, p).to(device)) for each in lists_of_copies]
    added = torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64, device=device)
    payload = power_sums.combine(power_sums.partials(added, group.power), p)
    lists += lists_of_copies
    return GroupMeasurement(payload, [], added[:0], tensor_lists=lists, tensors=tensors)


def _sums_and_tensors(
    lists: TensorLists,
    lists_of_copies: TensorLists,
    params: Sequence[LocalParam],
    grads: Sequence[Tensor | None],
    group: ParamGroup,
) -> tuple[list[Tensor], Tensor]:
    """The sum of each list, as `power_sum` has it, and the partials of every tensor."""
    units = cast(Units, group.units)
    given = [grad for grad in grads if grad is not None]
    if units.are_params and len(lists) == 1 and not lists_of_copies and len(given) == len(grads):
        together, each = kernels.power_sum_and_each(lists[0], given, group.norm_type)
        return [together], power_sums.partials(each, group.power)
    views_of: dict[tuple[bool, torch.dtype], list[UnitView]] = {}
    for span in units.spans:
        if (grad := grads[span.member]) is not None:
            key = params[span.member].counted, grad.dtype
            views_of.setdefault(key, []).extend(span.views(grad))
    sums: list[Tensor] = []
    of_views: list[Tensor] = [torch.zeros(0, dtype=torch.float64, device="cpu")]
    views: list[UnitView] = []
    counted = [(True, tensors) for tensors in lists]
    for is_counted, tensors in [*counted, *((False, each) for each in lists_of_copies)]:
        here = views_of.get((is_counted, tensors[0].dtype), [])
        values = [view.values for view in here]
        together, each = kernels.power_sum_and_each(tensors, values, group.norm_type)
        sums.append(together)
        of_views.append(each)
        views += here
    if not views:
        return sums, _unit_partials([None] * len(grads), group.power, units)
    index = units.indexes.of_rows(rows_of(views), 0, units.num_units)
    partials = power_sums.partials(torch.cat(of_views), group.power)
    return sums, power_sums.gathered(partials, index, group.norm_type)


def _measure_each(
    params: Sequence[LocalParam],
    grads: Sequence[Tensor | None],
    group: ParamGroup,
    plan: Plan,
) -> GroupMeasurement:
    counted, copies = _by_counted(params, grads, group)
    lists, lists_of_copies = kernels.tensor_lists(counted), kernels.tensor_lists(copies)
    # A list of a backend may know where its tensors lie, which is then looked up once.
    listed = lists[0] if len(lists) == 1 and _are_same(lists[0], counted) else counted
    added = per_tensor = _per_tensor(listed, group.power, plan.device)
    if copies:
        of_copies = _per_tensor(copies, group.power, plan.device)
        per_tensor = torch.cat([added, of_copies])
        added = torch.cat([added, _only_nonfinite(of_copies)])
    lists += lists_of_copies
    all_counted = len(counted) == len(grads)
    names = plan.names[group.members] if all_counted else _names(params, grads)
    if plan.reduce_mesh is None and len(added) and not group.power.needs_norms:
        power_sum, norm = kernels.total(added, group.norm_type)
        return GroupMeasurement(power_sum.unsqueeze(0), names, per_tensor, None, None, lists, norm)
    payload = _payload(added, group)
    return GroupMeasurement(payload, names, per_tensor, tensor_lists=lists)


def _names(params: Sequence[LocalParam], grads: Sequence[Tensor | None]) -> list[str]:
    """The names of those that have a gradient, first of those that this rank counts."""
    here = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
    return [p.name for p in here if p.counted] + [p.name for p in here if not p.counted]


def _are_same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _payload(per_tensor: Tensor, group: ParamGroup) -> Tensor:
    """What is reduced of one number per tensor."""
    if len(per_tensor) and not (group.power.needs_norms or math.isinf(group.norm_type)):
        return kernels.total(per_tensor, group.norm_type).power_sum.unsqueeze(0)
    return power_sums.combine(power_sums.partials(per_tensor, group.power), group.norm_type)


def _by_counted(
    params: Sequence[LocalParam], grads: Sequence[Tensor | None], group: ParamGroup
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients that this rank counts, and those that another rank counts."""
    if not group.has_copies:
        return [grad for grad in grads if grad is not None], []
    both = [(p.counted, grad) for p, grad in zip(params, grads, strict=True) if grad is not None]
    return [grad for counted, grad in both if counted], [g for counted, g in both if not counted]


def _only_nonfinite(of_copies: Tensor) -> Tensor:
    """What copies add: zero, except NaN and inf, which any one of the ranks may have."""
    return torch.where(of_copies.isfinite(), 0.0, of_copies)


def _of_units(
    partials: Tensor, params: Sequence[LocalParam], group: ParamGroup, units: Units
) -> GroupMeasurement:
    added = _added(partials, group, units)
    total = power_sums.combine(added, group.norm_type)
    payload, weights = [total, _in_slots(added, group, units)], None
    if group.needs_weights:
        counted = units.counted.unsqueeze(1)
        weights = _unit_partials([_weights(param) for param in params], group.power, units)
        payload.append(_in_slots(torch.where(counted, weights, 0.0), group, units))
    flat = torch.cat([part.flatten() for part in payload])
    norms = power_sums.norm_from_partials(partials, group.power)
    return GroupMeasurement(flat, units.row_names, norms, partials, weights)


def _added(partials: Tensor, group: ParamGroup, units: Units) -> Tensor:
    """What this rank adds to the sums of units: of copies nothing but what is not finite."""
    if math.isinf(group.norm_type):  # copies leave a maximum as it is
        return partials
    return torch.where(units.counted.unsqueeze(1) | ~partials.isfinite(), partials, 0.0)


def _weights(param: LocalParam) -> Tensor | None:
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
        self._names = [param.name for param in self._params]
        counted = [param.counted for param in self._params]
        self._counted = torch.tensor(counted, dtype=torch.bool, device=plan.device)
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

    def measurement(self, rest: Sequence[Tensor | None], tensors: bool = False) -> GroupMeasurement:
        """Of what was put, and of the other gradients, which are measured now.

        Args:
            rest: in the order of `plan.params`, as `measure` takes them; None for what was put.
            tensors: fill `GroupMeasurement.tensors`, where the sums of tensors are known; else
                `with_tensors` reads the gradients for them.
        """
        found = self._measurement(rest)
        return self._with_tensors(found, rest) if tensors else found

    def _with_tensors(
        self, found: GroupMeasurement, rest: Sequence[Tensor | None]
    ) -> GroupMeasurement:
        both = zip(self._plan.groups, self._plan.tensor_groups, strict=True)
        units = next(other.units for group, other in both if group is self._group)
        if self._group.units is not None or units is None or not units.are_params:
            return found
        power = self._group.power
        partials = power_sums.partials(self.per_tensor, power).clone()
        _add_units_(partials, units.views(rest[self._group.members]), power, units)
        return found._replace(tensors=partials)

    def _measurement(self, rest: Sequence[Tensor | None]) -> GroupMeasurement:
        group, per_tensor = self._group, self.per_tensor.clone()
        if (units := group.units) is not None:
            _add_units_(per_tensor, units.views(rest[group.members]), group.power, units)
            return _of_units(per_tensor, self._params, group, units)
        added = per_tensor
        if group.has_copies:
            added = torch.where(self._counted, per_tensor, _only_nonfinite(per_tensor))
        payload = power_sums.combine(power_sums.partials(added, group.power), group.norm_type)
        if all(grad is None for grad in rest[group.members]):
            return GroupMeasurement(payload, self._names, per_tensor)
        more = _measure_group(rest, self._plan, group, None, per_tensor=False)
        payload = power_sums.combine(torch.stack([payload, more.payload]), group.norm_type)
        names = [*self._names, *more.names]
        return GroupMeasurement(payload, names, torch.cat([per_tensor, more.per_tensor]))
