"""Small trainings as jobs on the cluster, and what they have left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Job
from tests.slurm.machines import wait_until
from tests.support.rows import Row, rows_of, without_seconds

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "slurm"
# More steps than any test waits for. AutoClip has state: every norm so far.
TINY = (
    *("--width", "32", "--depth", "1", "--context", "32", "--batch", "8", "--warmup", "2"),
    *("--device", "cpu"),
    *("--policy", "autoclip", "--steps", "100000", "--save-every", "50", "--timeout", "15"),
)
ENVIRONMENT = {
    "DISTCLIP": str(ROOT),
    "PYTHON": sys.executable,
    "OMP_NUM_THREADS": "1",
}
START_S = 90.0  # for ranks to import torch and to meet: usually a tenth of it


class Jobs:
    def __init__(self, cluster: Cluster, text: Path, folder: Path) -> None:
        self.cluster, self.folder, self.out = cluster, folder, folder / "out"
        self.env = {**ENVIRONMENT, "DATA": str(text), "OUT": str(self.out)}

    def submit(self, script: str, *options: str, args: tuple[str, ...] = TINY, **env: str) -> str:
        """Submits one of the project's scripts; `options` are sbatch's."""
        name = "%A_%a" if script.startswith("sweep") else "%j"
        log = f"--output={self.folder}/{name}.log"
        words = ("--chdir=/", log, *options, SLURM / script, *args)
        return self.cluster.submit(*words, env={**self.env, **env})

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def logs(self) -> str:
        paths = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in paths)

    def wait_for_step(self, step: int, seconds: float = START_S, out: Path | None = None) -> None:
        """Until the run has done so many steps."""
        folder = out or self.out
        wait_until(lambda: len(rows(folder)) >= step, seconds, f"{step} steps in {folder}")

    def cancel(self, job: str) -> Job:
        self.cluster.run("scancel", job)
        return self.cluster.wait(job, 30, ("CANCELLED",))

    def checkpoints(self) -> list[int]:
        return [int(path.name[5:]) for path in sorted((self.out / "checkpoints").glob("step-*"))]

    def stopped_at(self, job: str) -> list[int]:
        """The steps at which rank 0 said that the ranks had stopped."""
        lines = self.log(job).splitlines()
        stops = [line for line in lines if line.startswith("asked to stop")]
        return [int(line.split("step ")[1].split()[0]) for line in stops]


def rows(out: Path) -> list[Row]:
    """The rows of a run that hold, without how long each step took."""
    return without_seconds(rows_of(out))


def processes(out: Path, *, ranks: bool) -> list[int]:
    """Processes of the run that writes to `out`, on any machine: ranks, or launchers and shells."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
            is_rank = b"\0RANK=" in b"\0" + (path.parent / "environ").read_bytes()
        except OSError:
            continue  # ended while we looked
        if str(out).encode() in words and is_rank == ranks:
            found.append(int(path.parent.name))
    return sorted(found)


class Undisturbed:
    """The same training on this machine, without SLURM: as many of its first steps as needed."""

    def __init__(self, text: Path, folders: pytest.TempPathFactory, num_ranks: int = 2) -> None:
        self.text, self.folders, self.num_ranks = text, folders, num_ranks
        self.rows: list[Row] = []

    def assert_same(self, out: Path, at_least: int) -> None:
        """Checks that the run in `out` made `at_least` steps, and has the same bits as this one."""
        found = rows(out)
        assert [row["step"] for row in found] == list(range(1, len(found) + 1))
        assert len(found) >= at_least
        if len(self.rows) < at_least:
            self._run(at_least + 100)
        common = min(len(found), len(self.rows))
        assert found[:common] == self.rows[:common]

    def _run(self, num_steps: int) -> None:
        out = self.folders.mktemp("undisturbed")
        launcher = ["-m", "launch.run", "--standalone", f"--nproc-per-node={self.num_ranks}"]
        options = ["--data", str(self.text), "--out", str(out), *TINY]
        words = [sys.executable, *launcher, "-m", "launch.train", *options]
        env = {**os.environ, **ENVIRONMENT}
        with subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.DEVNULL) as parent:
            try:
                limit = START_S + num_steps / 10
                wait_until(lambda: len(rows(out)) >= num_steps, limit, f"{num_steps} steps")
            finally:
                parent.terminate()  # passed on: the ranks stop by themselves
        assert parent.returncode == 75
        self.rows = rows(out)
