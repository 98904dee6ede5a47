"""SGD and AdamW in float64, on the elements of one rank."""

from __future__ import annotations

from typing import Any

import numpy as np

LR, MOMENTUM, DECAY, BETAS, EPS = 0.1, 0.9, 0.1, (0.9, 0.999), 1e-8
NEAR = 2e-6


class Optimizer:
    """The weights after a step, and how far float32 may be off."""

    def __init__(self, kind: str) -> None:
        self.is_sgd = kind.startswith("SGD")
        self.num_steps, self.first, self.second = 0, 0.0, 0.0
        self.sizes = 0.0  # of what the first moment was added up from, which may cancel

    def step(self, weights: Any, grads: Any) -> tuple[Any, Any]:
        with np.errstate(all="ignore"):
            self.num_steps += 1
            weights = weights.astype(np.float64)
            return self._sgd(weights, grads) if self.is_sgd else self._adamw(weights, grads)

    def _sgd(self, weights: Any, grads: Any) -> tuple[Any, Any]:
        self.sizes = MOMENTUM * self.sizes + np.abs(grads)
        self.first = _float32(MOMENTUM * self.first + grads)
        right = _float32(weights - LR * self.first)
        return right, NEAR * (np.abs(weights) + LR * self.sizes) + 1e-44

    def _adamw(self, weights: Any, grads: Any) -> tuple[Any, Any]:
        a, b = BETAS
        self.first = a * self.first + (1 - a) * grads
        self.second = _float32(b * self.second + (1 - b) * grads * grads)
        m = self.first / (1 - a**self.num_steps)
        v = self.second / (1 - b**self.num_steps)
        change = LR * m / (np.sqrt(v) + EPS)
        right = _float32(weights * (1 - LR * DECAY) - change)
        return right, 50 * NEAR * (np.abs(weights) + np.abs(change)) + 1e-6


def _float32(numbers: Any) -> Any:
    """Infinities where float32 has them."""
    return numbers.astype(np.float32).astype(np.float64)
