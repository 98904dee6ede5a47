"""Hooks whose owner is gone, kept until nobody can be going through them.

The garbage collector runs between any two instructions of Python, also while FSDP2 goes through the
hooks of a parameter in backward. A hook that is removed there ends the loop with "OrderedDict
mutated during iteration", on one rank, and the others wait for it. So hooks that outlive their
owner do nothing, and are removed when others are registered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol


class Handle(Protocol):
    def remove(self) -> None: ...


_dead: deque[Handle] = deque()


def remove_later(handles: Iterable[Handle]) -> None:
    """What a finalizer calls in the place of `.remove()`."""
    _dead.extend(handles)


def remove_dead() -> None:
    """Removes them. Call it where hooks are registered."""
    while _dead:
        _dead.popleft().remove()
