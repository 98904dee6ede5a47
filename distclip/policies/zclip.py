"""ZClip: a norm far above the recent ones is pulled back towards their mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.policies._policy import About, Combines, Scope, check, check_norm_type, check_not_negative

_EPS = 1e-6  # keeps z finite where all norms were equal, as in the authors' code


class Running(NamedTuple):
    """Mean and variance of the norms let through, float64; the norms of the warm-up; how many there have been."""

    mean: Tensor
    variance: Tensor
    warm_up: Tensor
    seen: Tensor


@dataclass(frozen=True)
class ZClip(Combines):
    """Clips the total norm N where z = (N - mean) / deviation passes `z_thresh`, to mean + z_thresh^2 / z deviations.

    Mean and variance are moving averages of the norms let through, from the steps before this one; the wilder the
    spike, the harder the pull. They start from the mean and variance of `warmup_steps` norms, during which only
    `max_norm` limits. Afterwards the limit is never above `max_norm` either; `math.inf` switches that off.

    Raises:
        ValueError: `z_thresh` is not above 0, `alpha` outside 0..1, `warmup_steps` below 1, `max_norm` negative or
            NaN, `norm_type` not above 0.

    Reference: Kumar, Owen, Chowdhury, Guera, "ZClip: adaptive spike mitigation for LLM pre-training", 2025
        (arXiv:2504.02507), reciprocal clipping. The variance takes the mean of after the step, as the authors' code.
    """

    z_thresh: float = 2.5
    alpha: float = 0.97
    warmup_steps: int = 25
    max_norm: float = 1.0
    norm_type: float = 2.0
    scope = Scope.MODEL

    def __post_init__(self) -> None:
        check("ZClip", "z_thresh", self.z_thresh, self.z_thresh > 0, "above 0")
        check("ZClip", "alpha", self.alpha, 0 <= self.alpha <= 1, "within 0..1")
        check("ZClip", "warmup_steps", self.warmup_steps, self.warmup_steps >= 1, "1 or above")
        check_not_negative("max_norm", self.max_norm)
        check_norm_type(self.norm_type)

    def init(self, num_groups: int, device: torch.device) -> Running:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        warm_up = torch.zeros(self.warmup_steps, dtype=torch.float64, device=device)
        return Running(zero, zero, warm_up, torch.zeros((), dtype=torch.int64, device=device))

    def limit(self, norms: Tensor, state: Running, about: About) -> tuple[Tensor | None, Running]:
        del about
        warming = state.seen < self.warmup_steps
        deviation = state.variance.sqrt()
        z = (norms - state.mean) / (deviation + _EPS)
        pulled = state.mean + self.z_thresh**2 * deviation / z
        passed = torch.where(~warming & (z > self.z_thresh), pulled, norms)
        return passed.clamp(max=self.max_norm), self._after(passed, warming, state)

    def _after(self, passed: Tensor, warming: Tensor, state: Running) -> Running:
        place = state.seen.clamp(max=self.warmup_steps - 1).reshape(1)
        warm_up = torch.where(warming, state.warm_up.index_copy(0, place, passed.reshape(1)), state.warm_up)
        mean = torch.lerp(passed, state.mean, self.alpha)
        variance = torch.lerp((passed - mean).square(), state.variance, self.alpha)
        last = state.seen == self.warmup_steps - 1
        mean = torch.where(last, warm_up.mean(), torch.where(warming, state.mean, mean))
        variance = torch.where(last, warm_up.var(unbiased=False), torch.where(warming, state.variance, variance))
        return Running(mean, variance, warm_up, state.seen + 1)
