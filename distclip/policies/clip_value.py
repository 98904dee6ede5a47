"""One limit for the magnitude of each element."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from distclip.policies.base import (
    EmptyState,
    NormContext,
    Scope,
    StatelessPolicy,
    constant_limit,
)
from distclip.policies.checks import check_not_negative, store_checked


@dataclass(frozen=True)
class ClipValue(StatelessPolicy):
    """Clamps every element to [-clip_value, clip_value].

    An infinity becomes the bound; NaN stays NaN. The reported norm is the largest magnitude
    (p = inf). `clip_value=math.inf` only measures.

    Raises:
        ValueError: `clip_value` is negative or NaN.

    Reference: torch, `torch.nn.utils.clip_grad_value_`.
    """

    clip_value: float
    scope = Scope.ELEMENT
    norm_type = math.inf

    def __post_init__(self) -> None:
        store_checked(self, clip_value=check_not_negative)

    def limit(
        self, norms: Tensor, state: EmptyState, context: NormContext
    ) -> tuple[Tensor | None, EmptyState]:
        return constant_limit(self.clip_value, norms), state
