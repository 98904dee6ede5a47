"""Trains the same model from the same seed under several policies, and draws them in one picture.

    python -m launch.compare --out runs/compare
    python -m launch.compare --policies none "clip-norm --policy.max-norm 0.25" zclip

The setting is an LSTM under plain SGD, with the limit of 0.25 and about the learning rate (30
there, 20 here) of Merity, Keskar, Socher, "Regularizing and optimizing LSTM language models", 2017
(arXiv:1708.02182). Over the seeds 0, 1 and 2 the last losses were 9.6, 4.1 and 7.2 not clipped (at
their highest 448, 110 and 204) and 1.66, 1.68 and 1.62 clipped.
"""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import tyro
from rich.console import Console
from rich.table import Table

from distclip.monitoring.findings.loss import last_loss
from distclip.monitoring.picture import draw
from distclip.monitoring.records import HistoryError, Run, read_run
from launch.report import column, finite, number, show

LAUNCHER = (sys.executable, "-m", "launch.run", "--standalone")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """One setting under several policies; every other option is that of launch.train."""

    policies: tuple[str, ...] = ("none", "clip-norm --policy.max-norm 0.25")
    """What follows --policy in each run, quoted where it has options of its own."""
    setting: str = (
        "--model lstm --width 128 --depth 2 --context 64 --batch 16 --optimizer sgd --warmup 5"
    )
    """Options of launch.train that all runs share."""
    lr: float = 20.0
    """Peak learning rate."""
    steps: int = 400
    """Steps of each run."""
    seed: int = 0
    """Seed of each run: all start from the same weights and see the same batches."""
    ranks: int = 2
    """Ranks of each run."""
    out: Path = Path("runs/compare")
    """Folder for compare.png and a folder for each run."""
    time_limit: float = 300.0
    """Seconds after which a run is given up."""
    draw_only: bool = False
    """Train nothing: show what runs of these policies have left in their folders in --out."""


def main() -> None:
    options = tyro.cli(Options, prog="compare.py", description=__doc__)
    console, began, runs = Console(), time.perf_counter(), list[Run]()
    for policy in options.policies:
        console.print(f"--policy {policy}", style="bold", highlight=False)
        if not options.draw_only:
            train(options, policy)
        runs.append(read(options, policy))
    title = f"The same model, seed and batches at learning rate {options.lr:g}"
    title = f"{options.out if options.draw_only else title}; only the clipping differs"
    picture = options.out / "compare.png"
    draw(runs, picture, title)
    console.print(table(runs, title))
    show(console, f"  {picture}, after {time.perf_counter() - began:.0f} s")


def label(policy: str) -> str:
    """How the picture names a run: "clip-norm (max-norm 0.25)"."""
    name, *settings = policy.split(" --")
    if policy == "none":
        return "not clipped"
    settings = [setting.removeprefix("policy.") for setting in settings]
    return f"{name} ({', '.join(settings)})" if settings else name


def train(options: Options, policy: str) -> None:
    """One run of launch.train; ends this program with the run's exit code where it fails."""
    shared = f"--lr {options.lr} --steps {options.steps} --seed {options.seed} --save-every 0"
    words = [f"--nproc-per-node={options.ranks}", "-m", "launch.train"]
    words += [*options.setting.split(), *shared.split(), "--out", str(folder(options, policy))]
    words += ["--policy", *policy.split()]
    limit = options.time_limit
    try:
        done = subprocess.run([*LAUNCHER, *words], check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        fail(f"--policy {policy} took more than {limit:g} s (--time-limit)")
    if done.returncode:
        sys.exit(done.returncode)


def read(options: Options, policy: str) -> Run:
    try:
        run = read_run(folder(options, policy))
    except HistoryError as error:
        fail(str(error))
    return dataclasses.replace(run, name=label(policy))


def folder(options: Options, policy: str) -> Path:
    """Where the run of a policy is; slurm/sweep.sbatch names its folders in the same way."""
    return options.out / policy.replace(" --policy.", "_").replace(" ", "_")


def fail(line: str) -> NoReturn:
    sys.exit(f"compare.py: error: {line}")


def table(runs: Sequence[Run], title: str) -> Table:
    columns = ("policy", "first loss", "highest loss", "last loss", "largest norm", "clipped")
    made = Table(*columns, title=title)
    for run in runs:
        losses = column(run, "loss")
        numbers = (losses[0], finite(losses).max(), last_loss(losses))
        largest = number(finite(column(run, "total_norm")).max())
        clipped = f"{run.clipped.sum()} of {len(run.steps)}"
        made.add_row(run.name, *map(number, numbers), largest, clipped)
    return made


if __name__ == "__main__":
    main()
