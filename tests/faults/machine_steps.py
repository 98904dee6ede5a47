"""The third part of the state machine: its calls of the Clipper, alone and in training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import Tensor

from distclip import NonFiniteGradientError
from distclip.errors import SkippedStepsError
from tests.faults.comparing import applied, local
from tests.faults.drawn_policies import LOSSES, POISONS, WRONG_LOSSES
from tests.faults.hostile import tried
from tests.faults.machine_checks import CheckedMachine
from tests.faults.plain_steps import Step, expected


class Before(NamedTuple):
    """What a call finds, and what it is to do; tensors by name, float64 but for `untouched`."""

    want: Step
    grads: dict[str, Tensor]
    untouched: dict[str, Tensor]
    after_error: dict[str, Tensor]
    weights: dict[str, Tensor]
    held: set[str]
    factor: float


class SteppingMachine(CheckedMachine):
    """Each call is compared with one step of the reference."""

    num_compared: ClassVar[int] = 0  # calls, of all machines

    @precondition(lambda self: self.scaler is None)
    @rule(
        scale=st.sampled_from([None, None, 0.25, -2.0, 0.0, torch.tensor(3.0)]),
        loss=st.sampled_from([*LOSSES, *WRONG_LOSSES]),
    )
    def clip(self, scale: Any, loss: Any) -> None:
        """Without an optimizer: what only the optimizer got is not clipped yet."""
        self._call("clip_", lambda: self.clipper.clip_(scale=scale, loss=loss), scale, loss=loss)

    @rule(
        how=st.sampled_from(["clip_", "step", "decide", "attach", "attach"]),
        scale=st.sampled_from([None, None, 0.25, torch.tensor(3.0)]),
        loss=st.sampled_from([*LOSSES, *WRONG_LOSSES]),
    )
    def step(self, how: str, scale: Any, loss: Any) -> None:
        """A whole step of the training loop."""
        self._follow()
        if how == "attach":
            self._step_attached()
            return
        self._detach()
        clipper, optimizer, scaler = self.clipper, self.optimizer, self.scaler
        if how == "step":
            call = lambda: clipper.step(optimizer, scaler, scale, loss=loss)  # noqa: E731
        elif how == "clip_":
            call = lambda: clipper.clip_(optimizer, scaler, scale, loss=loss)  # noqa: E731
        else:
            decide = lambda: clipper.decide(optimizer, scaler, scale, loss=loss)  # noqa: E731
            call = lambda: applied(decide())  # noqa: E731
        self._call(how, call, scale, steps=True, loss=loss)

    @rule(
        how=st.sampled_from(["clip_", "step", "decide", "attach"]),
        batches=st.lists(
            st.tuples(
                st.integers(0, 3),
                st.sampled_from([0.0, 0.3, 0.3, 0.6, 1.0, 4.0, 100.0]),
                st.sampled_from([None, None, None, None, *POISONS]),
                st.sampled_from([*LOSSES[1:] * 2, *WRONG_LOSSES]),
            ),
            min_size=3,
            max_size=8,
        ),
    )
    def train(self, how: str, batches: list[tuple[int, float, float | None, Any]]) -> None:
        """Several steps, as loops take them: what policies remember counts from the third on."""
        for seed, size, poison, loss in batches:
            self.model.zero_grad()
            self.backward(seed, size, 15)
            if poison is not None:
                self.poison(poison, seed)
            self.step(how, None, loss if self._vetoes() else None)
            self.states_are_those_of_the_reference()

    def _step_attached(self) -> None:
        if self.attached is None:
            self.attached = self.clipper.attach(self.optimizer)
            self.seen = True

        def call() -> Any:
            if self.scaler:
                self.scaler.step(self.optimizer)
            else:
                self.optimizer.step()
            return self.attached.report

        mine = [local(self.params[n].grad) for n in self.stepped if self.params[n].grad is not None]
        if self.scaler and not self.folds and not all(bool(g.isfinite().all()) for g in mine):
            call()  # the scaler skips, and the Clipper is not asked
            self._end_step()
            return
        self._call("attach", call, None, steps=True)

    def _detach(self) -> None:
        if self.attached is not None:
            self.attached.remove()
            self.attached = None

    def _follow(self) -> None:
        """What the optimizer got since the last step belongs to the one group now."""
        held = {name for group in self.groups for name in group.names}
        self.groups[0].names += [name for name in self.stepped if name not in held]

    def _call(
        self, how: str, call: Callable[[], Any], scale: Any, steps: bool = False, loss: Any = None
    ) -> None:
        """Calls it, and compares all that it did with the reference."""
        has_scaler = steps and self.scaler is not None and self.scaler._scale is not None
        if steps and not self._can_step(has_scaler):
            return
        self.seen = self.seen or steps
        if loss is not None and not self._vetoes():
            with pytest.raises(ValueError, match="no policy of the Clipper may leave out steps"):
                call()
            return
        before = self._before(how, scale, has_scaler, loss)
        want, vetoed = before.want, before.want.vetoed
        report, error = tried(call, NonFiniteGradientError, SkippedStepsError)
        if vetoed is None:
            assert report is not None
            vetoed = bool(report.skipped)
        note(f"{how}: total {want.total}, finite {want.finite}, vetoed {vetoed}")
        if error is not None or self._raises(want.finite, vetoed):
            self._check_error(error, want, vetoed)
            self._count(want.finite, vetoed)
            self._assert_gradients(before.untouched, before.after_error, before.held)
            self._end_step()
            return
        self._count(want.finite, vetoed)
        if want.finite and not vetoed:
            for group, step in zip(self.groups, want.groups, strict=True):
                group.plain.count(step.seen)
        self._check_report(report, want, vetoed)
        SteppingMachine.num_compared += 1
        left = self._gradients_after(before.untouched, before.grads, want, vetoed)
        if how not in ("step", "attach"):
            stays = vetoed or (not want.finite and self.mode == "skip")
            rounds = not stays and (before.factor != 1 or want.is_at_limit)
            self._assert_gradients(before.untouched, left, before.held, rounds)
        if steps:
            skips = vetoed or not want.finite if has_scaler else bool(report.skipped)
            self._step_optimizer(how, has_scaler, skips)
            # Else the scaler saw the elements alone, which are finite: whether the step counts
            # depends on how torch rounds them.
            if self._is_clear(how, has_scaler, want):
                self._check_parameters(left, skips, want, before.weights, before.factor)
            else:
                self._repair()
            self._end_step()

    def _can_step(self, has_scaler: bool) -> bool:
        """Whether torch's scaler would not raise: it has scaled a loss, and there are gradients."""
        if self.scaler is None:
            return True
        return has_scaler and any(self.params[n].grad is not None for n in self.stepped)

    def _before(self, how: str, scale: Any, has_scaler: bool, loss: Any) -> Before:
        factor = 1.0 if scale is None else float(scale)
        factor /= self.scaler.get_scale() if has_scaler else 1.0
        raw = {n: local(p.grad).double() for n, p in self.params.items() if p.grad is not None}
        untouched = {n: local(p.grad).clone() for n, p in self.params.items() if n in raw}
        weights = {n: local(p).detach().double().clone() for n, p in self.params.items()}
        read = {
            n: w if n in raw or self.params[n].requires_grad else torch.full_like(w, math.inf)
            for n, w in weights.items()  # what is frozen has no limit
        }
        held = {name for group in self.groups for name in group.names}
        # The scaler has unscaled these before the Clipper reads them, in their own dtype.
        unscaled = self.stepped if how == "attach" and has_scaler and not self.folds else ()
        after_error = {
            n: (g * factor).to(untouched[n].dtype).double() if n in unscaled else g
            for n, g in raw.items()
        }
        grads = {n: after_error[n] if n in unscaled else raw[n] * factor for n in raw if n in held}
        given = None if loss is None else float(loss)
        want = expected(self.groups, read, grads, self.single, given)
        return Before(want, grads, untouched, after_error, weights, held, factor)

    def _step_optimizer(self, how: str, has_scaler: bool, skips: bool) -> None:
        if how in ("step", "attach"):
            return
        if has_scaler:
            self.scaler.step(self.optimizer)
        elif not skips:
            self.optimizer.step()

    def _is_clear(self, how: str, has_scaler: bool, want: Step) -> bool:
        return want.finite or self.folds or not (how == "attach" and has_scaler)
