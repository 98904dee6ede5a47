"""A plugin of pytest: coverage.py notes the test beside each line."""

from __future__ import annotations

from coverage import Coverage

from tests.support.measured_ranks import function_of


def pytest_runtest_logstart(nodeid: str) -> None:
    if (measured := Coverage.current()) is not None:
        measured.switch_context(function_of(nodeid))
