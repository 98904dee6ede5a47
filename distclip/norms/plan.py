"""What is measured and reduced each step, settled once: who counts what, in which group, on which device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from distclip.norms import power_sums as powers
from distclip.norms.reduce import all_gather_objects
from distclip.norms.units import Units, make_units
from distclip.norms.verify import verify
from distclip.policies import Policy, Scope
from distclip.sharding.layout import LocalParam
from distclip.sharding.mesh import ReduceMesh


@dataclass(frozen=True)
class Group:
    """Parameters with a policy of their own: `plan.params[members]`.

    Attributes:
        units: where the policy's scope is smaller than the group.
        num_slots, first_slot: how many units travel from all places on the distinct axes, and where this one begins.
        copies: some of the parameters are counted by other ranks.
    """

    name: str
    members: slice
    policy: Policy[Any]
    copies: bool
    units: Units | None = None
    num_slots: int = 0
    first_slot: int = 0

    @property
    def norm_type(self) -> float:
        return self.policy.norm_type

    @property
    def num_numbers(self) -> int:
        """How many numbers travel: the total's, the cut units', and those of their weights."""
        return powers.num_columns(self.norm_type) * (1 + self.num_slots * (2 if self.policy.needs_weights else 1))


@dataclass(frozen=True)
class Plan:
    """Every parameter that this rank holds, in groups, and the team that the sums are reduced over.

    Attributes:
        reduce_mesh: None where no rank holds elements that another lacks, so that nothing is reduced.
        device: where the sums are added up and travel.
    """

    params: Sequence[LocalParam]
    reduce_mesh: ReduceMesh | None
    groups: Sequence[Group]
    device: torch.device

    def verify(self) -> None:
        """Compares the plans of all ranks, and the bits of parameters that are laid out as copies.

        Meant for the start of a run: reads every parameter once.

        Raises:
            LayoutError: on every rank, with the same message: a parameter that a rank lacks or lays out otherwise,
                copies that differ, other policies, another order of groups, another mesh. A rank that does not call
                within the timeout of the process group is named on the ranks that did.

        Collective: all ranks of the team (without one: of the world) must call. One all-gather of about 40 integers
            a rank; if something differs, 62 of one integer each to find the parameter, and one of its name.
        """
        policies = [f"{group.name}: {group.policy}" for group in self.groups]
        verify(self.params, self.reduce_mesh, policies, self.device)

    def __str__(self) -> str:
        rows = [["group", "policy", "layout", "tensors", "elements", "counted here", "bytes measured"]]
        for group in self.groups:
            by_layout: dict[str, list[LocalParam]] = {}
            for held in self.params[group.members]:
                by_layout.setdefault(str(held.layout), []).append(held)
            rows += [[group.name, str(group.policy), layout, *_totals(held)] for layout, held in by_layout.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, self._collective()])

    def _collective(self) -> str:
        if self.reduce_mesh is None:
            return "no collective: no rank holds elements that another lacks"
        numbers = sum(group.num_numbers for group in self.groups)
        axes = " x ".join(f"{axis}={self.reduce_mesh.size(axis)}" for axis in self.reduce_mesh.axes)
        return f"one all-reduce of {numbers} float64 ({8 * numbers} bytes) over {axes}, on {self.device}"


def make_plan(
    held: Sequence[LocalParam], team: ReduceMesh | None, groups: Sequence[tuple[str, slice, Policy[Any]]]
) -> Plan:
    """The plan for groups (name, members, policy) of `held`.

    Raises:
        LayoutError, ValueError: the policy's units cannot be told.

    Collective: where a distinct axis gives ranks units of their own, an all-gather of a few numbers over the team.
    """
    device = _device(held, team)
    made = [_group(name, members, policy, held, device) for name, members, policy in groups]
    if team is not None and team.distinct and any(group.units is not None for group in made):
        made = _after_other_places(made, team)
    return Plan(held, team, made, device)


def _group(name: str, members: slice, policy: Policy[Any], held: Sequence[LocalParam], device: torch.device) -> Group:
    copies = not all(h.counted for h in held[members])
    if policy.scope in (Scope.MODEL, Scope.ELEMENT):
        return Group(name, members, policy, copies)
    units = make_units(held[members], policy, device)
    return Group(name, members, policy, copies, units, units.num_slots)


def _after_other_places(groups: Sequence[Group], team: ReduceMesh) -> list[Group]:
    """Places on the distinct axes hold different units: each gets slots of its own, in the order of places."""
    place = tuple(team.coordinate[axis] for axis in sorted(team.distinct))
    places = dict(all_gather_objects((place, [group.num_slots for group in groups]), team.group).values())
    before = [sum(slots[i] for p, slots in places.items() if p < place) for i in range(len(groups))]
    total = [sum(slots[i] for slots in places.values()) for i in range(len(groups))]
    return [replace(g, num_slots=n, first_slot=b) for g, n, b in zip(groups, total, before, strict=True)]


def _device(held: Sequence[LocalParam], team: ReduceMesh | None) -> torch.device:
    types = [team.device_type] if team is not None else [h.param.device.type for h in held]
    found = next((t for t in types if t != "cpu"), "cpu")
    if found in ("cpu", "meta") or not torch.get_device_module(found).is_available():
        return torch.device(found)
    return torch.device(found, torch.get_device_module(found).current_device())


def _totals(held: Sequence[LocalParam]) -> list[str]:
    """Tensors; elements of them on this rank; those of them that this rank counts; their bytes."""
    sizes = [(h, h.weights) for h in held]
    here = sum(v.numel() for _, v in sizes)
    counted = sum(v.numel() for h, v in sizes if h.counted)
    size = sum(v.numel() * v.element_size() for _, v in sizes)
    return [str(len(held)), f"{here:,}", f"{counted:,}", f"{size:,}"]
