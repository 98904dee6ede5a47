"""The second part of the state machine: what a call did, compared with the reference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from distclip import NonFiniteGradientError
from distclip.errors import SkippedStepsError
from tests.faults.comparing import CLOSE, FLOAT32_MAX, local, same, smallest
from tests.faults.drawn_policies import POLICIES
from tests.faults.machine_model import ModelMachine
from tests.faults.plain_steps import Step


class CheckedMachine(ModelMachine):
    """Compares gradients, reports, errors, and parameters after the optimizer."""

    def _raises(self, finite: bool, vetoed: bool) -> bool:
        if self.mode == "raise" and not finite:
            return True
        return self._is_counted(finite, vetoed) and self.in_a_row + 1 > self.most_skips

    def _vetoes(self) -> bool:
        return any("spike" in n for g in self.groups for n, p in POLICIES.items() if p is g.policy)

    def _is_counted(self, finite: bool, vetoed: bool) -> bool:
        return vetoed or (not finite and self.mode in ("skip", "zero"))

    def _count(self, finite: bool, vetoed: bool) -> None:
        if self.mode in ("skip", "zero") or self._vetoes():
            counted = self._is_counted(finite, vetoed)
            self.in_a_row = self.in_a_row + 1 if counted else 0
            self.num_skipped += counted

    def _check_error(self, error: Exception | None, want: Step, vetoed: bool) -> None:
        assert error is not None, "no error was raised"
        kind = NonFiniteGradientError if not want.finite else SkippedStepsError
        assert type(error) is kind
        assert self._raises(want.finite, vetoed), error

    def _gradients_after(
        self,
        untouched: dict[str, Tensor],
        grads: dict[str, Tensor],
        want: Step,
        vetoed: bool,
    ) -> dict[str, Tensor]:
        """What optimizers read after the call, float64, by name."""
        left = {name: grad.double() for name, grad in untouched.items()}
        if vetoed or (not want.finite and self.mode == "skip"):
            return left  # without the scale, too
        if not want.finite and self.mode == "zero":
            return left | {name: torch.zeros_like(grad) for name, grad in grads.items()}
        return left | want.clipped

    def _assert_gradients(
        self,
        untouched: dict[str, Tensor],
        left: dict[str, Tensor],
        held: set[str],
        rounds: bool = False,
    ) -> None:
        """Args: rounds: a gradient may change although the reference leaves it: two factors of
        which the product is 1, a norm that is the limit up to rounding.
        """
        for name, before in untouched.items():
            now, grad = local(self.params[name].grad), left[name]
            if name not in held or (torch.equal(grad, before.double()) and not rounds):
                torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)
                continue
            close = {"rtol": CLOSE[now.dtype], "atol": 1e-37}
            torch.testing.assert_close(
                now.double(), grad.to(now.dtype).double(), equal_nan=True, **close
            )

    def _check_report(self, report: Any, want: Step, vetoed: bool) -> None:
        leaves = vetoed or (not want.finite and self.mode in ("skip", "zero"))
        fixed = 1.0 if vetoed or self.mode == "skip" else 0.0
        same(report.total_norm, want.total, self.single)
        assert bool(report.finite) == want.finite
        assert bool(report.skipped) == (vetoed or (not want.finite and self.mode == "skip"))
        coefficients = []
        for group, step in zip(self.groups, want.groups, strict=True):
            same(report.norms[group.name], step.norm, self.single)
            if not math.isnan(step.norm):
                same(report.limits[group.name], smallest(step.limits or [math.inf]), self.single)
            found = smallest([fixed] if leaves else step.coefficients or [1.0])
            same(report.coefficients[group.name], found, self.single)
            coefficients.append(found)
        same(report.coefficient, smallest(coefficients), self.single)
        assert self.clipper.skipped.item() == self.num_skipped
        broken = [
            name
            for group, step in zip(self.groups, want.groups, strict=True)
            if not step.norm <= (FLOAT32_MAX if self.single else math.inf) or math.isinf(step.norm)
            for name in group.names
            if self.params[name].grad is not None
        ]
        assert want.finite <= (report.nonfinite_parameters() == {})
        assert set(report.nonfinite_parameters()) <= set(broken)
        self.kept = report, report.to_dict()

    def _check_parameters(
        self,
        left: dict[str, Tensor],
        skips: bool,
        want: Step,
        weights: dict[str, Tensor],
        factor: float,
    ) -> None:
        """The optimizer did what its twin does with the gradients of the reference."""
        least = min((c for each in want.groups for c in each.coefficients), default=1.0)
        # Folded as 0, as documented: the coefficient and what the gradients still need are one.
        is_known = not (self.folds and min(least, least * abs(factor)) < 1e-36)
        if not skips:
            for name, twin in self.twins.items():
                twin.grad = left[name].to(twin.dtype) if name in left else None
            self.twin.step()
        for name, param in self.params.items():
            now, twin = local(param).detach(), self.twins[name].detach()
            if (is_known or skips) and now.numel():
                moved = (twin.double() - weights[name]).abs().nan_to_num(posinf=0.0).max()
                close, far = CLOSE[now.dtype], 100 * CLOSE[now.dtype] * float(moved)
                torch.testing.assert_close(now, twin, rtol=close, atol=far, equal_nan=True)
            twin.copy_(now)
            if not is_known:  # what the optimizer remembers of the step is unknown as well
                of_param = self.optimizer.state[param].items()
                self.twin.state[self.twins[name]] = {key: _clone(each) for key, each in of_param}


def _clone(value: Any) -> Any:
    return local(value).clone() if isinstance(value, Tensor) else value
