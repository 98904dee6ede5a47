"""AdaGC: each tensor's limit follows its own clipped norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.policies._policy import About, Combines, Scope, check, check_norm_type, check_not_negative


class Followed(NamedTuple):
    """The moving average of each tensor's clipped norm, float64 [num_groups]; the number of steps, int64."""

    norms: Tensor
    seen: Tensor


@dataclass(frozen=True)
class AdaGC(Combines):
    """Clips each tensor to `ratio` times the moving average of its own clipped norms.

    For `warmup_steps` steps all gradients are scaled together by min(1, max_norm / total norm), and the smallest
    norm that each tensor then has is where its average starts.

    Raises:
        ValueError: `ratio` is not above 0, `beta` outside 0..1, `warmup_steps` below 1, `max_norm` negative or NaN,
            `norm_type` not above 0.

    Reference: Wang et al., "AdaGC: improving training stability for large language model pretraining", 2025
        (arXiv:2502.11034), algorithm 1.
    """

    ratio: float = 1.05
    max_norm: float = 1.0
    beta: float = 0.98
    warmup_steps: int = 100
    norm_type: float = 2.0
    scope = Scope.TENSOR

    def __post_init__(self) -> None:
        check("AdaGC", "ratio", self.ratio, 0 < self.ratio < math.inf, "above 0 and finite")
        check("AdaGC", "beta", self.beta, 0 <= self.beta <= 1, "within 0..1")
        check("AdaGC", "warmup_steps", self.warmup_steps, self.warmup_steps >= 1, "1 or above")
        check_not_negative("max_norm", self.max_norm)
        check_norm_type(self.norm_type)

    def init(self, num_groups: int, device: torch.device) -> Followed:
        norms = torch.full((num_groups,), math.inf, dtype=torch.float64, device=device)
        return Followed(norms, torch.zeros((), dtype=torch.int64, device=device))

    def limit(self, norms: Tensor, state: Followed, about: About) -> tuple[Tensor | None, Followed]:
        warming = state.seen < self.warmup_steps
        share = torch.where(about.total_norm <= self.max_norm, 1.0, self.max_norm / about.total_norm)
        limits = torch.where(warming, share * norms, self.ratio * state.norms)
        clipped = torch.minimum(norms, limits)
        followed = torch.lerp(clipped, state.norms, self.beta)
        new = torch.where(warming, torch.minimum(state.norms, clipped), followed)
        return limits, Followed(new, state.seen + 1)
