"""Small trainings as a user starts them, and what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.rows import rows_of

ROOT = Path(__file__).parents[2]
TRAIN = ("-m", "launch.train")
LAUNCHER = (sys.executable, "-m", "launch.run", "--standalone", "--nproc-per-node=2")
TINY = (
    *("--width", "32", "--depth", "1", "--context", "32", "--batch", "8", "--warmup", "2"),
    *("--device", "cpu"),
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
LIMIT_S = 240  # machines are shared: usually a tenth of it


def write_text(folder: Path) -> Path:
    """Something to train on that every Python has."""
    for module in (json, subprocess):
        source = Path(module.__file__)
        (folder / source.name).write_text(source.read_text())
    return folder


def command(
    text: Path, out: Path, *options: str, launcher: tuple[str, ...] = LAUNCHER
) -> list[str]:
    return [*launcher, *TRAIN, "--data", str(text), "--out", str(out), *TINY, *options]


def popen(words: list[str], *, stderr: int | None = None, **env: str) -> subprocess.Popen[str]:
    """Starts a command in the root of the repository; its output is a pipe."""
    environment = {**ENVIRONMENT, **env}
    return subprocess.Popen(
        words, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=stderr
    )


def run(words: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    with popen(words, stderr=subprocess.PIPE, **env) as parent:
        try:
            out, err = parent.communicate(timeout=LIMIT_S)
        finally:
            kill(parent)
    return subprocess.CompletedProcess(words, parent.returncode, out, err)


def kill(parent: subprocess.Popen[str]) -> None:
    """Ends a run that still goes on, and the ranks that its launcher would leave behind."""
    if parent.poll() is None:
        for pid in [*children_of(parent.pid), parent.pid]:
            os.kill(pid, signal.SIGKILL)


def children_of(parent: int) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        # The name in brackets may hold blanks; the parent is the second field behind it.
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # the process has ended meanwhile
        if int(fields[1]) == parent:
            yield int(path.parent.name)


def wait_for_step(step: int, out: Path, parent: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_S / 2
    while len(rows_of(out)) < step:
        assert time.monotonic() < deadline
        assert parent.poll() is None
        time.sleep(0.02)
