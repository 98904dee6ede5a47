"""One limit for the norm of all gradients together."""

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
from distclip.policies.checks import check_norm_type, check_not_negative, store_checked

_EPS = 1e-6  # torch.nn.utils.clip_grad


@dataclass(frozen=True)
class ClipNorm(StatelessPolicy):
    """Scales all gradients by min(1, max_norm / total norm).

    The quotient is exact, without torch's 1e-6: the norm afterwards is at most `max_norm`, up to
    the rounding of the gradients' dtype. `max_norm=math.inf` only measures and never writes.

    Raises:
        ValueError: `max_norm` is negative or NaN, or `norm_type` is not above 0.

    Example:
        >>> import torch, distclip
        >>> weight = torch.zeros(3, requires_grad=True)
        >>> weight.grad = torch.tensor([10.0, 20.0, 30.0])
        >>> report = distclip.Clipper([weight], distclip.ClipNorm(15.0)).clip_()
        >>> [round(x, 2) for x in weight.grad.tolist()]
        [4.01, 8.02, 12.03]

    Reference: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks",
        2013 (arXiv:1211.5063), algorithm 1.
    """

    max_norm: float
    norm_type: float = 2.0
    scope = Scope.MODEL

    def __post_init__(self) -> None:
        store_checked(self, max_norm=check_not_negative, norm_type=check_norm_type)

    def limit(
        self, norms: Tensor, state: EmptyState, context: NormContext
    ) -> tuple[Tensor | None, EmptyState]:
        return constant_limit(self.max_norm, norms), state


class TorchClipNorm(ClipNorm):
    """torch's coefficient, max_norm / (norm + 1e-6), as a policy: for what stands in its place."""

    def limit(
        self, norms: Tensor, state: EmptyState, context: NormContext
    ) -> tuple[Tensor | None, EmptyState]:
        # The limit whose quotient by the norm is torch's coefficient, at zero and infinity too.
        return None if math.isinf(self.max_norm) else self.max_norm / (1 + _EPS / norms), state
