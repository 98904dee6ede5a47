"""What a policy is: how large a group of elements is, and the limit for its norm."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

# A NamedTuple of tensors, or of such NamedTuples.
State = TypeVar("State", bound="tuple[Any, ...]")


class Scope(Enum):
    """The elements that share one norm and one limit."""

    MODEL = "model"
    TENSOR = "tensor"
    UNIT = "unit"  # one index of a dim: an output channel, a row; a tensor of at most one dim is one unit
    ELEMENT = "element"


class EmptyState(NamedTuple):
    """The state of a policy that keeps none."""


class NormContext(NamedTuple):
    """What a policy may know of its groups of elements beside their norms; the same on every rank.

    Attributes:
        sizes: how many elements each group has over all ranks; float64, shaped like the norms.
        weights: the norms of the groups' parameters; float64, shaped like the norms. None unless `needs_weights`.
        total_norm: the norm of everything that the policy is given; a float64 scalar.
    """

    sizes: Tensor
    weights: Tensor | None
    total_norm: Tensor


class Policy(Protocol[State]):
    """A frozen dataclass that sets limits. It knows no rank, no layout and no device but its arguments'."""

    @property
    def scope(self) -> Scope: ...

    @property
    def norm_type(self) -> float: ...

    @property
    def needs_weights(self) -> bool:
        """Whether `About.weights` must be measured."""
        ...

    def init(self, num_groups: int, device: torch.device) -> State:
        """The state before the first step, on `device`: the same on every rank."""
        ...

    def limit(self, norms: Tensor, state: State, about: NormContext) -> tuple[Tensor | None, State]:
        """The largest norms let through, and the state after this step. No wait for the device.

        A limit of None says: measure only, write nothing. The caller keeps the new state where the total norm is
        finite, and the old one elsewhere.

        Shapes: norms and limits: [] with Scope.MODEL and Scope.ELEMENT, [num_groups] otherwise; float64.
        """
        ...


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


def check_finite(name: str, value: float) -> None:
    """Raises ValueError unless `value` is 0 or above, and finite."""
    if not 0 <= value < float("inf"):
        raise ValueError(
            f"cannot clip with {name}={value}: it is a factor of norms, where a negative number would turn the "
            f"gradients around, and NaN or infinity times 0 would make them NaN. Pass a finite number, 0 or above."
        )


def check_between(name: str, value: float, lowest: float, highest: float) -> None:
    """Raises ValueError unless `lowest <= value <= highest`; NaN is refused."""
    if not lowest <= value <= highest:
        raise ValueError(
            f"cannot clip with {name}={value}: it says where among past norms the limit lies, and outside "
            f"{lowest:g}..{highest:g} that is nowhere. Pass a number from {lowest:g} to {highest:g}."
        )


def check_count(name: str, value: int) -> None:
    """Raises ValueError unless `value` is a whole number, 1 or above."""
    if not (isinstance(value, int) and value >= 1):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"cannot clip with {name}={value}: it counts the norms that the first limit is made from, and none or a "
            f"part of one says nothing about the next. Pass a whole number, 1 or above."
        )
