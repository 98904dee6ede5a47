"""Adaptive gradient clipping: a limit for each unit, in proportion to the norm of its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from distclip.policies._policy import About, NoState, Scope, Stateless, check, check_norm_type


@dataclass(frozen=True)
class AGC(Stateless):
    """Scales each unit's gradient by min(1, clip_factor * max(weight norm, eps) / gradient norm).

    A unit is one index of dim 0, the weights of one output; tensors of fewer than two dims are one unit. The floor
    `eps` lets weights that start at zero learn. The paper leaves the last linear layer out: `exclude=("head",)`.

    Args:
        exclude: patterns of parameter names ("head.*"), names of modules ("head"), or modules.
        unit_dim: -1 for units on the last dim, as optax has them.

    Raises:
        ValueError: `clip_factor` is negative or NaN, `eps` or `norm_type` not above 0, `unit_dim` neither 0 nor -1;
            when the Clipper is made, an `exclude` that matches nothing.

    Reference: Brock, De, Smith, Simonyan, "High-performance large-scale image recognition without normalization",
        2021 (arXiv:2102.06171), section 4, equation 3.
    """

    clip_factor: float = 0.01
    eps: float = 1e-3
    norm_type: float = 2.0
    exclude: tuple[str | nn.Module, ...] = ()
    unit_dim: int = 0
    scope = Scope.UNIT
    needs_weights = True

    def __post_init__(self) -> None:
        check("AGC", "clip_factor", self.clip_factor, self.clip_factor >= 0, "0 or above")
        check("AGC", "eps", self.eps, 0 < self.eps < math.inf, "above 0 and finite")
        check("AGC", "unit_dim", self.unit_dim, self.unit_dim in (0, -1), "0 or -1")
        check_norm_type(self.norm_type)

    def limit(self, norms: Tensor, state: NoState, about: About) -> tuple[Tensor | None, NoState]:
        assert about.weights is not None
        return self.clip_factor * about.weights.clamp(min=self.eps), state
