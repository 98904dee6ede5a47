"""The norm of a parameter group stays in an interval around its own past norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distclip.arguments import as_number
from distclip.policies.base import NormContext, PolicyBase, Scope
from distclip.policies.checks import (
    check_decay,
    check_finite,
    check_fraction,
    is_count,
    store_checked,
)


class AGGCState(NamedTuple):
    """
    Attributes:
        average: the moving average of the norms afterwards; 0 before the first; float64 scalar.
        num_steps: the number of steps so far, those with a norm of 0 included; int64 scalar.
    """

    average: Tensor
    num_steps: Tensor


@dataclass(frozen=True)
class AGGC(PolicyBase):
    """Scales a norm above `high` times the average of its past down, and one below `low` times up.

        new norm = max(high S, max_down norm)     where norm > high S
                   min(low S, max_up norm)        else, where norm < low S
                   norm                           else, and in the first step
        S ← beta S + (1 - beta) new norm,         from 0

    The paper has a group for each kind of module, such as all query projections: give each a
    parameter group of its own. From step `late_from`, counted from 0, `low` and `high` change to
    `late_low` and `late_high` within `late_steps` steps, linearly.

    With `high` below `low`, as the authors set them, no norm is left as it is. S starts at 0
    without a correction for that, so the norms after the first lie above `high` S, and
    `max_down` multiplies them. A norm of 0 stays 0 and leaves S as it is. With
    on_nonfinite="propagate" an infinite norm stays infinite, except that with max_down=0 it becomes
    `high` S, and NaN makes all gradients NaN.

    Args:
        low: 0 raises no norm (the authors' `raise_small=False`).
        high: 0 scales no norm down.
        late_from: `math.inf` leaves `low` and `high` as they are. The authors give it as a share of
            the steps of the run: 0.4, and 0.3 for `late_steps`.
        max_down: the smallest coefficient; 0 for no bound.
        max_up: the largest coefficient, math.inf for no bound.

    Raises:
        ValueError: `low`, `high`, `late_low` or `late_high` is negative, infinite or NaN, `beta` is
            below 0, 1 or above, `max_down` is outside 0..1, `max_up` is below 1 or NaN, `late_from`
            is negative or NaN, or `late_steps` is not above 0 and finite.

    Reference: Li, Wu, Chang, "AGGC: Adaptive Group Gradient Clipping for Stabilizing Large Language
        Model Training", 2026 (arXiv:2601.11864); the order of the updates and the defaults are
        those of the authors' code for GRPO (`dp_actor.yaml`), with `raise_small` and without the
        change to late bounds, which needs the number of steps.
    """

    low: float = 0.95
    high: float = 0.6
    beta: float = 0.95
    max_down: float = 0.9
    max_up: float = 1.1
    late_low: float = 0.98
    late_high: float = 0.5
    late_from: float = math.inf
    late_steps: float = 1.0
    scope = Scope.MODEL
    norm_type = 2.0
    raises = True

    def __post_init__(self) -> None:
        store_checked(self, low=check_finite, high=check_finite)
        store_checked(self, late_low=check_finite, late_high=check_finite)
        store_checked(self, beta=check_decay, max_down=check_fraction, max_up=_check_up)
        store_checked(self, late_from=_check_from, late_steps=_check_steps)

    def init(self, num_groups: int, device: torch.device) -> AGGCState:
        average = torch.zeros((), dtype=torch.float64, device=device)
        return AGGCState(average, torch.zeros((), dtype=torch.int64, device=device))

    def valid_state(self, state: AGGCState) -> AGGCState:
        return AGGCState(state.average >= 0, is_count(state.num_steps))

    def limit(
        self, norms: Tensor, state: AGGCState, context: NormContext
    ) -> tuple[Tensor | None, AGGCState]:
        late = ((state.num_steps.double() - self.late_from) / self.late_steps).clamp(0, 1)
        low = state.average * (self.low + (self.late_low - self.low) * late)
        high = state.average * (self.high + (self.late_high - self.high) * late)
        has_past = high > 0  # else no norm is too large, as in the authors' code
        down = torch.fmax(high, self.max_down * norms)  # 0 times infinity is NaN
        up = torch.minimum(low, self.max_up * norms)
        new_norm = torch.where(has_past & (norms > high), down, torch.where(norms < low, up, norms))
        average = self.beta * state.average + (1 - self.beta) * new_norm
        is_zero = norms == 0
        average = torch.where(is_zero, state.average, average)
        new_norm = torch.where(is_zero, norms, new_norm)  # zero times an infinite max_up is NaN
        return new_norm, AGGCState(average, state.num_steps + 1)


def _check_up(name: str, value: Any) -> float:
    number = as_number(name, value, "a number, such as 1.1, or math.inf for no bound")
    if not number >= 1:
        raise ValueError(
            f"cannot raise norms with {name}={number}: it is the most that a norm is multiplied by "
            f"where it is too small, and below 1 it would become smaller still. Pass 1 or above."
        )
    return number


def _check_from(name: str, value: Any) -> float:
    number = as_number(name, value, "a number of steps, or math.inf for never")
    if not number >= 0:
        raise ValueError(
            f"cannot change the bounds with {name}={number}: it counts the steps before they "
            f"begin to change, and there are none before the first. Pass 0 or above; math.inf "
            f"never changes them."
        )
    return number


def _check_steps(name: str, value: Any) -> float:
    number = as_number(name, value, "a number of steps")
    if not 0 < number < math.inf:
        raise ValueError(
            f"cannot change the bounds with {name}={number}: it is within how many steps they "
            f"change, and at no time would they be between the early and the late ones. Pass a "
            f"finite number above 0; 1 changes them from one step to the next."
        )
    return number
