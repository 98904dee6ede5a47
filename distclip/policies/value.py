"""One limit for every element."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distclip.policies._policy import About, NoState, Scope, Stateless, check_not_negative


@dataclass(frozen=True)
class ClipValue(Stateless):
    """Clamps every element to [-clip_value, clip_value]; NaN stays NaN. torch's `clip_grad_value_`.

    An element's norm is its magnitude, and g * min(1, c / |g|) is a clamp, which keeps infinities from becoming NaN.
    The norm that is reported is the largest magnitude.

    Raises:
        ValueError: `clip_value` is negative or NaN.
    """

    clip_value: float
    scope = Scope.ELEMENT
    norm_type = math.inf

    def __post_init__(self) -> None:
        check_not_negative("clip_value", self.clip_value)

    def limit(self, norms: Tensor, state: NoState, about: About) -> tuple[Tensor | None, NoState]:
        del about
        return None if math.isinf(self.clip_value) else torch.full_like(norms, self.clip_value), state
