"""One PNG of one run, or of several: loss, norm, coefficient, and the norms of layers over time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distclip.monitoring.findings import count, number, percent
from distclip.monitoring.findings.loss import find as find_loss
from distclip.monitoring.findings.loss import last_loss, loss_name, nonfinite_losses
from distclip.monitoring.findings.spikes import spikes_of
from distclip.monitoring.picture.curves import MOST, MOST_POINTS, Curve, curve
from distclip.monitoring.picture.heat_map import draw_layers, height_of
from distclip.monitoring.picture.texts import shortened
from distclip.monitoring.records import Floats, Ints, Run
from distclip.monitoring.thinning import shares

BLUE, ORANGE, GREY, RED = "#2864a8", "#e07b1a", "#8a8f98", "#c0282d"
RUN_COLORS = (BLUE, ORANGE, "#3b8f57", RED, "#7a4fa3", "#20898f")
STYLES = [(color, line) for line, color in product(("-", "--", ":"), RUN_COLORS)]
_WIDTH, _DPI = 10, 130  # inches, pixels per inch
_MOST_MARKED = 5  # spikes
_LOG_FROM = 30.0  # a loss that reaches so many times its median has a log scale
_MOST_TITLE = 70  # characters of a title in its usual size
_SHARES, _FEWEST = 80, 10  # points of the clipped share, and rows of each


def draw(runs: Sequence[Run], path: Path, title: str = "") -> None:
    """Writes the picture, in which each run has its color and, with tensor norms, a heat map.

    Args:
        runs: at least one, with names that differ.
        title: above the picture; by default the name of the run, where it is one.

    Raises:
        OSError: the file cannot be written.
    """
    _save(figure_of(runs, title), path)


def figure_of(runs: Sequence[Run], title: str) -> Figure:
    panels: list[tuple[Callable[[Axes, Sequence[Run]], None], float]] = []
    if any(map(loss_name, runs)):
        panels.append((_loss_panel, 2.8))
    panels.append((_norm_panel, 3.2))
    if len(runs) > 1 or len(runs[0].steps) > 2 * MOST_POINTS:
        panels.append((_share_panel, 1.5))
    panels.append((_coefficient_panel, 1.9))
    layered = [run for run in runs if len(run.tensors.rows)]
    heights = [*(height for _, height in panels), *map(height_of, layered)]
    figure = Figure(figsize=(_WIDTH, 0.9 + sum(heights) * 1.1), layout="constrained")
    grid = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)
    axes: list[Axes] = list(grid[:, 0])
    for (panel, _), each in zip(panels, axes, strict=False):
        panel(each, runs)
    for run, each in zip(layered, axes[len(panels) :], strict=True):
        _dress(each, draw_layers(each, run, with_name=len(runs) > 1), "", grid=False)
    if len(runs) > 1:
        _legend_of_runs(figure, axes[0], runs, title)
    else:
        figure.suptitle(shortened(title or runs[0].name, 110), fontsize=11, color="#444444")
    _finish(figure, axes, runs)
    return figure


def _loss_panel(axes: Axes, runs: Sequence[Run]) -> None:
    losses = {run.name: run.columns[name] for run in runs if (name := loss_name(run))}
    last = {name: last_loss(each) for name, each in losses.items()}
    title = _loss_title(runs[0]) if len(runs) == 1 else f"Loss at the end: {_extremes(last)}"
    for run, (color, line) in zip(runs, _styles(runs), strict=True):
        if run.name in losses:
            values = losses[run.name]
            _line(axes, curve(run.steps, values), color, line, 1.4)
            _mark(axes, run.steps[nonfinite_losses(run, values)], color)
    everything = np.concatenate([*losses.values()])
    everything = everything[np.isfinite(everything)]
    is_log = len(everything) > 0 and everything.min() > 0
    is_log = is_log and everything.max() > _LOG_FROM * np.median(everything)
    label = next(name for run in runs if (name := loss_name(run)))
    _dress(axes, title, shortened(label, 20) + (" (log scale)" if is_log else ""))
    if is_log:
        axes.set_yscale("log")


def _loss_title(run: Run) -> str:
    texts = [finding.text.removesuffix(".") for finding in find_loss(run)]
    if not texts:
        return "The loss"
    return texts[0] if len(texts[0]) <= _MOST_TITLE else texts[0].partition(":")[0]


def _norm_panel(axes: Axes, runs: Sequence[Run]) -> None:
    limits = [run.columns["limit"] for run in runs]
    finite = [run.columns["total_norm"][run.finite] for run in runs]
    if len(runs) == 1:
        _one_norm(axes, runs[0])
        title = _norm_title(runs[0])
    else:
        largest = {
            run.name: each.max() for run, each in zip(runs, finite, strict=True) if len(each)
        }
        title = f"Largest norm: {_extremes(largest)}" if largest else "No norm was finite"
        for run, limit, (color, line) in zip(runs, limits, _styles(runs), strict=True):
            _line(axes, curve(run.steps, run.columns["total_norm"]), color, line, 1.0)
            axes.plot(
                *_points(curve(run.steps, limit)), "--", color=color, linewidth=1.0, alpha=0.8
            )
            _mark(axes, run.steps[~run.finite], color)
    _dress(
        axes, title, "total norm (log scale)" if len(runs) == 1 else "total norm (dashed: limit)"
    )
    if any((each > 0).any() for each in finite):
        axes.set_yscale("log")
        _make_room(axes, 0.18 if len(runs) == 1 else 0.03)
    if len(runs) == 1:
        axes.legend(loc="upper right", ncols=5, framealpha=0.95, fontsize=9)


def _make_room(axes: Axes, share: float) -> None:
    """Above the norms, on a log scale: for the legend."""
    low, high = map(np.log10, axes.get_ylim())
    axes.set_ylim(top=10 ** (high + share * (high - low)))


def _norm_title(run: Run) -> str:
    num_lost = int((~run.finite).sum())
    clipped = int((run.clipped & run.finite).sum())
    title = f"The gradient was clipped in {clipped:,} of {count(len(run.steps), 'step')}"
    return f"{title}; not finite in {num_lost:,}" if num_lost else title


def _one_norm(axes: Axes, run: Run) -> None:
    norms, spikes = np.minimum(run.columns["total_norm"], MOST), spikes_of(run)
    thinned = curve(run.steps, norms)
    label = (
        f"median and range of {thinned.num_rows} steps" if thinned.num_rows > 1 else "total norm"
    )
    _line(axes, thinned, GREY, "-", 1.0, label)
    clipped = np.where(run.clipped & run.finite, norms, np.nan)
    if thinned.num_rows == 1 and run.clipped.any():
        size = 3.5 if len(run.steps) <= 400 else 2.0
        axes.plot(run.steps, clipped, "o", color=ORANGE, markersize=size, label="clipped")
    limit = curve(run.steps, run.columns["limit"])
    if np.isfinite(limit.middle).any():
        _line(axes, limit, RED, "--", 1.6, "limit")
    if spikes:
        highest = sorted(spikes, key=lambda spike: -spike.ratio)[:_MOST_MARKED]
        rows = [spike.row for spike in highest]
        axes.plot(run.steps[rows], norms[rows] * 1.15, "v", color=BLUE, markersize=6, label="spike")
    _mark(axes, run.steps[~run.finite], RED, "not finite")


def _share_panel(axes: Axes, runs: Sequence[Run]) -> None:
    total = {run.name: float((run.clipped & run.finite).mean()) for run in runs}
    for run, (color, line) in zip(runs, _styles(runs), strict=True):
        each = shares(run.clipped, run.finite, _SHARES, _FEWEST)
        if not len(each.share):  # no step was finite
            continue
        edges = np.append(run.steps[each.first], run.steps[each.last[-1]]).astype(np.float64)
        if len(runs) == 1:
            axes.stairs(each.share, edges, color=ORANGE, alpha=0.35, fill=True)
        else:
            axes.stairs(each.share, edges, color=color, ls=line, linewidth=1.4, baseline=None)
    if len(runs) == 1:
        title = f"Clipped in {percent(total[runs[0].name])} of the steps"
    else:
        title = f"Share of clipped steps: {_extremes(total, percent)}"
    _dress(axes, title, "clipped share")
    axes.set_ylim(-0.02, 1.05)


def _coefficient_panel(axes: Axes, runs: Sequence[Run]) -> None:
    least: dict[str, float] = {}
    for run, (color, line) in zip(runs, _styles(runs), strict=True):
        values = np.where(run.finite, run.columns["coefficient"], np.nan)
        each = curve(run.steps, values)
        if np.isfinite(values).any():
            least[run.name] = float(np.nanmin(values))
        if len(runs) == 1:
            axes.fill_between(each.steps, each.low, 1.0, color=ORANGE, alpha=0.35, linewidth=0)
            axes.plot(each.steps, each.middle, color=ORANGE, linewidth=1.2)
        else:
            _line(axes, each, color, line, 1.0)
    if not least or min(least.values()) >= 1:
        title = "Clipping changed no gradient"
    elif len(runs) == 1:
        title = f"The strongest clip left {percent(min(least.values()))} of the gradient"
    else:
        title = f"Smallest coefficient: {_extremes(least)}"
    _dress(axes, title, "coefficient")
    axes.set_ylim(0, 1.08)


def _extremes(values: dict[str, float], shown: Callable[[float], str] = number) -> str:
    """The lowest and the highest value with their names; NaN is worse than any number."""
    order = sorted(values, key=lambda name: (np.isnan(values[name]), values[name]))
    ends = dict.fromkeys((order[0], order[-1]))
    texts = (shown(values[name]) if not np.isnan(values[name]) else "not finite" for name in ends)
    return " to ".join(
        f"{text} ({shortened(name, 24)})" for text, name in zip(texts, ends, strict=True)
    )


def _styles(runs: Sequence[Run]) -> list[tuple[str, str]]:
    if len(runs) == 1:
        return [(BLUE, "-")]
    return [STYLES[i % len(STYLES)] for i in range(len(runs))]


def _points(each: Curve) -> tuple[Floats, Floats]:
    return each.steps, each.middle


def _line(
    axes: Axes, each: Curve, color: str, line: str, width: float, label: str | None = None
) -> None:
    alone = np.isfinite(each.middle).sum() == 1  # one point has no line
    marker = "o" if alone else None
    axes.plot(*_points(each), line, color=color, linewidth=width, label=label, marker=marker)
    if each.num_rows > 1:
        face, edge = to_rgba(color, 0.22), to_rgba(color, 0.7)  # a spike is an edge alone
        axes.fill_between(each.steps, each.low, each.high, fc=face, ec=edge, linewidth=0.5)
    elif np.isnan(each.middle).any() and not alone:
        # Losses of every tenth step are points between gaps, and a line through them.
        has = np.isfinite(each.middle)
        if not (has[1:] & has[:-1]).any():
            axes.plot(each.steps[has], each.middle[has], line, color=color, linewidth=width)


def _mark(axes: Axes, steps: Ints, color: str, label: str | None = None) -> None:
    """Crosses at the foot."""
    if len(steps):
        foot = axes.get_xaxis_transform()
        steps = steps[:: max(1, len(steps) // MOST_POINTS)]
        axes.plot(steps, np.full(len(steps), 0.03), "x", color=color, transform=foot, label=label)


def _dress(axes: Axes, title: str, label: str, grid: bool = True) -> None:
    size = min(13.0, 13.0 * _MOST_TITLE / max(1, len(title)))
    axes.set_title(title, loc="left", fontsize=size, fontweight="bold")
    axes.set_ylabel(label)
    # In line; matplotlib would measure the ticks of all panels for that, in a second.
    axes.yaxis.set_label_coords(-0.08, 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    if grid:
        axes.grid(color="#dddddd", linewidth=0.6)


def _legend_of_runs(figure: Figure, axes: Axes, runs: Sequence[Run], title: str) -> None:
    names = [shortened(run.name, 40) for run in runs]
    handles = [axes.plot([], [], line, color=color)[0] for color, line in _styles(runs)]
    num_columns = max(1, min(len(names), 100 // (max(map(len, names)) + 6)))
    # A title of the figure would stand in the legend.
    made = figure.legend(
        handles,
        names,
        loc="outside upper center",
        ncols=num_columns,
        frameon=False,
        title=shortened(title, 110),
        title_fontsize=11,
    )
    made.get_title().set_color("#444444")


def _finish(figure: Figure, axes: Sequence[Axes], runs: Sequence[Run]) -> None:
    first, last = min(run.steps[0] for run in runs), max(run.steps[-1] for run in runs)
    margin = max(0.01 * (last - first), 0.5)
    axes[0].set_xlim(first - margin, last + margin)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))


def _save(figure: Figure, path: Path) -> None:
    # Renamed when it is whole: a kill leaves no half picture.
    temporary = path.with_name(f".{path.stem}.tmp.png")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of a name
        figure.savefig(temporary, dpi=_DPI)
    temporary.replace(path)
