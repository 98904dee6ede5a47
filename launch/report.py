"""What rank 0 shows of a run: its progress, and a closing table."""

import math

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from distclip import Report
from distclip.monitoring.findings.loss import last_loss
from distclip.monitoring.records import Floats, Run

NUM_PLAIN_LINES = 10


class StepProgress:
    """A bar on a terminal; about ten lines in a log file, because nobody reads thousands.

    Args:
        done: the step that the run goes on after.
        steps: its last step.
    """

    def __init__(self, console: Console, done: int, steps: int) -> None:
        self.console, self.done, self.steps, self.num_clipped = console, done, steps, 0
        self.every = max(1, (steps - done) // NUM_PLAIN_LINES)
        text = TextColumn("{task.fields[now]}")
        columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), text)
        self.bar = Progress(
            TextColumn("[bold]step"), *columns, console=console, disable=not console.is_terminal
        )
        self.task = self.bar.add_task("train", total=steps, completed=done, now="")

    def __enter__(self) -> None:
        self.bar.start()

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, step: int, loss: float, report: Report) -> None:
        """Shows the figures of a step. Waits for the device."""
        figures = report.to_dict()
        self.num_clipped += figures["clipped"]
        norm, limit = number(figures["total_norm"]), number(figures["limit"])
        clipped = f"clipped {self.num_clipped} of {step - self.done}"
        now = f"loss {number(loss)}  norm {norm}  limit {limit}  {clipped}"
        self.bar.update(self.task, completed=step, now=now)
        if not self.console.is_terminal and (step % self.every == 0 or step == self.steps):
            show(self.console, f"step {step} of {self.steps}  {now}")


def show(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def number(value: float) -> str:
    """Four digits."""
    return "not finite" if math.isnan(value) else f"{value:.4g}"


def column(run: Run, name: str) -> Floats:
    """What each step appended as `name`; NaN where it appended none."""
    return run.columns.get(name, np.full(len(run.steps), math.nan))


def finite(values: Floats) -> Floats:
    """The finite ones; one NaN where there is none."""
    found = values[np.isfinite(values)]
    return found if found.size else np.array([math.nan])


def summary(run: Run, title: str) -> Table:
    """The closing table of one run."""
    num_steps, norms = len(run.steps), finite(column(run, "total_norm"))
    seconds, tokens = float(column(run, "seconds").sum()), float(column(run, "tokens").sum())
    first, last = number(column(run, "loss")[0]), number(last_loss(column(run, "loss")))
    lines = {
        "steps": f"{num_steps} in {seconds:.1f} s, {tokens / seconds:,.0f} tokens a second",
        "loss": f"{first} at first, {last} over the last {min(num_steps, 10)}",
        "total norm": f"median {number(np.median(norms))}, largest {number(norms.max())}",
        "clipped": f"{run.clipped.sum()} of {num_steps} steps",
        "not finite": f"{(~run.finite).sum()} of {num_steps} steps",
    }
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in lines.items():
        table.add_row(name, value)
    return table
