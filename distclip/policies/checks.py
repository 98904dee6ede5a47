"""The ranges of the numbers that policies take."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import Tensor


def check_norm_type(norm_type: float) -> None:
    """Raises ValueError unless `norm_type` is above 0, infinity included."""
    _check_number("norm_type", norm_type)
    if not norm_type > 0:
        raise ValueError(
            f"cannot measure with norm_type={norm_type}: only p > 0 and inf give a norm that is 0 "
            f"for zero gradients alone and can be summed over shards (p = 0 counts entries, "
            f"p < 0 is 0 as soon as one entry is, NaN compares with nothing). Pass a number above "
            f"0, such as 2.0, or math.inf."
        )


def check_not_negative(name: str, value: float) -> None:
    """Raises ValueError unless `value` is 0 or above; NaN is refused."""
    _check_number(name, value)
    if not value >= 0:
        raise ValueError(
            f"cannot clip with {name}={value}: a norm is never negative. A negative limit would "
            f"turn the gradients around, and NaN would make them all NaN. Pass 0 or above; "
            f"math.inf measures only."
        )


def check_finite(name: str, value: float) -> None:
    """Raises ValueError unless `value` is 0 or above, and finite."""
    _check_number(name, value)
    if not 0 <= value < float("inf"):
        raise ValueError(
            f"cannot clip with {name}={value}: norms are multiplied by it. A negative factor would "
            f"turn the gradients around, and NaN or infinity times 0 would make them NaN. Pass a "
            f"finite number, 0 or above."
        )


def check_between(name: str, value: float, lowest: float, highest: float) -> None:
    """Raises ValueError unless `lowest <= value <= highest`; NaN is refused."""
    _check_number(name, value)
    if not lowest <= value <= highest:
        raise ValueError(
            f"cannot clip with {name}={value}: it says where among past norms the limit lies, and "
            f"outside {lowest:g}..{highest:g} there is no such point. Pass a number from "
            f"{lowest:g} to {highest:g}."
        )


def check_count(name: str, value: int) -> None:
    """Raises ValueError unless `value` is a whole number, 1 or above."""
    if not (isinstance(value, int) and value >= 1):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"cannot clip with {name}={value}: it counts the norms that the first limit is made "
            f"from, and none or a part of one says nothing about the next. Pass a whole number, "
            f"1 or above."
        )


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, Real | Tensor):
        raise TypeError(
            f"cannot clip with {name}={value!r}: it is a {type(value).__name__}, which cannot be "
            f"compared with a norm. Pass a number, such as 1.0."
        )
