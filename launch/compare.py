"""Trains the same model from the same seed under several policies, and shows them in one picture.

    python launch/compare.py --out runs/compare
    python launch/compare.py --policies none "clip-norm --policy.max-norm 0.25" "clip-norm --policy.max-norm 1.0"

The setting is an LSTM under plain SGD with the limit of 0.25 and about the learning rate (30 there, 20 here) of
Merity, Keskar, Socher, "Regularizing and optimizing LSTM language models", 2017 (arXiv:1708.02182). Over the seeds
0, 1 and 2 the last losses were 9.6, 4.1 and 7.2 not clipped (at their highest 448, 110 and 204) and 1.66, 1.68 and
1.62 clipped.
"""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import plots
import tyro
from metrics import Row, last_loss, norms, number, read
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """One setting under several policies; every other option is that of train.py."""

    policies: tuple[str, ...] = ("none", "clip-norm --policy.max-norm 0.25")
    """What follows --policy in each run, quoted where it has options of its own."""
    setting: str = "--model lstm --width 128 --depth 2 --context 64 --batch 16 --optimizer sgd --warmup 5"
    """Options of train.py that all runs share."""
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
    console = Console()
    began, runs = time.perf_counter(), {}
    for policy in options.policies:
        console.print(f"--policy {policy}", style="bold", highlight=False)
        runs[label(policy)] = rows_of(options, policy) if options.draw_only else train(options, policy)
    title = f"The same LSTM, seed and batches at learning rate {options.lr:g}; only the clipping differs"
    if options.draw_only:
        title = f"{options.out}: only the clipping differs"
    picture = options.out / "compare.png"
    plots.compare(runs, title, picture)
    console.print(table(runs, title))
    console.print(f"  {picture}, after {time.perf_counter() - began:.0f} s", highlight=False, soft_wrap=True)


def label(policy: str) -> str:
    """What the picture calls a run: "clip-norm --policy.max-norm 0.25" becomes "clip-norm (max-norm 0.25)"."""
    name, *settings = policy.split(" --policy.")
    return "not clipped" if policy == "none" else f"{name} ({', '.join(settings)})" if settings else name


def train(options: Options, policy: str) -> list[Row]:
    """The rows of one run of train.py; ends this program with the run's exit code where it fails."""
    command = [sys.executable, HERE / "run.py", "--standalone", f"--nproc-per-node={options.ranks}", HERE / "train.py"]
    shared = f"--lr {options.lr} --steps {options.steps} --seed {options.seed} --save-every 0"
    words = [
        *command,
        *options.setting.split(),
        *shared.split(),
        "--out",
        folder(options, policy),
        "--policy",
        *policy.split(),
    ]
    try:
        done = subprocess.run([str(word) for word in words], check=False, timeout=options.time_limit)
    except subprocess.TimeoutExpired:
        sys.exit(f"compare.py: error: --policy {policy} took more than {options.time_limit:g} s (--time-limit)")
    if done.returncode:
        sys.exit(done.returncode)
    return rows_of(options, policy)


def rows_of(options: Options, policy: str) -> list[Row]:
    path = folder(options, policy) / "metrics.jsonl"
    try:
        return read(path)
    except OSError as error:
        sys.exit(f"compare.py: error: {path} cannot be read: {error.strerror}")


def folder(options: Options, policy: str) -> Path:
    """Where the run of a policy is; slurm/sweep.sbatch names its folders so too."""
    return options.out / policy.replace(" --policy.", "_").replace(" ", "_")


def table(runs: dict[str, list[Row]], title: str) -> Table:
    found = Table("policy", "first loss", "highest loss", "last loss", "largest norm", "clipped", title=title)
    for name, rows in runs.items():
        highest = max((row["loss"] for row in rows if row["loss"] is not None), default=None)
        clipped = f"{sum(bool(row['clipped']) for row in rows)} of {len(rows)}"
        largest = number(max(norms(rows), default=None))
        found.add_row(name, number(rows[0]["loss"]), number(highest), number(last_loss(rows)), largest, clipped)
    return found


if __name__ == "__main__":
    main()
