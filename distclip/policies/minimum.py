"""The smaller of two limits, written `a & b`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distclip.policies.base import EmptyState, NormContext, Policy, Scope


class PolicyBase:
    """Gives a policy `a & b`."""

    needs_weights = False

    def __and__(self: Policy[Any], other: Policy[Any]) -> Minimum:
        return Minimum(self, other)


class StatelessPolicy(PolicyBase):
    """A policy without a state."""

    def init(self, num_groups: int, device: torch.device) -> EmptyState:
        return EmptyState()


class MinimumState(NamedTuple):
    first: tuple[Any, ...]
    second: tuple[Any, ...]


@dataclass(frozen=True)
class Minimum(PolicyBase):
    """The smaller of the limits that `first` and `second` set for the same norms.

    Each keeps its own statistics, of the norms before either has clipped.

    Raises:
        ValueError: the two do not share their norms: another scope, `norm_type`, `unit_dim` or `exclude`.

    Example:
        >>> import distclip
        >>> distclip.ClipNorm(5.0) & distclip.AutoClip(percentile=50.0)
        Both(first=ClipNorm(max_norm=5.0, norm_type=2.0), second=AutoClip(percentile=50.0, history=10000))
    """

    first: Policy[Any]
    second: Policy[Any]

    def __post_init__(self) -> None:
        for found, usual in (("scope", None), ("norm_type", None), ("unit_dim", 0), ("exclude", ())):
            a, b = getattr(self.first, found, usual), getattr(self.second, found, usual)
            if a != b:
                raise ValueError(
                    f"cannot take the smaller limit of {self.first} and {self.second}: their {found} is {a} and {b}, "
                    f"so that they set limits for different norms, of which neither is the smaller. Combine policies "
                    f"with the same {found}, or give each its own parameter group."
                )
        if self.scope is Scope.ELEMENT:
            raise ValueError(
                f"cannot take the smaller limit of {self.first} and {self.second}: they clamp each element, which is "
                f"done without a norm or a limit for it. Write one policy with the smaller clip_value."
            )

    @property
    def scope(self) -> Scope:
        return self.first.scope

    @property
    def norm_type(self) -> float:
        return self.first.norm_type

    @property
    def unit_dim(self) -> int:
        return getattr(self.first, "unit_dim", 0)

    @property
    def exclude(self) -> tuple[Any, ...]:
        return getattr(self.first, "exclude", ())

    @property
    def needs_weights(self) -> bool:
        return self.first.needs_weights or self.second.needs_weights

    def init(self, num_groups: int, device: torch.device) -> MinimumState:
        return MinimumState(self.first.init(num_groups, device), self.second.init(num_groups, device))

    def limit(self, norms: Tensor, state: MinimumState, about: NormContext) -> tuple[Tensor | None, MinimumState]:
        a, first = self.first.limit(norms, state.first, about)
        b, second = self.second.limit(norms, state.second, about)
        smaller = b if a is None else a if b is None else torch.minimum(a, b)
        return smaller, MinimumState(first, second)
