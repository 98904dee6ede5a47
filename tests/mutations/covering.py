"""Which tests run a line: coverage.py notes the test function beside each line that it sees."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from coverage import CoverageData

SETTINGS = """
[run]
source = distclip
dynamic_context = test_function
data_file = {file}
"""


def measure(root: Path, file: Path, tests: Sequence[str]) -> None:
    """Runs the tests, which must pass, and leaves in `file` what they ran in this process."""
    settings = file.with_suffix(".ini")
    settings.write_text(SETTINGS.format(file=file))
    command = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run(
        [*command, "-q", "-p", "no:cacheprovider", *tests], cwd=root, env=environment, check=True
    )


class Covering:
    """What `measure` has left of these tests."""

    def __init__(self, root: Path, file: Path, tests: Sequence[str]) -> None:
        self._root = root
        self._data = CoverageData(str(file))
        self._data.read()
        self._num_lines: Counter[str] = Counter()  # which each test runs in all files
        for path in self._data.measured_files():
            for names in self._data.contexts_by_lineno(path).values():
                self._num_lines.update(map(_node, names))
        self._drawn = self._files_with_drawn_tests(tests)

    def tests(self, path: str, line: int) -> list[str]:
        """The tests that run a line; first those that run few others.

        A line that runs when the module is imported, such as a default or a decorator, has all
        tests of its file.
        """
        of_lines = self._data.contexts_by_lineno(str(self._root / path))
        here = {*of_lines.get(line, ())} - {""}
        if not here:
            here = {each for names in of_lines.values() for each in names} - {""}
        nodes = {_node(each) for each in here if each.startswith("tests.")}
        if any(each.startswith("hypothesis.") for each in here):
            nodes |= self._drawn
        return sorted(nodes, key=lambda node: (self._num_lines[node], node))

    def _files_with_drawn_tests(self, tests: Sequence[str]) -> set[str]:
        """Those of hypothesis, which calls them by a function of its own that coverage.py notes."""
        found = [self._root / each for each in tests]
        files = [file for each in found for file in ([each] if each.is_file() else each.iterdir())]
        drawn = [f for f in files if f.is_file() and "from hypothesis" in f.read_text()]
        return {str(file.relative_to(self._root)) for file in drawn}


def _node(context: str) -> str:
    """`tests.norms.test_units.test_x` as pytest wants it."""
    module, _, function = context.rpartition(".")
    return f"{module.replace('.', '/')}.py::{function}"
