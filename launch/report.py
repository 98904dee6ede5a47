"""What rank 0 writes down and shows: metrics.jsonl, the progress bar, the closing table."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Row = dict[str, Any]
NUM_PLAIN_LINES = 10
NUM_LAST = 10


class Metrics:
    """Every step as one line of JSON, and in `rows`."""

    def __init__(self, path: Path, keep_through: int):
        """Keeps the lines up to step `keep_through`: a killed run wrote more of them than its checkpoint knows."""
        self.rows = [row for row in read(path) if row["step"] <= keep_through] if path.exists() else []
        shorter = path.with_suffix(".tmp")
        shorter.write_text("".join(map(_line, self.rows)))
        shorter.rename(path)
        self.file = path.open("a")

    def append(self, row: Row) -> None:
        """Adds the line and hands it to the system at once, so that `kill -9` loses at most the step in flight."""
        self.rows.append(row)
        self.file.write(_line(row))
        self.file.flush()

    @property
    def num_clipped(self) -> int:
        return sum(bool(row["clipped"]) for row in self.rows)


def read(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _line(row: Row) -> str:
    # JSON has no NaN and no inf, and many readers refuse Python's spelling of them.
    lost = {key: None for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps(row | lost, allow_nan=False) + "\n"


class Display:
    """A bar on a terminal, else about ten lines a run: a log file has no use for thousands."""

    def __init__(self, console: Console, done: int, steps: int):
        self.console, self.steps = console, steps
        self.every = max(1, (steps - done) // NUM_PLAIN_LINES)
        text = TextColumn("{task.fields[now]}")
        columns = (TextColumn("[bold]step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), text)
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("train", total=steps, completed=done, now="")

    def show(self, row: Row, num_clipped: int) -> None:
        step = row["step"]
        now = (
            f"loss {number(row['loss'])}  norm {number(row['total_norm'])}  limit {number(row['limit'])}  "
            f"clipped {num_clipped} of {step}"
        )
        self.bar.update(self.task, completed=step, now=now)
        if not self.console.is_terminal and (step % self.every == 0 or step == self.steps):
            self.console.print(f"step {step} of {self.steps}  {now}", highlight=False, soft_wrap=True)


def number(value: float | None) -> str:
    """Four digits, or what stands in for a number that JSON could not hold."""
    return "not finite" if value is None or math.isnan(value) else f"{value:.4g}"


def last_loss(rows: list[Row]) -> float:
    """Mean of the last ten losses; NaN where one of them is not finite."""
    losses = [row["loss"] for row in rows[-NUM_LAST:]]
    return math.nan if None in losses else statistics.fmean(losses)


def norms(rows: list[Row]) -> list[float]:
    """The finite total norms."""
    return [row["total_norm"] for row in rows if row["total_norm"] is not None and math.isfinite(row["total_norm"])]


def summary(rows: list[Row], title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    seen, seconds = norms(rows) or [math.nan], sum(row["seconds"] for row in rows)
    tokens = sum(row["tokens"] for row in rows)
    lines = {
        "steps": f"{len(rows)} in {seconds:.1f} s, {tokens / seconds:,.0f} tokens a second",
        "loss": f"{number(rows[0]['loss'])} at first, {number(last_loss(rows))} over the last {len(rows[-NUM_LAST:])}",
        "total norm": f"median {number(statistics.median(seen))}, largest {number(max(seen))}",
        "clipped": f"{sum(bool(row['clipped']) for row in rows)} of {len(rows)} steps",
        "not finite": f"{sum(not row['finite'] for row in rows)} of {len(rows)} steps",
    }
    for name, value in lines.items():
        table.add_row(name, value)
    return table
