"""What the plots of the HTML page have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter, PlainText, Range1d
from bokeh.plotting import figure
from numpy.typing import NDArray

from distclip.monitoring.findings import number
from distclip.monitoring.records import Floats, Ints, Run

LINE, LIMIT, OTHERS, NOT_FINITE = "#0072b2", "#e66100", "#bbbbbb", "#d00000"
_MOST_BUCKETS = 1000  # more fall on the same pixels, until one zooms in
_MOST_DECADES = 12  # on a logarithmic axis; what is smaller is at its lower edge
_LONGEST_LABEL = 24  # characters beside an axis
_MOST_RUNS_BEHIND = 5  # whose lines are also drawn behind those of each run


class Panel(NamedTuple):
    """One plot of one run, and what it shows in words; or why there is no plot."""

    run: str
    plot: Any
    words: str


class Section(NamedTuple):
    """The plots of one thing, a panel for each run; `keys` has the colors by their meaning."""

    title: str
    note: str
    keys: Mapping[str, str]
    panels: Sequence[Panel]


class Shared:
    """What the plots of all runs share.

    Attributes:
        runs: by the names that the page shows.
        steps: the range of steps; who zooms into one plot zooms into all.
        num_buckets: of each line: many runs share the size of the page.
        has_others: whether the other runs are drawn behind each run.
    """

    def __init__(self, runs: Mapping[str, Run]) -> None:
        self.runs = runs
        first = min(int(run.steps[0]) for run in runs.values())
        last = max(int(run.steps[-1]) for run in runs.values())
        space = max(0.5, 0.01 * (last - first))
        self.steps = Range1d(start=first - space, end=last + space)
        self.num_buckets = max(100, min(_MOST_BUCKETS, 4 * _MOST_BUCKETS // len(runs)))
        self.has_others = 1 < len(runs) <= _MOST_RUNS_BEHIND + 1

    def keys(self, keys: Mapping[str, str], with_others: bool = True) -> dict[str, str]:
        """With the colors of the other runs and of steps that were not finite."""
        others = {"the other runs": OTHERS} if with_others and self.has_others else {}
        has_bad = any(not run.finite.all() for run in self.runs.values())
        keys = {**keys, **others, **({"norm not finite": NOT_FINITE} if has_bad else {})}
        return keys if len(keys) > 1 else {}


class Axis(NamedTuple):
    """A vertical axis that the plots of all runs have."""

    label: str
    type: Literal["linear", "log"]
    low: float
    high: float

    def drawn(self, values: Floats) -> Floats:
        """Values where they can be drawn: on a log scale, too small ones at the lower edge."""
        values = np.where(np.isfinite(values), values, np.nan)
        if self.type == "linear":
            return values
        return np.maximum(values, self.low * (self.high / self.low) ** 0.02)


def axis_of(name: str, columns: Sequence[Floats], log: bool | None = None) -> Axis:
    """An axis for all of the values; with a log scale, if None, where they differ much."""
    values = np.concatenate([np.zeros(0), *columns])
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    if log is None:
        log = 0 < len(positive) == len(values) and bool(values.max() > 50 * values.min())
    if log:
        high = float(positive.max()) if len(positive) else 1.0
        low = float(positive.min()) if len(positive) else 0.1
        low = max(low, high * 10.0**-_MOST_DECADES)
        return Axis(f"{shortened(name)} (log scale)", "log", low / 1.3, high * 1.3)
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    space = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return Axis(shortened(name), "linear", low - space, high + space)


def new_plot(shared: Shared, axis: Axis, height: int = 240, **settings: Any) -> Any:
    """An empty plot."""
    settings = {"y_range": Range1d(start=axis.low, end=axis.high), **settings}
    plot: Any = figure(
        height=height,
        sizing_mode="stretch_width",
        min_width=200,
        x_range=shared.steps,
        y_axis_type=axis.type,
        tools="xbox_zoom,xpan,xwheel_zoom,reset,save",
        active_drag="xbox_zoom",
        active_scroll=None,
        toolbar_location="above",
        **settings,
    )
    plot.toolbar.logo = None
    plot.xaxis.axis_label = "step"
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    plot.xaxis.ticker.min_interval = 1
    plot.yaxis.axis_label = PlainText(text=axis.label)  # a column's name may look like TeX
    plot.axis.axis_label_text_font_style = "normal"
    plot.axis.minor_tick_line_color = None
    plot.outline_line_color = "#cccccc"
    return plot


def shortened(name: str) -> str:
    """At most 24 characters: the last ones, which tell layers apart better than the first."""
    return name if len(name) <= _LONGEST_LABEL else f"…{name[1 - _LONGEST_LABEL :]}"


def facts(steps: Ints, values: Floats) -> str:
    """The main figures of a column in words."""
    rows = np.flatnonzero(np.isfinite(values))
    if not len(rows):
        return "Not finite in any step."
    finite = values[rows]
    if finite.min() == finite.max():
        return f"Always {number(float(finite[0]))}."
    least, most = int(rows[np.argmin(finite)]), int(rows[np.argmax(finite)])
    return (
        f"Median {number(float(np.median(finite)))}, last {number(float(finite[-1]))}; smallest "
        f"{number(float(values[least]))} in step {steps[least]:,}, largest "
        f"{number(float(values[most]))} in step {steps[most]:,}."
    )


def source_of(data: Mapping[str, Any]) -> ColumnDataSource:
    """The columns, with numbers in the shortest types that hold them."""
    columns = {
        name: short(cast("NDArray[Any]", column)) if isinstance(column, np.ndarray) else column
        for name, column in data.items()
    }
    return ColumnDataSource(data=columns)


def short(values: NDArray[Any]) -> NDArray[Any]:
    """int32 and float32 where these have the range of the values."""
    if values.dtype.kind == "i":
        fits = np.abs(values).max(initial=0) < 2**31
        return values.astype(np.int32 if fits else np.float64)
    with np.errstate(over="ignore", under="ignore"):
        narrow = values.astype(np.float32)
    same = (np.isfinite(narrow) == np.isfinite(values)) & ((narrow == 0) == (values == 0))
    return narrow if same.all() else values


def add_hover(
    plot: Any, renderer: Any, lines: Sequence[tuple[str, str]], at_step: bool = False
) -> None:
    """Shows lines of a title and a text with columns; with `at_step`, anywhere above the step."""
    formatters: Any = {f"@{{{name}}}": "printf" for name in renderer.data_source.data}
    mode = "vline" if at_step else "mouse"
    hover: Any = HoverTool(renderers=[renderer], tooltips=[*lines], mode=mode)
    hover.formatters = formatters
    plot.add_tools(hover)


def exact(name: str) -> str:
    """A column in the text of a hover, with the digits of a float32."""
    return f"@{{{name}}}{{%.7g}}"
