"""Each tensor gets a norm that follows from its own past norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.policies.base import NormContext, PolicyBase, Scope
from distclip.policies.checks import check_decay, check_finite, is_count, store_checked


class AdaGNState(NamedTuple):
    """
    Attributes:
        mean, rms: m and the root of v, of each tensor's norms; float64 [num_groups]. The root, as a
            square may be too large or too small for float64.
        num_steps: how many norms above 0 each tensor had so far; int64 [num_groups].
    """

    mean: Tensor
    rms: Tensor
    num_steps: Tensor


@dataclass(frozen=True)
class AdaGN(PolicyBase):
    """Gives each tensor a norm of about 1: less in a spike, and more than it has where it has less.

        m ← gamma1 m + (1 - gamma1) norm           m̂ = m / (1 - gamma1^t)
        v ← gamma2 v + (1 - gamma2) norm²          v̂ = v / (1 - gamma2^t)
        new norm = m̂ / (sqrt(v̂) + eps)

    With norms that do not change the new norm is 1 / (1 + eps / norm), whatever the norm is, and a
    spike after such norms gets at most sqrt((1 - gamma1)² / (1 - gamma2) + gamma1² / gamma2), 1.2
    with the defaults. Optimizers such as SGD, whose steps are as long as the gradients, need
    another learning rate; those of Adam's kind divide by the gradients' size themselves.

    A norm of 0 changes nothing: the gradient stays 0, and m, v and t of this tensor stay as they
    are, because a tensor without a token says nothing about its scale. The authors' code does the
    same where there is no gradient, but counts a gradient of zeros. With on_nonfinite="propagate" a
    gradient whose norm is NaN or infinite becomes NaN, and no other.

    Raises:
        ValueError: `gamma1` or `gamma2` is below 0, 1 or above, or `eps` is negative, infinite or
            NaN.

    Reference: Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam", 2025
        (arXiv:2502.17055), adaptive gradient norm; the defaults are those of the authors' code, in
        which AdaClip scales the largest elements first.
    """

    gamma1: float = 0.7
    gamma2: float = 0.9
    eps: float = 1e-8
    scope = Scope.TENSOR
    norm_type = 2.0
    raises = True

    def __post_init__(self) -> None:
        store_checked(self, gamma1=check_decay, gamma2=check_decay, eps=check_finite)

    def init(self, num_groups: int, device: torch.device) -> AdaGNState:
        mean, rms = torch.zeros(2, num_groups, dtype=torch.float64, device=device).unbind()
        return AdaGNState(mean, rms, torch.zeros(num_groups, dtype=torch.int64, device=device))

    def valid_state(self, state: AdaGNState) -> AdaGNState:
        mean, rms, num_steps = state
        is_new = num_steps == 0
        mean_may_be = torch.where(is_new, mean == 0, mean >= 0)
        return AdaGNState(mean_may_be, torch.where(is_new, rms == 0, rms >= 0), is_count(num_steps))

    def limit(
        self, norms: Tensor, state: AdaGNState, context: NormContext
    ) -> tuple[Tensor | None, AdaGNState]:
        is_norm = norms != 0  # NaN is one: the caller forgets the state
        num_steps = state.num_steps + is_norm
        mean = self.gamma1 * state.mean + (1 - self.gamma1) * norms
        rms = torch.hypot(math.sqrt(self.gamma2) * state.rms, math.sqrt(1 - self.gamma2) * norms)
        unbiased_mean = mean / (1 - self.gamma1 ** num_steps.double())
        unbiased_rms = rms / (1 - self.gamma2 ** num_steps.double()).sqrt()
        new_norms = unbiased_mean / (unbiased_rms + self.eps)
        after = AdaGNState(
            torch.where(is_norm, mean, state.mean),
            torch.where(is_norm, rms, state.rms),
            num_steps,
        )
        return torch.where(is_norm, new_norms, math.inf), after
