"""The table of docs/versions.md: a row for each version of torch and Python that was run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from tests.versions.venvs import Version

HEAD = (
    "| torch | Python | tests | passed | failed | skipped | run on |\n"
    "|---|---|---|---|---|---|---|\n"
)
ROW = re.compile(r"\| (\S+) \| (\S+) \| .* \|")


class Row(NamedTuple):
    version: Version
    tests: str  # "core", or "part" of it
    passed: int
    failed: int
    skipped: int
    date: str  # 2026-11-26

    def __str__(self) -> str:
        cells = (*self.version, self.tests, self.passed, self.failed, self.skipped, self.date)
        return f"| {' | '.join(map(str, cells))} |"


def read_counts(report: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped, from the XML file that pytest has written."""
    [suite] = ElementTree.parse(report).getroot().iter("testsuite")
    total, failures, errors, skipped = (
        int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")
    )
    return total - failures - errors - skipped, failures + errors, skipped


def write_rows(page: Path, rows: Iterable[Row]) -> None:
    """Puts rows into the table of a page; rows of other versions stay as they are."""
    before, found, after = page.read_text().partition(HEAD)
    assert found, f"{page} has no table"
    lines = after.splitlines()
    old = list(takewhile(bool, map(ROW.match, lines)))  # other tables may follow
    rest = lines[len(old) :]
    texts = {Version(match[1], match[2]): match[0] for match in old if match}
    texts |= {row.version: str(row) for row in rows}
    table = [texts[version] for version in sorted(texts, key=_order)]
    page.write_text(before + HEAD + "\n".join([*table, *rest]) + "\n")


def _order(version: Version) -> tuple[list[int], list[int]]:
    torch, python = ([int(number) for number in part.split(".")] for part in version)
    return torch, python
