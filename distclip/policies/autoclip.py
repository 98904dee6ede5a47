"""The limit is a percentile of the past norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.policies.base import NormContext, PolicyBase, Scope
from distclip.policies.checks import check_count, check_percentage, is_count, store_checked


class AutoClipState(NamedTuple):
    """
    Attributes:
        history: the latest norms; a new one overwrites the oldest. Unused entries are inf; float64
            [history].
        num_steps: the number of norms above 0 so far; int64 scalar.
    """

    history: Tensor
    num_steps: Tensor


@dataclass(frozen=True)
class AutoClip(PolicyBase):
    """Clips to a percentile of the total norms so far, the current one included.

    The percentile is interpolated linearly, as by `numpy.percentile`. The first step is never
    clipped. A norm of 0 is left out of the history, because it says nothing about a scale: after
    more than `percentile` per cent of zeros, such as those of frozen parameters, the limit would be
    0. So is a norm that is NaN or infinite: with on_nonfinite="propagate" the limit is then the
    percentile of the norms before it, infinity where there are none. With a finite limit, an
    infinite norm makes finite elements 0 and infinite ones NaN, as in torch; a NaN makes all NaN.

    Args:
        percentile: 0 is the smallest norm so far, 100 the largest, which clips nothing.
        history: how many of the latest norms are kept (the paper keeps all).

    Raises:
        ValueError: `percentile` is outside 0..100, or `history` is not a whole number above 0.

    Reference: Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: Adaptive Gradient Clipping for
        Source Separation Networks", 2020 (arXiv:2007.14469): the threshold is the p-th percentile
        of the history of gradient norms.
    """

    percentile: float = 10.0
    history: int = 10_000
    scope = Scope.MODEL
    norm_type = 2.0

    def __post_init__(self) -> None:
        store_checked(self, percentile=check_percentage, history=check_count)

    def init(self, num_groups: int, device: torch.device) -> AutoClipState:
        history = torch.full((self.history,), math.inf, dtype=torch.float64, device=device)
        return AutoClipState(history, torch.zeros((), dtype=torch.int64, device=device))

    def valid_state(self, state: AutoClipState) -> AutoClipState:
        index = torch.arange(self.history, device=state.history.device)
        is_norm = (state.history >= 0) & state.history.isfinite()
        history = torch.where(index < state.num_steps, is_norm, state.history == math.inf)
        return AutoClipState(history, is_count(state.num_steps))

    def limit(
        self, norms: Tensor, state: AutoClipState, context: NormContext
    ) -> tuple[Tensor | None, AutoClipState]:
        is_norm = (norms > 0) & (norms < math.inf)
        oldest = (state.num_steps % self.history).reshape(1)
        norm = torch.where(is_norm, norms, state.history.take(oldest).reshape(()))
        history = state.history.scatter(0, oldest, norm.reshape(1))
        new = AutoClipState(history, state.num_steps + is_norm)
        last = new.num_steps.clamp(1, self.history) - 1
        limit = _percentile(history.sort().values, last, self.percentile)
        return torch.where(new.num_steps > 0, limit, math.inf), new


def _percentile(ordered: Tensor, last: Tensor, percentile: float) -> Tensor:
    """The percentile of `ordered[: last + 1]`."""
    position = last.double() * (percentile / 100)
    below = position.floor().long()
    # `ordered[below]` would wait for the device, because an index must be a number on the host.
    low, high = ordered.take(torch.stack([below, torch.minimum(below + 1, last)])).unbind()
    return torch.lerp(low, high, position - below)
