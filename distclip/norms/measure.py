"""What this rank adds to the norm: local, without communication."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distclip import kernels
from distclip.norms import power_sums as powers
from distclip.norms.plan import Group, LocalParam, Plan, Units
from distclip.norms.units import View


class LocalNorms(NamedTuple):
    """What this rank measured.

    Attributes:
        numbers: what travels: of every group the columns of its total, then those of its cut units; float64, flat.
        names, each: of every parameter that has a gradient, or unit, a number, float64: the sum of its powers or
            its norm, not finite where the gradient is not. Nothing where all are finite and telling them apart
            would cost time.
        units, weights: the columns of every unit on this rank, [num, num_columns], by group; None where the group
            has no units, or its policy does not ask for weights.
        pieces: the memory of the gradients, by group, as `kernels.pieces` has it; None where it was not looked for.
    """

    numbers: Tensor
    names: list[str]
    each: Tensor
    units: list[Tensor | None]
    weights: list[Tensor | None]
    pieces: list[list[list[Tensor]] | None]


def local(values: Sequence[Tensor | None], plan: Plan, apart: bool = False) -> LocalNorms:
    """Reads every gradient once, and every weight where a policy asks for its norm.

    Args:
        apart: give the numbers of `names` and `each` in any case.
    """
    parts = [
        _group(values[group.members], plan.params[group.members], group, plan.device, apart) for group in plan.groups
    ]
    return _joined(parts)


def of_stores(stores: Sequence[NormBuffer], plan: Plan) -> LocalNorms:
    """As `local`, from what was stored."""
    return _joined([store.local(plan.params) for store in stores])


def _joined(parts: Sequence[LocalNorms]) -> LocalNorms:
    if len(parts) == 1:
        return parts[0]
    return LocalNorms(
        torch.cat([part.numbers for part in parts]),
        [name for part in parts for name in part.names],
        torch.cat([part.each for part in parts]),
        [units for part in parts for units in part.units],
        [weights for part in parts for weights in part.weights],
        [pieces for part in parts for pieces in part.pieces],
    )


class NormBuffer:
    """The numbers of one group's gradients, written one gradient at a time.

    Attributes:
        each: of every parameter, as `Local.each` has it; or the columns of every unit, [num, num_columns].
    """

    def __init__(self, group: Group, members: Sequence[LocalParam], device: torch.device) -> None:
        self._group, self._device = group, device
        self._names = [h.name for h in members]
        self._counted = torch.tensor([h.counted for h in members], dtype=torch.bool, device=device)
        shape = (len(members),) if group.units is None else (group.units.num, powers.num_columns(group.norm_type))
        self.each = torch.zeros(shape, dtype=torch.float64, device=device)

    def put(self, place: int, values: Tensor | None) -> None:
        """Measures the gradient of the group's parameter at `place`; None is a gradient of zeros."""
        p, units = self._group.norm_type, self._group.units
        if units is None:
            self.each[place] = 0.0 if values is None else _each([values], p, self._device)[0]
            return
        for span in units.spans_of[place]:
            self.each[span.base : span.base + span.count] = 0.0
            if values is not None:
                _add_units_(self.each, span.views(values), p, units)

    def local(self, held: Sequence[LocalParam]) -> LocalNorms:
        if self._group.units is not None:
            return _of_units(self.each.clone(), held[self._group.members], self._group, self._group.units)
        added = torch.where(self._counted, self.each, _broken(self.each)) if self._group.copies else self.each
        total = powers.joined(powers.columns(added, self._group.norm_type), self._group.norm_type)
        return LocalNorms(total, self._names, self.each.clone(), [None], [None], [None])


def _group(
    values: Sequence[Tensor | None], members: Sequence[LocalParam], group: Group, device: torch.device, apart: bool
) -> LocalNorms:
    if group.units is not None:
        columns = _unit_columns(values, group.norm_type, group.units)
        return _of_units(columns, members, group, group.units)
    counted, copies = [v for v in values if v is not None], list[Tensor]()
    if group.copies:
        counted = [v for h, v in zip(members, values, strict=True) if v is not None and h.counted]
        copies = [v for h, v in zip(members, values, strict=True) if v is not None and not h.counted]
    pieces = kernels.pieces(counted), kernels.pieces(copies)
    # An accelerator's kernels tell tensors apart anyway.
    if not apart and device.type == "cpu" and (group.norm_type <= powers.PLAIN_UP_TO or math.isinf(group.norm_type)):
        together = _together(*pieces, group.norm_type, device)
        if math.isfinite(together.numbers.sum().item()):
            return together
    here = [h for h, v in zip(members, values, strict=True) if v is not None]
    names = [h.name for h in sorted(here, key=lambda h: not h.counted)]
    each = _each([*counted, *copies], group.norm_type, device)
    added = torch.cat([each[: len(counted)], _broken(each[len(counted) :])])
    total = powers.joined(powers.columns(added, group.norm_type), group.norm_type)
    return LocalNorms(total, names, each, [None], [None], [[*pieces[0], *pieces[1]]])


def _together(
    counted: list[list[Tensor]], copies: list[list[Tensor]], norm_type: float, device: torch.device
) -> LocalNorms:
    each = [kernels.power_sum(piece, norm_type).to(device) for piece in counted]
    each += [_broken(kernels.power_sum(piece, norm_type).to(device)) for piece in copies]
    added = torch.stack(each) if each else torch.zeros(0, dtype=torch.float64, device=device)
    total = powers.joined(powers.columns(added, norm_type), norm_type)
    return LocalNorms(total, [], added[:0], [None], [None], [[*counted, *copies]])


def _broken(copies: Tensor) -> Tensor:
    """What copies add: zero, unless one is broken, since a NaN must be seen whichever rank has it."""
    return torch.where(copies.isfinite(), 0.0, copies)


def _of_units(columns: Tensor, members: Sequence[LocalParam], group: Group, units: Units) -> LocalNorms:
    counted = units.counted.unsqueeze(1)
    added = columns
    if not math.isinf(group.norm_type):  # a maximum does not mind copies
        added = torch.where(counted | ~columns.isfinite(), columns, 0.0)
    travel, weights = [powers.joined(added, group.norm_type), _cut(added, group, units)], None
    if group.policy.needs_weights:
        weights = _unit_columns([h.weights for h in members], group.norm_type, units)
        travel.append(_cut(torch.where(counted, weights, 0.0), group, units))
    each = powers.root(columns, group.norm_type)
    return LocalNorms(torch.cat([t.flatten() for t in travel]), units.row_names, each, [columns], [weights], [None])


def _cut(columns: Tensor, group: Group, units: Units) -> Tensor:
    travelling = columns.new_zeros(group.num_slots, columns.shape[1])
    travelling[group.first_slot + units.slots] = columns[units.cut]
    return travelling


def _unit_columns(values: Sequence[Tensor | None], norm_type: float, units: Units) -> Tensor:
    columns = torch.zeros(units.num, powers.num_columns(norm_type), dtype=torch.float64, device=units.sizes.device)
    _add_units_(columns, units.views(values), norm_type, units)
    return columns


def _add_units_(columns: Tensor, views: Iterable[View], norm_type: float, units: Units) -> None:
    device = columns.device
    whole: list[tuple[Tensor, int]] = []
    for part, dim, base in views:
        if dim is None:
            whole.append((part, base))
            continue
        rows = torch.arange(base, base + part.shape[dim], device=device)
        powers.add_(columns, rows, powers.columns(_rows(part, dim, norm_type).to(device), norm_type), norm_type)
    if whole:
        each = _each([part for part, _ in whole], norm_type, device)
        index = units.index_of([base for _, base in whole])
        powers.add_(columns, index, powers.columns(each, norm_type), norm_type)


def _rows(part: Tensor, dim: int, norm_type: float) -> Tensor:
    """As `_each`, of every index of `dim`."""
    sums = norm_type <= powers.PLAIN_UP_TO
    return (kernels.unit_power_sums if sums else kernels.unit_norms)(part, dim, norm_type)


def _each(values: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """Of each tensor on any device its sum of powers for p <= 6, else its norm; brought together on one."""
    kernel = kernels.power_sums if norm_type <= powers.PLAIN_UP_TO else kernels.norms
    if len({v.device for v in values}) == 1:
        return kernel(values, norm_type).to(device)
    each = torch.zeros(len(values), dtype=torch.float64, device=device)
    for there in {v.device for v in values}:
        index = [i for i, v in enumerate(values) if v.device == there]
        each[index] = kernel([values[i] for i in index], norm_type).to(device)
    return each
