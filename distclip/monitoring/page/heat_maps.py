"""The heat maps of the HTML page: the norm of each layer over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.models import (
    ColorBar,
    ColumnDataSource,
    FixedTicker,
    LogColorMapper,
    PlainText,
)
from numpy.typing import NDArray

from distclip.monitoring.findings import count, number
from distclip.monitoring.layers import layer_norms
from distclip.monitoring.page.panels import (
    Axis,
    Panel,
    Section,
    Shared,
    add_hover,
    axis_of,
    exact,
    new_plot,
    short,
    shortened,
)
from distclip.monitoring.records import Floats, Ints, Run
from distclip.monitoring.thinning import Cells, cells

_MOST_CELLS = 40_000  # of a run
_MOST_WIDE = 400
_MOST_LABELS = 40
_HIGHEST = 560  # pixels
_PALETTE = "Viridis256"
_BAD, _MISSING = "#ff2d2d", "#dddddd"  # not colors of the palette


def heat_maps(shared: Shared) -> Section:
    """One for each run that has norms of tensors, with colors that mean the same in all."""
    norms = {label: layer_norms(run) for label, run in shared.runs.items() if len(run.tensors.rows)}
    scale = axis_of("norm", [each.ravel() for _, each in norms.values()], log=True)
    panels = [
        _heat_map(shared, label, *norms[label], scale)
        if label in norms
        else Panel(label, None, "This run has none: Clipper(tensor_norms=...) measures them.")
        for label in shared.runs
    ]
    note = (
        "The first layer is on top. A norm is drawn until the next step that has one. Colors have "
        "a log scale; 0 has the darkest."
    )
    missing = {label: _missing(shared.runs[label], each) for label, (_, each) in norms.items()}
    keys: dict[str, str] = {}
    if any((~np.isfinite(each) & ~missing[label]).any() for label, (_, each) in norms.items()):
        keys["not finite"] = _BAD
    if any(each.any() for each in missing.values()):
        keys["missing"] = _MISSING
    return Section("Gradient norm per layer", note if norms else "", keys, panels)


def _heat_map(
    shared: Shared, label: str, names: Sequence[str], norms: Floats, scale: Axis
) -> Panel:
    run = shared.runs[label]
    steps = run.steps[run.tensors.rows]
    most = max(20, min(_MOST_WIDE, _MOST_CELLS // len(names)) // len(shared.runs))
    source = _images(cells(steps, norms, most), steps, _missing(run, norms), names)
    axis = Axis("layer", "linear", len(names) - 0.5, -0.5)  # the first on top
    plot = new_plot(shared, axis, height=100 + min(_HIGHEST, max(80, 14 * len(names))))
    mapper = LogColorMapper(
        palette=_PALETTE, low=scale.low, high=scale.high, nan_color=_MISSING, high_color=_BAD
    )
    image = plot.image("image", "x", "y", "dw", "dh", source=source, color_mapper=mapper)
    _label_layers(plot, names)
    plot.grid.visible = False
    plot.add_layout(ColorBar(color_mapper=mapper, width=12), "right")
    hover = [("layer", "@layer"), ("step", "@steps{0}"), ("norm", exact("norm"))]
    add_hover(plot, image, hover)
    return Panel(label, plot, _words(names, steps, norms))


def _missing(run: Run, norms: Floats) -> NDArray[np.bool_]:
    """NaN stands for a layer that a row lacks where the norm of all was finite."""
    return np.isnan(norms) & run.finite[run.tensors.rows, None]


def _images(
    grid: Cells, steps: Ints, missing: NDArray[np.bool_], names: Sequence[str]
) -> ColumnDataSource:
    """An image of one line for each layer: the name of a layer is there once, and not per cell."""
    num = len(names)
    values, cell_steps = short(grid.values), short(steps[grid.rows])
    bad = ~np.isfinite(values) & ~missing[grid.rows, np.arange(num)[:, None]]
    colors = np.where(bad, np.inf, values)
    data: Any = {
        "image": _lines(colors),
        "steps": _lines(cell_steps),
        "layer": [*names],
        "x": np.full(num, grid.left),
        "y": np.arange(num) - 0.5,
        "dw": np.full(num, grid.right - grid.left),
        "dh": np.ones(num),
    }
    # Colors are the norms, except where these are bad.
    data["norm"] = _lines(values) if bad.any() else data["image"]
    return ColumnDataSource(data=data)


def _lines(table: NDArray[Any]) -> list[NDArray[Any]]:
    return [*table[:, None]]


def _label_layers(plot: Any, names: Sequence[str]) -> None:
    every = -(-len(names) // _MOST_LABELS)
    labels = {i: PlainText(text=shortened(names[i])) for i in range(0, len(names), every)}
    plot.yaxis.ticker = FixedTicker(ticks=[*labels])
    plot.yaxis.major_label_overrides = labels
    plot.yaxis.axis_label = None


def _words(names: Sequence[str], steps: Ints, norms: Floats) -> str:
    text = f"{count(len(names), 'layer')} in {count(len(steps), 'step')}"
    finite = np.isfinite(norms)
    if not finite.any():
        return f"{text}, none of them finite."
    least = np.argmin(np.where(finite, norms, np.inf))
    most = np.argmax(np.where(finite, norms, -np.inf))
    ends = (_at(names, steps, norms, int(each)) for each in (least, most))
    return "{}; smallest {}, largest {}.".format(text, *ends)


def _at(names: Sequence[str], steps: Ints, norms: Floats, index: int) -> str:
    row, layer = divmod(index, len(names))
    return f"{number(float(norms[row, layer]))} of {names[layer]} in step {steps[row]:,}"
