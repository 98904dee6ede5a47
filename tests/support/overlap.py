"""`overlap=True` for gradients of any size: those of tests are too short to be measured early."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import pytest

from distclip.training import backward
from distclip.training.backward import Sizes

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def sizes(large: int = 0, together: int = 0) -> Iterator[None]:
    """For clippers that are made inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "sizes_on", lambda _: Sizes(large, together))
        yield


def of_any_size(function: Callable[P, T]) -> Callable[P, T]:
    """`function` inside `sizes()`, on ranks too."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        with sizes():
            return function(*args, **kwargs)

    return wrapper
