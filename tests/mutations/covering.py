"""Which tests run a line, in their own process and on ranks: coverage.py notes both."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from coverage import CoverageData

from tests.support.measured_ranks import ON_RANKS, SETTINGS

RC = """
[run]
source = distclip
data_file = {file}
"""


def measure(root: Path, file: Path, tests: Sequence[str]) -> None:
    """Runs the tests, which must pass, and leaves in `file` what they ran."""
    settings = file.with_suffix(".ini")
    settings.write_text(RC.format(file=file))
    command = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest"]
    options = ["-q", "-p", "no:cacheprovider", "-p", "tests.mutations.contexts"]
    environment = {**os.environ, "PYTHONPATH": str(root), SETTINGS: str(settings)}
    subprocess.run([*command, *options, *tests], cwd=root, env=environment, check=True)
    data = CoverageData(str(file))
    data.read()
    for each in file.parent.glob(f"{file.name}.*.*"):  # of a rank
        other = CoverageData(str(each))
        other.read()
        data.update(other)
        each.unlink()


class Tests(NamedTuple):
    """Functions, as pytest names them, each with all its parameters."""

    alone: list[str]
    on_ranks: list[str]


class Covering:
    """What `measure` has left."""

    def __init__(self, root: Path, file: Path) -> None:
        self._root = root
        self._data = CoverageData(str(file))
        self._data.read()
        self._num_lines: Counter[str] = Counter()  # which each test runs in all files
        for path in self._data.measured_files():
            for names in self._data.contexts_by_lineno(path).values():
                self._num_lines.update(names)

    def names(self) -> list[str]:
        """All tests that ran a line."""
        return sorted({name.removeprefix(ON_RANKS) for name in self._num_lines} - {""})

    def tests(self, path: str, line: int) -> Tests:
        """The tests that run a line; first those that run little else than this file.

        A line that runs when the module is imported, such as a default or a decorator, has all
        tests of its file.
        """
        of_lines = self._data.contexts_by_lineno(str(self._root / path))
        here = {*of_lines.get(line, ())} - {""}
        if not here:
            here = {each for names in of_lines.values() for each in names} - {""}
        alone = [each for each in here if not each.startswith(ON_RANKS)]
        of_file = Counter(each for names in of_lines.values() for each in names)
        shares = {each: of_file[each] / self._num_lines[each] for each in here}
        return Tests(_in_order(alone, shares), _in_order(here.difference(alone), shares))


def _in_order(names: Iterable[str], shares: Mapping[str, float]) -> list[str]:
    found = sorted(names, key=lambda name: (-shares[name], name))
    return [name.removeprefix(ON_RANKS) for name in found]
