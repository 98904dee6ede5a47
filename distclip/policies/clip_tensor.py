"""One limit for the norm of each tensor by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distclip.policies.base import EmptyState, NormContext, Scope, StatelessPolicy
from distclip.policies.checks import check_norm_type, check_not_negative, store_checked


@dataclass(frozen=True)
class ClipTensorNorm(StatelessPolicy):
    """Scales each gradient by min(1, max_norm / its own norm), as TensorFlow's `clip_by_norm` does.

    A zero gradient stays as it is; a NaN or an infinity affects its own tensor alone.
    `max_norm=math.inf` only measures.

    Raises:
        ValueError: `max_norm` is negative or NaN, or `norm_type` is not above 0.

    Reference: TensorFlow, `tf.clip_by_norm`; Keras, `clipnorm`.
    """

    max_norm: float
    norm_type: float = 2.0
    scope = Scope.TENSOR

    def __post_init__(self) -> None:
        store_checked(self, max_norm=check_not_negative, norm_type=check_norm_type)

    def limit(
        self, norms: Tensor, state: EmptyState, context: NormContext
    ) -> tuple[Tensor | None, EmptyState]:
        limit = None if math.isinf(self.max_norm) else torch.full_like(norms, self.max_norm)
        return limit, state


@dataclass(frozen=True)
class ClipBlockRMS(StatelessPolicy):
    """Scales each gradient to a root mean square of at most `threshold`.

    The limit of a tensor's norm is threshold * sqrt(number of elements), where elements on other
    ranks count too. A zero or an empty gradient stays as it is. `threshold=math.inf` only measures.

    Raises:
        ValueError: `threshold` is negative or NaN.

    Reference: optax, `clip_by_block_rms`.
    """

    threshold: float
    scope = Scope.TENSOR
    norm_type = 2.0

    def __post_init__(self) -> None:
        store_checked(self, threshold=check_not_negative)

    def limit(
        self, norms: Tensor, state: EmptyState, context: NormContext
    ) -> tuple[Tensor | None, EmptyState]:
        limit = None if math.isinf(self.threshold) else self.threshold * context.sizes.sqrt()
        return limit, state
