"""What a command shows while it runs, and the errors that a user can cause."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """One line for what a user can set right."""


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows on stderr how many of `total` are done; each call of what it gives is one more."""
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done * 10 // total > (done - 1) * 10 // total:
            print(f"{what}: {done} of {total}", file=sys.stderr)

    yield advance
