"""Mutants, one after another, in a copy of the repository, until a test fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.mutations.mutants import Mutant

PASSED, FAILED, NONE_FOUND = 0, 1, 5  # pytest's exit codes
NOT_COLLECTED = {2, 4}  # where the module of a test cannot be imported, the test is unknown


class Outcome(NamedTuple):
    """What became of a mutant.

    Attributes:
        killed_by: which tests failed: "one process", or "ranks"; "time" where they did not end;
            None where all passed.
        difference: the lines as they were and as they became.
    """

    mutant: Mutant
    killed_by: str | None
    seconds: float
    difference: str


class Stage(NamedTuple):
    name: str
    options: Sequence[str]  # of pytest
    tests: Sequence[str]


class Tree:
    """A copy of what git knows of the repository, in which a process runs tests."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.root = folder
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
        for name in listed.stdout.splitlines():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, folder / name)
        self._time = int(time.time())
        with (folder / "server.log").open("w") as log:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.mutations.server"],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(folder)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def run(self, tests: Sequence[str], seconds: float) -> int | None:
        """pytest's exit code, or None after the time limit."""
        process = self._server
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps({"tests": [*tests], "seconds": seconds}), file=process.stdin, flush=True)
        code: int | None = json.loads(process.stdout.readline())["code"]
        return code

    @contextmanager
    def changed(self, path: str, code: str) -> Iterator[None]:
        file = self.root / path
        before = file.read_text()
        self._write(file, code)
        try:
            yield
        finally:
            self._write(file, before)

    def _write(self, file: Path, code: str) -> None:
        """Python compiles a file again only where its size or its time, in seconds, has changed."""
        file.write_text(code)
        self._time += 1
        os.utime(file, (self._time, self._time))

    def stop(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def outcome(tree: Tree, mutant: Mutant, stages: Sequence[Stage], seconds: float) -> Outcome:
    """Runs the stages in their order until a test fails."""
    start, source = time.monotonic(), (tree.root / mutant.path).read_text()
    killed_by = None
    with tree.changed(mutant.path, mutant.code(source)):
        for name, options, tests in stages:
            code = tree.run([*options, *tests], seconds) if tests else PASSED
            if code in {FAILED, None, *NOT_COLLECTED}:
                killed_by = "time" if code is None else name
                break
            if code not in (PASSED, NONE_FOUND):
                raise RuntimeError(f"pytest has ended with {code}: {tree.root / 'server.log'}")
    return Outcome(mutant, killed_by, round(time.monotonic() - start, 1), mutant.difference(source))
