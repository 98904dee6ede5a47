"""Which test runs which line on a rank, for coverage.py, where tests/mutations asks for it."""

from __future__ import annotations

import os
from typing import Any

SETTINGS = "DISTCLIP_COVERAGE"  # names a file of coverage.py's settings
ON_RANKS = "on ranks: "  # before the name of the test


def function_of(nodeid: str) -> str:
    """A test with all its parameters; `nodeid` may end in "(call)"."""
    return nodeid.partition("[")[0].partition(" ")[0]


class Measured:
    """Does nothing unless it is asked."""

    def __init__(self) -> None:
        self._coverage: Any = None
        if settings := os.environ.get(SETTINGS):
            from coverage import Coverage

            self._coverage = Coverage(config_file=settings, data_suffix=True)
            self._coverage.start()

    def begin(self, test: str) -> None:
        if self._coverage is not None:
            self._coverage.switch_context(ON_RANKS + function_of(test))

    def end(self) -> None:
        """Ranks are killed: what was noted is written after each call."""
        if self._coverage is not None:
            self._coverage.save()
