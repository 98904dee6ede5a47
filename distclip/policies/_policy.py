"""What a policy is: how large a group of elements is, and the limit for its norm."""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from torch import Tensor


class Scope(Enum):
    """The elements that share one norm and one limit."""

    MODEL = "model"


class Policy(Protocol):
    """A frozen dataclass that sets limits. It knows no rank, no layout and no device but its arguments'."""

    @property
    def scope(self) -> Scope: ...

    @property
    def norm_type(self) -> float: ...

    def limit(self, norms: Tensor) -> Tensor | None:
        """The largest norms let through, shaped like `norms` (float64); None: measure only, write nothing."""
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
