"""Baselines take turns: every answer is checked first, then every round times all of them.

The clock is that of `torch.utils.benchmark`, which waits for an accelerator. Its `Timer` warms up
on gradients that are clipped by then, and times one statement after the other; but the speed of
shared machines changes, and only turns are comparable.
"""

from __future__ import annotations

import random
import timeit
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.benchmark import timer

from benchmarks.gradients import Gradients, largest

WARM_UP = 2  # rounds that are not counted
STATES = {"not clipping": 10.0, "clipping": 0.3}  # the limit, as a multiple of the norm
Run = Callable[[], Any]


@dataclass(frozen=True)
class Baseline:
    """One implementation of the work. distclip's own are rows of the same table."""

    name: str
    start: Callable[
        [Gradients, float], Run
    ]  # the limit; what it returns is timed, and has the norm
    tolerance: float | None = 1e-2  # of norm and gradients, relative; None: it only moves bytes
    needs: str = ""  # shown where it cannot run


@dataclass
class Row:
    """One baseline in one case. Without `seconds` it was not timed, and `note` says why."""

    case: str
    state: str
    baseline: str
    seconds: Sequence[float] = ()  # of each round
    norm_error: float | None = None
    grad_error: float | None = None
    note: str = ""


def measure(
    case: str,
    state: str,
    gradients: Gradients,
    baselines: Sequence[Baseline],
    factor: float,
    rounds: int,
) -> list[Row]:
    """One row for each baseline. The times are those of the slowest rank, from a barrier on.

    A baseline that raises or is wrong has no times. All are checked before the rounds, and again
    after them because a call may depend on earlier calls.

    Args:
        factor: the limit, as a multiple of the norm.

    Collective: where there is a process group.
    """
    limit = factor * gradients.norm
    rows = [Row(case, state, baseline.name) for baseline in baselines]
    runs = [started(baseline, gradients, limit) for baseline in baselines]

    def prepare() -> None:
        gradients.prepare(clipping=factor < 1)
        if dist.is_initialized():
            dist.barrier()

    def check_all() -> None:
        for row, baseline, run in zip(rows, baselines, runs, strict=True):
            if not row.note:
                check(row, baseline, run, gradients, limit)

    check_all()
    right = {row.baseline: run for row, run in zip(rows, runs, strict=True) if not row.note}
    timers = {name: timeit.Timer(run, prepare, timer) for name, run in right.items()}
    taken = in_turn(timers, rounds)
    check_all()
    for row in rows:
        if not row.note:
            row.seconds = taken[row.baseline]
    gradients.restore()
    return rows


def started(baseline: Baseline, gradients: Gradients, limit: float) -> Run:
    """The call that is timed; one that raises if the start raised."""
    try:
        return baseline.start(gradients, limit)
    except Exception as error:
        failure = error

    def fail() -> None:
        raise failure

    return fail


def check(row: Row, baseline: Baseline, run: Run, gradients: Gradients, limit: float) -> None:
    """Notes the errors of one call, and why it has no speed if it fails on any rank."""
    gradients.restore()
    failure, errors = "", (0.0, 0.0)
    try:
        norm = run()
        errors = errors if baseline.tolerance is None else gradients.errors(norm, limit)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        failure = f"needs {baseline.needs} ({text})" if baseline.needs else text
    ranks = gather((failure, *errors))
    gradients.restore()
    if failures := [text for text, _, _ in ranks if text]:
        row.note = f"does not run: {failures[0]}"
    elif baseline.tolerance is not None:
        norm, grad = (largest(rank[i] for rank in ranks) for i in (1, 2))
        row.norm_error, row.grad_error = norm, grad
        rounding = max(torch.finfo(dtype).eps for dtype in gradients.dtypes)
        if not (norm <= baseline.tolerance and grad <= baseline.tolerance + rounding):  # or NaN
            row.note = f"WRONG: norm off by {norm:.2g}, a gradient by {grad:.2g}; not timed"


def in_turn(timers: Mapping[str, timeit.Timer], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round by name. In every round all run once, in a new order; ranks share it.

    Python's garbage collector is off while a call is prepared and timed.
    """
    order, generator = list(timers), random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(WARM_UP + rounds):
        generator.shuffle(order)
        for name in order:
            taken[name].append(timers[name].timeit(1))
    ranks = gather(taken)
    by_round = {name: zip(*(rank[name] for rank in ranks), strict=True) for name in timers}
    return {name: [max(each) for each in times][WARM_UP:] for name, times in by_round.items()}


def gather(mine: Any) -> list[Any]:
    """From all ranks; from this process alone without a process group."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


@dataclass(frozen=True)
class Spread:
    """p20, median, p80. Of a ratio: that of the medians, and quantiles of the rounds' ratios."""

    p20: float
    p50: float
    p80: float

    def __str__(self) -> str:
        return f"{self.p50:.3g} ({self.p20:.3g} to {self.p80:.3g})"


def spread(values: Sequence[float]) -> Spread:
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Spread(*torch.tensor(values, dtype=torch.float64).quantile(quantiles).tolist())


def milliseconds(row: Row) -> Spread | None:
    return spread([1e3 * s for s in row.seconds]) if row.seconds else None


def ratio(of: Row, to: Row) -> Spread | None:
    """The time of `of` in multiples of that of `to`; None if one was not timed."""
    if not of.seconds or not to.seconds:
        return None
    rounds = spread([a / b for a, b in zip(of.seconds, to.seconds, strict=True)])
    medians = spread(of.seconds).p50 / spread(to.seconds).p50
    return Spread(rounds.p20, medians, rounds.p80)


def find(rows: Iterable[Row], case: str, state: str, baseline: str) -> Row:
    """The row; one without times where it is missing."""
    names = (case, state, baseline)
    return next((r for r in rows if (r.case, r.state, r.baseline) == names), Row(*names))
