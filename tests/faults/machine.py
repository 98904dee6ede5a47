"""A state machine of `Clipper`: whatever is called in whatever order, each step is the reference's.

One process; parameters are plain tensors, or DTensors on a mesh of one rank. Each rule that steps
compares gradients, the report, what policies remember, and the parameters after the optimizer.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, invariant, precondition, rule

from tests.faults.comparing import as_lists, lacks, same_state
from tests.faults.drawn_policies import LATE
from tests.faults.machine_steps import SteppingMachine
from tests.faults.plain_steps import Group


class ClipperMachine(SteppingMachine):
    """All rules: states that are saved and loaded, and parameters that come later, too."""

    saves = Bundle("saves")

    @rule(target=saves, how=st.sampled_from(["as it is", "torch.save", "lists"]))
    def save(self, how: str) -> Any:
        saved = self.clipper.state_dict()
        if how == "torch.save":
            torch.save(saved, file := io.BytesIO())
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        elif how == "lists":
            saved = as_lists(saved)
        return saved, copy.deepcopy(self.groups)

    @rule(saved=saves, new=st.booleans())
    def load(self, saved: Any, new: bool) -> None:
        state, groups = saved
        if new:
            self._detach()
            self._follow()
            self._make()
            for group in self.groups:
                group.plain = Group.made("", group.policy, []).plain
        before = str(self.clipper.state_dict())
        held = {name: p for name, p in self.clipper.state_dict()["groups"].items()}
        misses = [n for n, policy in held.items() if lacks(policy, state["groups"][n])]
        if misses:
            with pytest.raises(ValueError, match="Nothing was loaded"):
                self.clipper.load_state_dict(state)
            assert str(self.clipper.state_dict()) == before
            return
        self.clipper.load_state_dict(state)
        for group, was in zip(self.groups, groups, strict=True):
            group.plain = copy.deepcopy(was.plain)

    @precondition(lambda self: self.num_groups == 1 and self.seen)
    @rule(name=st.sampled_from([*LATE]))
    def add_param_group(self, name: str) -> None:
        if name not in self.stepped:
            self.stepped.append(name)
            self.optimizer.add_param_group({"params": [self.params[name]]})
            self.twin.add_param_group({"params": [self.twins[name]]})

    @invariant()
    def states_are_those_of_the_reference(self) -> None:
        if not hasattr(self, "clipper"):
            return
        saved = self.clipper.state_dict()["groups"]
        for group in self.groups:
            (found,) = saved[group.name].values()
            same_state(found, group.plain.saved(), group)

    @invariant()
    def a_report_stays_as_it_was(self) -> None:
        if getattr(self, "kept", None) is not None:
            report, figures = self.kept
            assert repr(report.to_dict()) == repr(figures)

    def teardown(self) -> None:
        if hasattr(self, "clipper"):
            self._detach()
