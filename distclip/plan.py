"""What is measured and reduced each step, settled once: who counts what, in which group, on which device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from distclip import powers
from distclip.layout import Held
from distclip.team import Team


@dataclass(frozen=True)
class Group:
    """Parameters that share one norm: `plan.held[members]`."""

    name: str
    members: slice
    norm_type: float

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
