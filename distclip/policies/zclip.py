"""Spikes are pulled back to the mean of past norms, the further the higher they are."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distclip.policies.base import NormContext, PolicyBase, Scope
from distclip.policies.checks import (
    check_count,
    check_finite,
    check_fraction,
    check_not_negative,
    is_count,
    store_checked,
)

_LARGEST = sys.float_info.max


class ZClipState(NamedTuple):
    """
    Attributes:
        mean, var: of the norms so far, spikes pulled back; float64 scalars. A variance that float64
            does not hold is its largest number.
        num_steps: the number of norms above 0 so far; int64 scalar.
    """

    mean: Tensor
    var: Tensor
    num_steps: Tensor


@dataclass(frozen=True)
class ZClip(PolicyBase):
    """Clips a total norm that lies more than `z_thresh` deviations above the mean of past norms.

    With the mean μ and the deviation σ of the norms before this step, and z = (norm - μ) / σ:

        limit = μ + z_thresh² σ / z      if z > z_thresh  (reciprocal clipping)
        μ ← alpha μ + (1 - alpha) n             with n = min(norm, limit)
        σ² ← alpha σ² + (1 - alpha) (n - μ)²

    The limit is never above `max_norm`, which does not enter the statistics. The first
    `warmup_steps` norms are clipped to `max_norm` alone; their mean and variance are the first μ
    and σ². Where σ is 0, any norm above μ is pulled back to μ. The authors' code adds 1e-6 to σ
    in z; nothing is added here, because the limit would then depend on the scale of the loss.

    A norm of 0 changes no statistic and is no step of the warm-up, because it says nothing about a
    scale: parameters that were frozen during the warm-up would be clipped to 0 for ever.

    σ is at most 1e154, because float64 holds no larger square; norms of float32 gradients are far
    below. Where μ is far above it, any norm above μ is pulled back to about μ.

    With on_nonfinite="propagate" an infinite norm is pulled back to μ, to `max_norm` in the
    warm-up, and NaN makes all gradients NaN. Neither changes a statistic.

    Args:
        max_norm: `math.inf` or None, as in the authors' code, switches this bound off.

    Raises:
        ValueError: `z_thresh` is negative, infinite or NaN, `alpha` is outside 0..1, `warmup_steps`
            is not a whole number above 0, or `max_norm` is negative or NaN.

    Reference: Kumar, Owen, Chowdhury, Güra, "ZClip: Adaptive Spike Mitigation for LLM
        Pre-Training", 2025 (arXiv:2504.02507), with z-scores and reciprocal clipping; the order of
        the updates is that of the authors' code.
    """

    z_thresh: float = 2.5
    alpha: float = 0.97
    warmup_steps: int = 25
    max_norm: float | None = 1.0
    scope = Scope.MODEL
    norm_type = 2.0

    def __post_init__(self) -> None:
        store_checked(self, z_thresh=check_finite, alpha=check_fraction, warmup_steps=check_count)
        store_checked(self, max_norm=_check_bound)

    def init(self, num_groups: int, device: torch.device) -> ZClipState:
        mean, var = torch.zeros(2, dtype=torch.float64, device=device).unbind()
        return ZClipState(mean, var, torch.zeros((), dtype=torch.int64, device=device))

    def valid_state(self, state: ZClipState) -> ZClipState:
        return ZClipState(state.mean >= 0, state.var >= 0, is_count(state.num_steps))

    def limit(
        self, norms: Tensor, state: ZClipState, context: NormContext
    ) -> tuple[Tensor | None, ZClipState]:
        warming_up = state.num_steps < self.warmup_steps
        highest = _highest(norms, state, self.z_thresh)
        first = _sample_statistics(norms, state)
        later = _moving_statistics(torch.minimum(norms, highest), state, self.alpha)
        mean, var = (torch.where(warming_up, a, b) for a, b in zip(first, later, strict=True))
        after = ZClipState(mean, var, state.num_steps + 1)
        is_norm = norms > 0
        after = ZClipState(*(torch.where(is_norm, a, b) for a, b in zip(after, state, strict=True)))
        limit = torch.where(warming_up, math.inf, highest).clamp(max=self.max_norm)
        return limit, after


def _check_bound(name: str, value: Any) -> float:
    return check_not_negative(name, math.inf if value is None else value)


def _highest(norm: Tensor, past: ZClipState, z_thresh: float) -> Tensor:
    std = past.var.sqrt()
    threshold = past.mean + z_thresh * std
    z = (norm - past.mean) / std
    # A product, because Python's power of a large number raises.
    back = past.mean + z_thresh * z_thresh * std / z
    return torch.where(norm <= threshold, threshold, back)


def _sample_statistics(norm: Tensor, past: ZClipState) -> tuple[Tensor, Tensor]:
    """Mean and population variance with one norm more: Welford's update, which keeps no norms."""
    num = past.num_steps + 1
    mean = past.mean + (norm - past.mean) / num
    var = past.var + ((norm - past.mean) * (norm - mean) - past.var) / num
    return mean, var.clamp(max=_LARGEST)


def _moving_statistics(norm: Tensor, past: ZClipState, alpha: float) -> tuple[Tensor, Tensor]:
    mean = alpha * past.mean + (1 - alpha) * norm
    var = alpha * past.var + (1 - alpha) * (norm - mean).square()
    return mean, var.clamp(max=_LARGEST)
