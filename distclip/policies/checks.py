"""The ranges of the numbers that policies take, each as a Python number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from distclip.arguments import as_norm_type, as_number, shown

_MOST_STEPS = 2**53  # at a million steps a second, three centuries


def check_norm_type(name: str, value: Any) -> float:
    """Raises ValueError unless `value` is above 0, infinity included; "inf" is infinity."""
    number = as_norm_type(name, value)
    if not number > 0:
        raise ValueError(
            f"cannot measure with norm_type={number}: only p > 0 and inf give a norm that is 0 "
            f"for zero gradients alone and can be summed over shards (p = 0 counts entries, "
            f"p < 0 is 0 as soon as one entry is, NaN compares with nothing). Pass a number above "
            f"0, such as 2.0, or math.inf."
        )
    return number


def check_not_negative(name: str, value: Any) -> float:
    """Raises ValueError unless `value` is 0 or above; NaN is refused."""
    number = as_number(name, value, "a number, such as 1.0, or math.inf for no limit")
    if not number >= 0:
        raise ValueError(
            f"cannot clip with {name}={number}: a norm is never negative. A negative limit would "
            f"turn the gradients around, and NaN would make them all NaN. Pass 0 or above; "
            f"math.inf measures only."
        )
    return number


def check_finite(name: str, value: Any) -> float:
    """Raises ValueError unless `value` is 0 or above, and finite."""
    number = as_number(name, value)
    if not 0 <= number < float("inf"):
        raise ValueError(
            f"cannot clip with {name}={number}: norms are multiplied by it. A negative factor "
            f"would turn the gradients around, and NaN or infinity times 0 would make them NaN. "
            f"Pass a finite number, 0 or above."
        )
    return number


def check_fraction(name: str, value: Any) -> float:
    """Raises ValueError unless `value` is from 0 to 1; NaN is refused."""
    return _check_between(name, value, 0, 1)


def check_decay(name: str, value: Any) -> float:
    """Raises ValueError unless `value` is 0 or above and below 1; NaN is refused."""
    number = as_number(name, value)
    if not 0 <= number < 1:
        raise ValueError(
            f"cannot clip with {name}={number}: it is how much of an average of past norms stays "
            f"in each step, and with 1 no norm would ever enter it, while below 0 or above 1 it is "
            f"no average. Pass a number from 0 to below 1."
        )
    return number


def check_percentage(name: str, value: Any) -> float:
    """Raises ValueError unless `value` is from 0 to 100; NaN is refused."""
    return _check_between(name, value, 0, 100)


def check_count(name: str, value: Any) -> int:
    """Raises ValueError unless `value` is a whole number, 1 or above."""
    number = as_number(name, value)
    if not (number >= 1 and number.is_integer()):
        raise ValueError(
            f"cannot clip with {name}={shown(value)}: it counts the norms that the first limit is "
            f"made from, and none or a part of one says nothing about the next. Pass a whole "
            f"number, 1 or above."
        )
    return int(number)


def is_count(number: Tensor) -> Tensor:
    """Whether a loaded number of steps can be one; bool.

    One near the end of int64 would be negative after the next steps, and begin the warm-up anew.
    """
    return (number >= 0) & (number <= _MOST_STEPS)


def store_checked(policy: object, **checks: Callable[[str, Any], Any]) -> None:
    """Replaces fields of a frozen dataclass, while it is made, by what their checks return."""
    for name, check in checks.items():
        object.__setattr__(policy, name, check(name, getattr(policy, name)))


def _check_between(name: str, value: Any, lowest: float, highest: float) -> float:
    number = as_number(name, value)
    if not lowest <= number <= highest:
        raise ValueError(
            f"cannot clip with {name}={number}: it says where among past norms the limit lies, and "
            f"outside {lowest:g}..{highest:g} there is no such point. Pass a number from "
            f"{lowest:g} to {highest:g}."
        )
    return number
