"""What a policy is: how large a group of elements is, and the limit for its norm."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor


class Scope(Enum):
    """The elements that share one norm and one limit."""

    MODEL = "model"
    TENSOR = "tensor"
    UNIT = "unit"
    ELEMENT = "element"


class About(NamedTuple):
    """What a policy may know of its groups of elements beside their norms.

    Attributes:
        sizes: how many elements each has over all ranks; float64, shaped like the norms.
        weights: the norms of their parameters, likewise; only if the policy needs them.
        total_norm: of everything that the policy is given; a float64 scalar.
    """

    sizes: Tensor
    weights: Tensor | None
    total_norm: Tensor


class NoState(NamedTuple):
    """What a policy without memory keeps."""


class Policy(Protocol):
    """A frozen dataclass that sets limits. It knows no rank, no layout and no device but its arguments'."""

    @property
    def scope(self) -> Scope: ...

    @property
    def norm_type(self) -> float: ...

    @property
    def needs_weights(self) -> bool: ...

    def init(self, num_groups: int, device: torch.device) -> Any:
        """What the policy remembers before the first step: a NamedTuple of tensors."""
        ...

    def limit(self, norms: Tensor, state: Any, about: About) -> tuple[Tensor | None, Any]:
        """The largest norms let through, and what is remembered if the step counts.

        Nothing is copied to the host. The clipper drops the new state where the total norm is not finite.

        Shapes: norms and limits: [] for MODEL and ELEMENT, [num_groups] for TENSOR and UNIT; float64. No limit:
            measure only, write nothing.
        """
        ...


class Combines:
    """Gives a policy `&`: the smaller of two limits."""

    needs_weights = False

    def __and__(self, other: Policy) -> Both:
        return Both(cast(Policy, self), other)


class Stateless(Combines):
    """A policy that remembers nothing."""

    def init(self, num_groups: int, device: torch.device) -> NoState:
        del num_groups, device
        return NoState()


class BothStates(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Both(Combines):
    """The smaller of two limits of one scope, written `a & b`. Each policy sees the norms as if it were alone.

    Raises:
        ValueError: the two measure different things.
    """

    first: Policy
    second: Policy

    def __post_init__(self) -> None:
        here = [(p.scope, p.norm_type, unit_dim_of(p)) for p in (self.first, self.second)]
        if here[0] != here[1] or here[0][0] is Scope.ELEMENT:
            raise ValueError(
                f"cannot take the smaller limit of {self.first} and {self.second}: they must share a scope other than "
                f"ELEMENT, a norm_type and units, but have {here[0]} and {here[1]}, whose limits do not compare. "
                f"Combine policies of one scope, or give them to parameter groups."
            )

    @property
    def scope(self) -> Scope:
        return self.first.scope

    @property
    def norm_type(self) -> float:
        return self.first.norm_type

    @property
    def unit_dim(self) -> int:
        return unit_dim_of(self.first)

    @property
    def needs_weights(self) -> bool:
        return self.first.needs_weights or self.second.needs_weights

    def init(self, num_groups: int, device: torch.device) -> BothStates:
        return BothStates(self.first.init(num_groups, device), self.second.init(num_groups, device))

    def limit(self, norms: Tensor, state: BothStates, about: About) -> tuple[Tensor | None, BothStates]:
        first, first_state = self.first.limit(norms, state.first, about)
        second, second_state = self.second.limit(norms, state.second, about)
        new = BothStates(first_state, second_state)
        if first is None or second is None:
            return (second if first is None else first), new
        return torch.minimum(first, second), new


def unit_dim_of(policy: Policy) -> int:
    """The dim whose indices are the units of a policy of scope UNIT."""
    return getattr(policy, "unit_dim", 0)


def exclude_of(policy: Policy) -> tuple[Any, ...]:
    """What a policy leaves out: patterns of names, names of modules, modules."""
    return getattr(policy, "exclude", ())


def check(owner: str, name: str, value: float, fits: bool, bounds: str) -> None:
    """Raises ValueError with the value and the range unless it fits (NaN fits nowhere)."""
    if not fits:
        raise ValueError(
            f"cannot make {owner}({name}={value!r}): {name} must be {bounds}, or its limit would have no meaning. "
            f"Pass a number in that range."
        )


def check_norm_type(norm_type: float) -> None:
    """Raises ValueError unless `norm_type` is above 0, infinity included."""
    if not norm_type > 0:
        raise ValueError(
            f"cannot measure with norm_type={norm_type}: only p > 0 and inf give a norm that vanishes for zero "
            f"gradients alone and can be summed over shards (p = 0 counts entries, p < 0 is 0 as soon as one "
            f"entry is, NaN compares with nothing). Pass a number above 0, such as 2.0, or math.inf."
        )


def check_not_negative(name: str, value: float) -> None:
    """Raises ValueError unless `value` is 0 or above; NaN is refused."""
    if not value >= 0:
        raise ValueError(
            f"cannot clip with {name}={value}: a norm is never negative, so that a negative limit would turn the "
            f"gradients around and NaN would make them all NaN. Pass 0 or above; math.inf measures only."
        )
