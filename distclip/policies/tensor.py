"""One limit for each tensor's gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distclip.policies._policy import About, NoState, Scope, Stateless, check_norm_type, check_not_negative


@dataclass(frozen=True)
class ClipTensorNorm(Stateless):
    """Scales each tensor's gradient by min(1, max_norm / its norm); TensorFlow's `clip_by_norm`, Keras' `clipnorm`.

    Raises:
        ValueError: `max_norm` is negative or NaN, or `norm_type` is not above 0.
    """

    max_norm: float
    norm_type: float = 2.0
    scope = Scope.TENSOR

    def __post_init__(self) -> None:
        check_not_negative("max_norm", self.max_norm)
        check_norm_type(self.norm_type)

    def limit(self, norms: Tensor, state: NoState, about: About) -> tuple[Tensor | None, NoState]:
        del about
        return None if math.isinf(self.max_norm) else torch.full_like(norms, self.max_norm), state


@dataclass(frozen=True)
class ClipBlockRMS(Stateless):
    """Scales each tensor's gradient so that its root mean square is at most `threshold`; optax's `clip_by_block_rms`.

    The limit for the 2-norm is threshold * sqrt(number of elements).

    Raises:
        ValueError: `threshold` is negative or NaN.
    """

    threshold: float
    scope = Scope.TENSOR
    norm_type = 2.0

    def __post_init__(self) -> None:
        check_not_negative("threshold", self.threshold)

    def limit(self, norms: Tensor, state: NoState, about: About) -> tuple[Tensor | None, NoState]:
        del norms
        return None if math.isinf(self.threshold) else self.threshold * about.sizes.sqrt(), state
