"""Each tensor is limited by its own past norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

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


class AdaGCState(NamedTuple):
    """
    Attributes:
        gamma: the moving average of each tensor's clipped norm, inf where it has had no gradient
            yet; float64 [num_groups].
        num_steps: the number of steps so far; int64 scalar.
    """

    gamma: Tensor
    num_steps: Tensor


@dataclass(frozen=True)
class AdaGC(PolicyBase):
    """Clips each tensor's norm to `ratio` times the moving average γ of its own clipped norms.

        warmup:      all are scaled by min(1, max_norm / total norm);  γ ← min(γ, clipped norm)
        afterwards:  limit = ratio γ;  γ ← beta γ + (1 - beta) clipped norm

    γ starts at infinity. A norm of 0 leaves γ as it is, because it says nothing about a tensor's
    scale: an expert that got no token, or a weight behind a zero-initialised one, would otherwise
    be clipped to 0 for ever. A tensor that had no gradient before the warm-up ended is clipped
    together with all the others until it has a γ.

    Args:
        max_norm: `math.inf` switches clipping off during the warm-up.

    Raises:
        ValueError: `ratio` is negative, infinite or NaN, `max_norm` is negative or NaN, `beta` is
            outside 0..1, or `warmup_steps` is not a whole number above 0.

    Reference: Wang et al., "AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient
        Clipping", 2025 (arXiv:2502.11034), which writes λ_rel for ratio, λ_abs for max_norm and
        T_start for warmup_steps; the defaults are those of the authors' code.
    """

    ratio: float = 1.04
    max_norm: float = 1.0
    beta: float = 0.99
    warmup_steps: int = 100
    scope = Scope.TENSOR
    norm_type = 2.0

    def __post_init__(self) -> None:
        store_checked(self, ratio=check_finite, max_norm=check_not_negative)
        store_checked(self, beta=check_fraction, warmup_steps=check_count)

    def init(self, num_groups: int, device: torch.device) -> AdaGCState:
        gamma = torch.full((num_groups,), math.inf, dtype=torch.float64, device=device)
        return AdaGCState(gamma, torch.zeros((), dtype=torch.int64, device=device))

    def valid_state(self, state: AdaGCState) -> AdaGCState:
        return AdaGCState(state.gamma >= 0, is_count(state.num_steps))

    def limit(
        self, norms: Tensor, state: AdaGCState, context: NormContext
    ) -> tuple[Tensor | None, AdaGCState]:
        warming_up = (state.num_steps < self.warmup_steps) | state.gamma.isinf()
        total = context.total_norm
        scale = torch.where(total <= self.max_norm, 1.0, self.max_norm / total)
        limit = torch.where(warming_up, norms * scale, self.ratio * state.gamma)
        clipped = torch.minimum(norms, limit)
        average = self.beta * state.gamma + (1 - self.beta) * clipped
        gamma = torch.where(warming_up, torch.minimum(state.gamma, clipped), average)
        gamma = torch.where(norms > 0, gamma, state.gamma)
        return limit, AdaGCState(gamma, state.num_steps + 1)
