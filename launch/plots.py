"""The pictures: report.png of one run, and several runs over each other."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from metrics import Row, last_loss, norms, number

BLUE, ORANGE, GREY, RED = "#2864a8", "#e07b1a", "#8a8f98", "#c0282d"
RUN_COLORS = (RED, BLUE, "#3b8f57", ORANGE, "#7a4fa3", "#20898f")


def report(rows: Sequence[Row], title: str, path: Path) -> None:
    """One run: loss, total norm with its limit, coefficient, over the steps."""
    figure = Figure(figsize=(10, 9), layout="constrained")
    figure.suptitle(title, fontsize=11, color="#444444")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 2])
    _loss_panel(axes[0], rows)
    _norm_panel(axes[1], rows)
    _coefficient_panel(axes[2], rows)
    figure.align_ylabels(axes)
    axes[2].set_xlabel("step")
    axes[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, path)


def _loss_panel(axes: Axes, rows: Sequence[Row]) -> None:
    end, verb = last_loss(list(rows)), "ended as"
    if math.isfinite(end) and rows[0]["loss"] is not None:
        verb = "fell to" if end < rows[0]["loss"] else "rose to"
    _dress(axes, f"The loss {verb} {number(end)} from {number(rows[0]['loss'])}", "loss [nats a byte]")
    axes.plot(_steps(rows), _column(rows, "loss"), color=BLUE, linewidth=1.4)


def _norm_panel(axes: Axes, rows: Sequence[Row]) -> None:
    num_clipped, num_lost = sum(bool(row["clipped"]) for row in rows), sum(not row["finite"] for row in rows)
    lost = f"; not finite in {num_lost}" if num_lost else ""
    _dress(axes, f"The gradient was clipped in {num_clipped} of {len(rows)} steps{lost}", "total norm (log scale)")
    steps, seen, limits = _steps(rows), _column(rows, "total_norm"), _column(rows, "limit")
    axes.plot(steps, seen, color=GREY, linewidth=1.0, label="total norm")
    over = [value if row["clipped"] else math.nan for row, value in zip(rows, seen, strict=True)]
    axes.plot(steps, over, color=ORANGE, linestyle="none", marker="o", markersize=3.5, label="clipped")
    axes.plot(steps, limits, color=RED, linewidth=1.6, linestyle="--", label="limit")
    _mark_lost(axes, rows)
    if norms(list(rows)):
        _log_scale(axes)
    axes.legend(loc="upper right", ncols=4, framealpha=0.95)


def _coefficient_panel(axes: Axes, rows: Sequence[Row]) -> None:
    values = _column(rows, "coefficient")
    least = min((value for value in values if math.isfinite(value)), default=math.nan)
    finding = f"The strongest clip left {least:.0%} of the gradient" if least < 1 else "Clipping changed no gradient"
    _dress(axes, finding, "coefficient")
    axes.fill_between(_steps(rows), values, 1.0, color=ORANGE, alpha=0.35, linewidth=0)
    axes.plot(_steps(rows), values, color=ORANGE, linewidth=1.2)
    axes.set_ylim(0, 1.08)


def compare(runs: dict[str, Sequence[Row]], title: str, path: Path) -> None:
    """Several runs in one picture: their losses, and their total norms before clipping."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    figure.suptitle(title, fontsize=12)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _dress(upper, _loss_finding(runs), "loss [nats a byte] (log scale)")
    _dress(lower, _norm_finding(runs), "total norm before clipping (log scale)")
    for (name, rows), color in zip(runs.items(), RUN_COLORS * len(runs), strict=False):
        upper.plot(_steps(rows), _column(rows, "loss"), color=color, linewidth=1.5, label=name)
        lower.plot(_steps(rows), _column(rows, "total_norm"), color=color, linewidth=1.0, label=name)
        _mark_lost(upper, rows)
    for axes in (upper, lower):
        _log_scale(axes)
    figure.align_ylabels([upper, lower])
    upper.legend(loc="upper right", framealpha=0.95)
    lower.set_xlabel("step")
    _save(figure, path)


def _loss_finding(runs: dict[str, Sequence[Row]]) -> str:
    return "Loss at the end: " + _ends({name: last_loss(list(rows)) for name, rows in runs.items()})


def _norm_finding(runs: dict[str, Sequence[Row]]) -> str:
    return "Largest norm: " + _ends({name: max(norms(list(rows)), default=math.nan) for name, rows in runs.items()})


def _ends(values: dict[str, float]) -> str:
    """The lowest and the highest of the values, whose names all stand in the legend; NaN is worse than any number."""
    order = sorted(values, key=lambda name: math.inf if math.isnan(values[name]) else values[name])
    return ", ".join(f"{number(values[name])} {name}" for name in dict.fromkeys((order[0], order[-1])))


def _log_scale(axes: Axes) -> None:
    """Room for the legend above the data, and plain numbers at the ticks where they stay short."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.18)
    if high / low < 1000:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _mark_lost(axes: Axes, rows: Sequence[Row]) -> None:
    lost = [row["step"] for row in rows if not row["finite"]]
    if lost:
        foot = axes.get_xaxis_transform()
        axes.plot(lost, [0.02] * len(lost), "x", color=RED, markersize=5, transform=foot, label="not finite")


def _dress(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold")
    axes.set_ylabel(label)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def _steps(rows: Sequence[Row]) -> list[int]:
    return [row["step"] for row in rows]


def _column(rows: Sequence[Row], name: str) -> list[float]:
    """The values of a column; NaN, a gap in the line, where there is no finite number."""
    values = (row[name] for row in rows)
    return [value if value is not None and math.isfinite(value) else math.nan for value in values]


def _save(figure: Figure, path: Path) -> None:
    # Renamed into place, so that a kill never leaves half a picture.
    unfinished = path.with_name(f"{path.stem}.tmp.png")
    figure.savefig(unfinished, dpi=130)
    unfinished.rename(path)
