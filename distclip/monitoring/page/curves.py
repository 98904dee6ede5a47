"""The plots of one number per step: the loss, the norm, the coefficient, clipped steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.models import BooleanFilter, CDSView, ColumnDataSource
from numpy.typing import NDArray

from distclip.monitoring.findings import count, listed, number, percent
from distclip.monitoring.lines import FIGURES
from distclip.monitoring.page.panels import (
    LIMIT,
    LINE,
    NOT_FINITE,
    OTHERS,
    Axis,
    Panel,
    Section,
    Shared,
    add_hover,
    axis_of,
    exact,
    facts,
    new_plot,
    source_of,
)
from distclip.monitoring.records import Floats, Ints, Run
from distclip.monitoring.thinning import rows_that_show, shares, spans

_MOST_SPANS = 300
_SHORT_RUN = 100  # rows: each point can be seen
_STEP = ("step", "@step{0}")


def norms(shared: Shared) -> Section:
    runs = shared.runs
    limits = [_limits_in_view(run) for run in runs.values()]
    axis = axis_of("norm", [*(run.columns["total_norm"] for run in runs.values()), *limits], True)
    names = ("total_norm", "limit", "coefficient")
    sources: dict[str, ColumnDataSource] = {}
    for label, run in runs.items():
        show = [run.columns["total_norm"], run.columns["limit"]]
        rows = rows_that_show(show, shared.num_buckets // 2)
        columns = {name: run.columns[name][rows] for name in names}
        sources[label] = _source(axis, run.steps[rows], columns)
    hover = [_STEP, *((name.replace("total_", ""), exact(name)) for name in names)]
    panels: list[Panel] = []
    for label, run in runs.items():
        plot = _line_plot(shared, label, axis, sources, hover)
        dashes = {"line_dash": [6, 3], "line_width": 2}
        plot.line("step", "drawn limit", source=sources[label], color=LIMIT, **dashes)
        _add_points(plot, sources[label], "drawn limit", LIMIT, ())
        words = facts(run.steps, run.columns["total_norm"])
        panels.append(Panel(label, plot, f"{words} {_limit_in_words(run.columns['limit'])}"))
    note = "Of all gradients before clipping, and the limit that the policy set."
    return Section(
        "Gradient norm and limit", note, shared.keys({"norm": LINE, "limit": LIMIT}), panels
    )


def coefficients(shared: Shared) -> Section:
    columns = {label: run.columns["coefficient"] for label, run in shared.runs.items()}
    finite = np.concatenate([values[np.isfinite(values)] for values in columns.values()])
    positive = finite[finite > 0]
    log = len(positive) > 0 and bool(np.quantile(positive, 0.05) < 0.1)
    axis = axis_of("coefficient", [finite], log)
    axis = axis._replace(low=axis.low if log else 0.0, high=max(axis.high, 1.05))
    sources = {
        label: _thinned(shared, axis, run.steps, columns[label])
        for label, run in shared.runs.items()
    }
    hover = [_STEP, ("coefficient", exact("value"))]
    panels = [
        Panel(
            label,
            _line_plot(shared, label, axis, sources, hover, with_others=False),
            facts(run.steps, columns[label]),
        )
        for label, run in shared.runs.items()
    ]
    note = "What the gradients were multiplied by; 1 where they were not clipped."
    return Section("Coefficient", note, shared.keys({"coefficient": LINE}, False), panels)


def column(shared: Shared, name: str) -> Section:
    """Something that the user has added, in the rows that have it."""
    columns: dict[str, tuple[Ints, Floats]] = {}
    for label, run in shared.runs.items():
        values = run.columns.get(name, np.full(len(run.steps), np.nan))
        # A NaN may only mean that the row has no such number.
        columns[label] = run.steps[np.isfinite(values)], values[np.isfinite(values)]
    axis = axis_of(name, [values for _, values in columns.values()])
    sources = {
        label: _thinned(shared, axis, *each) for label, each in columns.items() if len(each[0])
    }
    hover = [_STEP, (name, exact("value"))]
    panels = [
        Panel(label, _line_plot(shared, label, axis, sources, hover), facts(*columns[label]))
        if label in sources
        else Panel(label, None, "This run has no finite number of this name.")
        for label in shared.runs
    ]
    title = "Loss" if name == "loss" else name
    return Section(title, "", shared.keys({name: LINE}), panels)


def added_columns(runs: Iterable[Run]) -> list[str]:
    """The names of the columns that users have added, the loss first."""
    names = dict.fromkeys(name for run in runs for name in run.columns if name not in FIGURES)
    return sorted(names, key=lambda name: name != "loss")


def clipped_shares(shared: Shared) -> Section:
    axis = Axis("steps clipped (%)", "linear", 0.0, 105.0)
    panels = [_bars(shared, label, run, axis) for label, run in shared.runs.items()]
    return Section("Share of clipped steps", "Each bar stands on its steps.", {}, panels)


def _bars(shared: Shared, label: str, run: Run, axis: Axis) -> Panel:
    clipped = run.clipped[run.finite]
    if not len(clipped):
        return Panel(label, None, "The norm is not finite in any step.")
    found = shares(run.clipped, run.finite, num_buckets=100, fewest_rows=5)
    first, last = run.steps[found.first], run.steps[found.last]
    data = {"first": first, "last": last, "left": first - 0.5, "right": last + 0.5}
    data["clipped"] = 100 * found.share
    plot = new_plot(shared, axis, height=180)
    bars = plot.quad(
        "left", "right", "clipped", 0, source=source_of(data), color=LINE, fill_alpha=0.4
    )
    hover = [("steps", "@first{0} to @last{0}"), ("clipped", "@clipped{0.0} %")]
    add_hover(plot, bars, hover, at_step=True)
    share = percent(float(clipped.mean()))
    words = f"Clipped in {clipped.sum():,} of {count(len(clipped), 'step')} ({share})."
    if len(clipped) < len(run.steps):
        words = f"{words} Steps that were not finite do not count."
    return Panel(label, plot, words)


def _thinned(shared: Shared, axis: Axis, steps: Ints, values: Floats) -> ColumnDataSource:
    rows = rows_that_show([values], shared.num_buckets)
    return _source(axis, steps[rows], {"value": values[rows]})


def _source(axis: Axis, steps: Ints, columns: Mapping[str, Floats]) -> ColumnDataSource:
    """The first column is the line."""
    drawn = {"drawn": axis.drawn(next(iter(columns.values())))}
    if "limit" in columns:
        drawn["drawn limit"] = axis.drawn(columns["limit"])
    return source_of({"step": steps, **columns, **drawn})


def _line_plot(
    shared: Shared,
    label: str,
    axis: Axis,
    sources: Mapping[str, ColumnDataSource],
    hover: Sequence[tuple[str, str]],
    with_others: bool = True,
) -> Any:
    plot = new_plot(shared, axis)
    if with_others and shared.has_others:
        for other in [each for each in sources if each != label]:
            plot.line("step", "drawn", source=sources[other], color=OTHERS)
    _mark_nonfinite(plot, shared.runs[label])
    source = sources[label]
    line = plot.line("step", "drawn", source=source, color=LINE)
    add_hover(plot, line, hover, at_step=True)
    _add_points(plot, source, "drawn", LINE, hover)
    return plot


def _add_points(
    plot: Any, source: ColumnDataSource, name: str, color: str, hover: Sequence[tuple[str, str]]
) -> None:
    """The points that a line does not show, as they have no neighbor; all of a short run."""
    data: Any = source.data
    there = np.pad(np.isfinite(data[name]), 1)
    alone = there[1:-1] & ~there[:-2] & ~there[2:]
    if alone.any():
        points = _points(plot, source, name, color, alone)
        add_hover(plot, points, hover, at_step=True)
    if len(alone) <= _SHORT_RUN and name == "drawn":
        _points(plot, source, name, color, there[1:-1])


def _points(
    plot: Any, source: ColumnDataSource, name: str, color: str, rows: NDArray[np.bool_]
) -> Any:
    view = CDSView(filter=BooleanFilter(rows.tolist()))
    return plot.scatter("step", name, source=source, view=view, color=color, size=5)


def _mark_nonfinite(plot: Any, run: Run) -> None:
    found = spans(~run.finite, _MOST_SPANS)
    if not found:
        return
    first = run.steps[[each.first for each in found]]
    last = run.steps[[each.last for each in found]]
    in_words = [
        f"{a}" if a == b else f"{each.num:,} of the steps {a} to {b}"
        for a, b, each in zip(first.tolist(), last.tolist(), found, strict=True)
    ]
    who = [_who(run, each.first, each.last) for each in found]
    source = source_of({"left": first - 0.5, "right": last + 0.5, "steps": in_words, "who": who})
    strips = plot.vstrip("left", "right", source=source, color=NOT_FINITE, fill_alpha=0.15)
    hover = [("norm not finite", "@steps"), ("because of", "@who")]
    add_hover(plot, strips, hover)


def _who(run: Run, first: int, last: int) -> str:
    names = dict.fromkeys(
        f"{name} (rank {', '.join(map(str, ranks))})"
        for row, found in run.nonfinite.items()
        if first <= row <= last
        for name, ranks in found.items()
    )
    return listed([*names]) if names else "not recorded"


def _limits_in_view(run: Run) -> Floats:
    """The limits that do not squeeze the norms into a corner of the plot."""
    limit, total = run.columns["limit"], run.columns["total_norm"]
    total = total[np.isfinite(total)]
    if not len(total):
        return limit
    return limit[(limit <= 100 * total.max()) & (limit >= total.min() / 100)]


def _limit_in_words(limit: Floats) -> str:
    finite = limit[np.isfinite(limit)]
    if not len(finite):
        return "No limit."
    low, high = number(float(finite.min())), number(float(finite.max()))
    return f"Limit {low}." if low == high else f"Limit from {low} to {high}."
