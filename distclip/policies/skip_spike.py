"""Steps whose norm is a spike are left out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distclip.arguments import as_number, shown
from distclip.policies.base import NormContext, PolicyBase, Scope
from distclip.policies.checks import check_not_negative, is_count, store_checked

# Of the mean: the least deviation. Norms that are all the same differ by their rounding.
_ROUNDING = 1e-6


class SkipSpikeState(NamedTuple):
    """
    Attributes:
        values: the latest accepted norms, and below them the losses; a new one overwrites the
            oldest. Unused entries are inf; float64 [2, window].
        counts: the number of accepted norms above 0 so far, and of losses; int64 [2].
    """

    values: Tensor
    counts: Tensor


@dataclass(frozen=True)
class SkipSpike(PolicyBase):
    """Leaves out a step whose total norm or loss is a spike, and clips nothing.

    With the mean μ and the sample deviation σ of the last `window` accepted norms, the step is left
    out on all ranks where

        norm > μ + z_thresh * max(σ, 1e-6 μ)      or      norm > max_norm

    and, where the loss is given (`clipper.step(optimizer, loss=loss)`), where the mean of the
    ranks' losses lies as far above those of the last `window` accepted steps, or is not finite.

    Weights, momentum, step counts and what all policies remember stay as they were, as if the
    batch had not been drawn. `SkipSpike() & ClipNorm(1.0)` leaves out what lies beyond the one and
    clips what lies beyond the other. With several parameter groups, one whose policy vetoes leaves
    out the step of all.

    The windows take accepted steps only. Until one has max(2, window // 2) of them, only `max_norm`
    leaves out steps. Norms that stay at a higher level are all left out, until
    `Clipper(max_consecutive_skips=...)` raises. A norm of 0 is accepted, and is no statistic. A
    norm that is NaN or infinite is no spike: `on_nonfinite` says what happens.

    Args:
        z_thresh: `math.inf` leaves `max_norm` alone.

    Raises:
        ValueError: `z_thresh` or `max_norm` is negative or NaN, or `window` is not a whole number
            above 1.

    Reference: the skip-step optimizer of OLMo-core (`optim/skip_step_optimizer.py`), with 128
        norms, 6 deviations, and nothing before half of the window. It counts the current norm among
        these, has no least deviation, and keeps those of skipped steps in its window; MaxText's
        `skip_step_on_spikes` does the same. `max_norm` is Megatron-LM's
        `grad_norm_skip_threshold`.
    """

    z_thresh: float = 6.0
    window: int = 128
    max_norm: float = math.inf
    scope = Scope.MODEL
    norm_type = 2.0
    sets_limits = False

    def __post_init__(self) -> None:
        store_checked(self, z_thresh=_check_z, window=_check_window, max_norm=check_not_negative)

    def init(self, num_groups: int, device: torch.device) -> SkipSpikeState:
        values = torch.full((2, self.window), math.inf, dtype=torch.float64, device=device)
        return SkipSpikeState(values, torch.zeros(2, dtype=torch.int64, device=device))

    def valid_state(self, state: SkipSpikeState) -> SkipSpikeState:
        is_used = torch.arange(self.window, device=state.values.device) < state.counts[:, None]
        is_value = state.values.isfinite()
        is_value[0] &= state.values[0] > 0
        valid = torch.where(is_used, is_value, state.values == math.inf)
        return SkipSpikeState(valid, is_count(state.counts))

    def limit(
        self, norms: Tensor, state: SkipSpikeState, context: NormContext
    ) -> tuple[Tensor | None, SkipSpikeState]:
        now = _norm_and_loss(norms, context)
        norm, loss = now.unbind()
        is_new = torch.stack([norm > 0, loss <= math.inf])  # NaN is none
        oldest = (state.counts % self.window).unsqueeze(1)
        before = state.values.gather(1, oldest)
        value = torch.where(is_new.unsqueeze(1), now.unsqueeze(1), before)
        after = state.values.scatter(1, oldest, value)
        return None, SkipSpikeState(after, state.counts + is_new)

    def accept(self, norms: Tensor, state: SkipSpikeState, context: NormContext) -> Tensor:
        now, values = _norm_and_loss(norms, context), state.values
        num, is_used = state.counts.clamp(max=self.window), values < math.inf
        mean = torch.where(is_used, values, 0.0).sum(1) / num
        var = torch.where(is_used, values - mean.unsqueeze(1), 0.0).square().sum(1) / (num - 1)
        highest = mean + self.z_thresh * torch.maximum(var.sqrt(), _ROUNDING * mean.abs())
        highest = torch.where(num >= max(2, self.window // 2), highest, math.inf)
        norm_fits, loss_fits = (((now <= highest) & (now < math.inf)) | now.isnan()).unbind()
        return norm_fits & loss_fits & (norms <= self.max_norm)


def _norm_and_loss(norms: Tensor, context: NormContext) -> Tensor:
    """Shapes: norms: []; the result: [2], NaN where no loss is given."""
    loss = torch.full_like(norms, math.nan) if context.loss is None else context.loss
    return torch.stack([norms, loss])


def _check_z(name: str, value: Any) -> float:
    number = as_number(name, value, "a number, such as 6.0, or math.inf for max_norm alone")
    if not number >= 0:
        raise ValueError(
            f"cannot leave out spikes with {name}={number}: it is how many deviations above their "
            f"mean norms may lie, and norms at or below the mean are none. Pass 0 or above, or "
            f"math.inf for max_norm alone."
        )
    return number


def _check_window(name: str, value: Any) -> int:
    number = as_number(name, value)
    if not (number >= 2 and number.is_integer()):
        raise ValueError(
            f"cannot leave out spikes with {name}={shown(value)}: it is how many norms a mean and "
            f"a deviation are made from, and one norm has no deviation. Pass a whole number, 2 or "
            f"above."
        )
    return int(number)
