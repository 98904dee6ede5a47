"""What distclip multiplies itself, and what it leaves to optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from distclip import decision


@contextmanager
def counted_writes() -> Iterator[list[int]]:
    """How many lists of gradients each call multiplies."""
    written: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        scale_ = decision.scale_
        patch.setattr(
            decision,
            "scale_",
            lambda values, factor: (written.append(len(values)), scale_(values, factor)),
        )
        yield written
