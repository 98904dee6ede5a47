"""What is measured and reduced each step, settled once: who counts what, in which group, on which device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from distclip import powers
from distclip.layout import Held, local_values
from distclip.team import Team
from distclip.verify import verify


@dataclass(frozen=True)
class Group:
    """Parameters that share one norm: `plan.held[members]`."""

    name: str
    members: slice
    norm_type: float
    policy: str

    @property
    def num_columns(self) -> int:
        return powers.num_columns(self.norm_type)


@dataclass(frozen=True)
class Plan:
    """Every parameter that this rank holds, in groups, and the team that the sums are reduced over.

    Attributes:
        team: None where no rank holds elements that another lacks, so that nothing is reduced.
        device: where the sums are added up and travel.
    """

    held: Sequence[Held]
    team: Team | None
    groups: Sequence[Group]

    @cached_property
    def device(self) -> torch.device:
        types = [self.team.device_type] if self.team is not None else [h.param.device.type for h in self.held]
        found = next((t for t in types if t != "cpu"), "cpu")
        if found in ("cpu", "meta"):
            return torch.device(found)
        return torch.device(found, torch.get_device_module(found).current_device())

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
        verify(self)

    def __str__(self) -> str:
        rows = [["group", "policy", "layout", "tensors", "elements", "counted here", "bytes measured"]]
        for group in self.groups:
            by_layout: dict[str, list[Held]] = {}
            for held in self.held[group.members]:
                by_layout.setdefault(str(held.layout), []).append(held)
            rows += [[group.name, group.policy, layout, *_totals(held)] for layout, held in by_layout.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, self._collective()])

    def _collective(self) -> str:
        if self.team is None:
            return "no collective: no rank holds elements that another lacks"
        numbers = sum(group.num_columns for group in self.groups)
        axes = " x ".join(f"{axis}={self.team.size(axis)}" for axis in self.team.axes)
        return f"one all-reduce of {numbers} float64 ({8 * numbers} bytes) over {axes}, on {self.device}"


def _totals(held: Sequence[Held]) -> list[str]:
    """Tensors; elements of them on this rank; those of them that this rank counts; their bytes."""
    sizes = [(h, local_values(h.param.detach())) for h in held]
    here = sum(v.numel() for _, v in sizes)
    counted = sum(v.numel() for h, v in sizes if h.counted)
    size = sum(v.numel() * v.element_size() for _, v in sizes)
    return [str(len(held)), f"{here:,}", f"{counted:,}", f"{size:,}"]
