"""What rank 0 shows and leaves: metrics.jsonl, a progress bar, a closing table, pictures."""

import contextlib
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from launch.files import describe
from launch.ranks import UserError

if TYPE_CHECKING:  # matplotlib takes half a second, which only the rank that draws waits for
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
COLUMNS = {"step", "clipped", "finite", "lr", "seconds", "tokens"}
NOT_ALWAYS_FINITE = {"loss", "total_norm", "limit", "coefficient"}
NUM_PLAIN_LINES = 10
NUM_LAST = 10
BLUE, ORANGE, GREY, RED = "#2864a8", "#e07b1a", "#8a8f98", "#c0282d"
RUN_COLORS = (RED, BLUE, "#3b8f57", ORANGE, "#7a4fa3", "#20898f")


class Log:
    """Writes every step as one line of JSON, and shows it.

    A terminal gets a bar; a log file gets about ten lines a run, because nobody reads thousands.

    Args:
        done: the step that the run goes on after. Later lines of the file are removed: a killed run
            has written more of them than its checkpoint covers. So are lines that cannot be read.

    Attributes:
        failure: why a row could not be written; the run ends with it when all ranks know.
    """

    failure: str | None = None

    def __init__(self, path: Path, console: Console, done: int, steps: int) -> None:
        self.console, self.steps, self.path = console, steps, path
        self.rows = [row for row in read(path) if row["step"] <= done] if path.exists() else []
        self.num_clipped = _count(self.rows, "clipped")
        shorter = path.with_suffix(".tmp")
        shorter.write_text("".join(map(_line, self.rows)))
        shorter.rename(path)
        self.file = path.open("a")
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
        with contextlib.suppress(OSError):  # what `add` could not write; `failure` says so
            self.file.close()

    def add(self, row: Row) -> None:
        """Hands the line to the system at once: `kill -9` loses the step that is going on."""
        self.rows.append(row)
        self.num_clipped += bool(row["clipped"])
        try:
            self._write(row)
        except OSError as error:  # the other ranks wait in the next step: they learn it there
            self.failure = f"{self.path} cannot be written: {describe(error)}"

    def check(self) -> None:
        """Raises UserError where a row could not be written."""
        if self.failure:
            raise UserError(self.failure)

    def _write(self, row: Row) -> None:
        self.file.write(_line(row))
        self.file.flush()
        if not os.fstat(self.file.fileno()).st_nlink:
            self.failure = (
                f"{self.path} now belongs to a later start of this run, or was removed: this one "
                "ends and writes no more"
            )
        step = row["step"]
        names = {"loss": "loss", "norm": "total_norm", "limit": "limit"}
        numbers = "  ".join(f"{name} {number(row[key])}" for name, key in names.items())
        now = f"{numbers}  clipped {self.num_clipped} of {step}"
        self.bar.update(self.task, completed=step, now=now)
        if not self.console.is_terminal and (step % self.every == 0 or step == self.steps):
            show(self.console, f"step {step} of {self.steps}  {now}")


def show(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def read(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, without lines that are damaged, as by a kill or a full disk."""
    lines = path.read_text(errors="replace").split("\n")
    return [row for line in lines if (row := _row(line)) is not None]


def _row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    nulls = {name for name, value in row.items() if value is None}
    numbers = {name for name, value in row.items() if isinstance(value, float | int)}
    return row if numbers >= COLUMNS and nulls | numbers >= NOT_ALWAYS_FINITE else None


def _line(row: Row) -> str:
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no inf, and many readers refuse Python's spelling of them."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None) -> str:
    """Four digits; `None` is a number that JSON could not hold."""
    return "not finite" if value is None or math.isnan(value) else f"{value:.4g}"


def last_loss(rows: Sequence[Row]) -> float:
    """Mean of the last ten losses; NaN where one of them is not finite."""
    losses = [row["loss"] for row in rows[-NUM_LAST:]]
    return math.nan if None in losses else statistics.fmean(losses)


def norms(rows: Sequence[Row]) -> list[float]:
    """The finite total norms."""
    return [norm for norm in _column(rows, "total_norm") if math.isfinite(norm)]


def _count(rows: Sequence[Row], name: str) -> int:
    return sum(bool(row[name]) for row in rows)


def _column(rows: Sequence[Row], name: str) -> list[float]:
    """The values of a column; NaN, a gap in the line, where there is no finite number."""
    values = (row[name] for row in rows)
    return [value if value is not None and math.isfinite(value) else math.nan for value in values]


def summary(rows: Sequence[Row], title: str) -> Table:
    """The closing table of one run."""
    seconds, tokens = sum(row["seconds"] for row in rows), sum(row["tokens"] for row in rows)
    finite, first, last = norms(rows) or [math.nan], rows[0]["loss"], last_loss(rows)
    lines = {
        "steps": f"{len(rows)} in {seconds:.1f} s, {tokens / seconds:,.0f} tokens a second",
        "loss": f"{number(first)} at first, {number(last)} over the last {len(rows[-NUM_LAST:])}",
        "total norm": f"median {number(statistics.median(finite))}, largest {number(max(finite))}",
        "clipped": f"{_count(rows, 'clipped')} of {len(rows)} steps",
        "not finite": f"{len(rows) - _count(rows, 'finite')} of {len(rows)} steps",
    }
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in lines.items():
        table.add_row(name, value)
    return table


def draw_run(rows: Sequence[Row], title: str, path: Path) -> None:
    """One run: loss, total norm with its limit, and coefficient, over the steps."""
    figure, axes = _figure(title, [3, 3, 2])
    _loss_panel(axes[0], rows)
    _norm_panel(axes[1], rows)
    _coefficient_panel(axes[2], rows)
    _save(figure, axes, path)


def draw_runs(runs: Mapping[str, Sequence[Row]], title: str, path: Path) -> None:
    """Several runs in one picture: their losses, and their total norms before clipping."""
    figure, (upper, lower) = _figure(title, [3.5, 3.5])
    ends = _extremes({name: last_loss(rows) for name, rows in runs.items()})
    largest = _extremes({name: max(norms(rows), default=math.nan) for name, rows in runs.items()})
    _dress(upper, f"Loss at the end: {ends}", "loss [nats per byte] (log scale)")
    _dress(lower, f"Largest norm: {largest}", "total norm before clipping (log scale)")
    for (name, rows), color in zip(runs.items(), RUN_COLORS * len(runs), strict=False):
        steps = [row["step"] for row in rows]
        upper.plot(steps, _column(rows, "loss"), color=color, linewidth=1.5, label=name)
        lower.plot(steps, _column(rows, "total_norm"), color=color, linewidth=1.0, label=name)
        _mark_not_finite(upper, rows)
    for axes in (upper, lower):
        _log_scale(axes)
    upper.legend(loc="upper right", framealpha=0.95)
    _save(figure, [upper, lower], path)


def _loss_panel(axes: "Axes", rows: Sequence[Row]) -> None:
    first, last, verb = rows[0]["loss"], last_loss(rows), "ended as"
    if math.isfinite(last) and first is not None:
        verb = "fell to" if last < first else "rose to"
    _dress(axes, f"The loss {verb} {number(last)} from {number(first)}", "loss [nats per byte]")
    axes.plot([row["step"] for row in rows], _column(rows, "loss"), color=BLUE, linewidth=1.4)


def _norm_panel(axes: "Axes", rows: Sequence[Row]) -> None:
    num_lost = len(rows) - _count(rows, "finite")
    lost = f"; not finite in {num_lost}" if num_lost else ""
    title = f"The gradient was clipped in {_count(rows, 'clipped')} of {len(rows)} steps{lost}"
    _dress(axes, title, "total norm (log scale)")
    steps, seen = [row["step"] for row in rows], _column(rows, "total_norm")
    clipped = [norm if row["clipped"] else math.nan for row, norm in zip(rows, seen, strict=True)]
    axes.plot(steps, seen, color=GREY, linewidth=1.0, label="total norm")
    axes.plot(steps, clipped, "o", color=ORANGE, markersize=3.5, label="clipped")
    axes.plot(steps, _column(rows, "limit"), "--", color=RED, linewidth=1.6, label="limit")
    _mark_not_finite(axes, rows)
    if norms(rows):
        _log_scale(axes)
    axes.legend(loc="upper right", ncols=4, framealpha=0.95)


def _coefficient_panel(axes: "Axes", rows: Sequence[Row]) -> None:
    steps, values = [row["step"] for row in rows], _column(rows, "coefficient")
    least = min((value for value in values if math.isfinite(value)), default=math.nan)
    title = f"The strongest clip left {least:.0%} of the gradient"
    _dress(axes, title if least < 1 else "Clipping changed no gradient", "coefficient")
    axes.fill_between(steps, values, 1.0, color=ORANGE, alpha=0.35, linewidth=0)
    axes.plot(steps, values, color=ORANGE, linewidth=1.2)
    axes.set_ylim(0, 1.08)


def _extremes(values: Mapping[str, float]) -> str:
    """The lowest and the highest value with their names; NaN is worse than any number."""
    order = sorted(values, key=lambda name: (math.isnan(values[name]), values[name]))
    ends = dict.fromkeys((order[0], order[-1]))
    return ", ".join(f"{number(values[name])} {name}" for name in ends)


def _figure(title: str, heights: Sequence[float]) -> "tuple[Figure, Sequence[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1 + sum(heights)), layout="constrained")
    figure.suptitle(title, fontsize=11, color="#444444")
    return figure, figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)


def _dress(axes: "Axes", title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold")
    axes.set_ylabel(label)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def _log_scale(axes: "Axes") -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.18)  # room for the legend


def _mark_not_finite(axes: "Axes", rows: Sequence[Row]) -> None:
    steps = [row["step"] for row in rows if not row["finite"]]
    if steps:
        foot, label = axes.get_xaxis_transform(), "not finite"
        axes.plot(steps, [0.02] * len(steps), "x", color=RED, transform=foot, label=label)


def _save(figure: "Figure", axes: Sequence["Axes"], path: Path) -> None:
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.align_ylabels(axes)
    # Renamed when it is whole: a kill leaves no half picture.
    temporary = path.with_name(f"{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=130)
    temporary.rename(path)
