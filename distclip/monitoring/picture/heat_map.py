"""The norms of the layers over a run, as a picture: a row for each layer, in order of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.patches import Patch

from distclip.monitoring.findings import chosen, depth, listed, number, trends
from distclip.monitoring.layers import layer_norms, layers_of
from distclip.monitoring.picture.curves import MOST
from distclip.monitoring.picture.texts import shortened
from distclip.monitoring.records import Floats, Run
from distclip.monitoring.thinning import cells

_MOST_CELLS = 550  # two pixels for each
_MOST_LABELS = 60
# What no color of the scale can say.
ODD = {"0": "#1a1a1a", "not in this row": "#e4e4e4", "not finite": "#e5322d"}


def height_of(run: Run) -> float:
    """In inches."""
    return float(np.clip(0.16 * len(layers_of(run.tensors.names)), 1.2, 7.5))


def draw_layers(axes: Axes, run: Run, with_name: bool) -> str:
    """Draws into `axes`, and returns the title."""
    layers, norms = layer_norms(run)
    steps = run.steps[run.tensors.rows]
    grid = cells(steps, norms, _MOST_CELLS)
    extent = (grid.left, grid.right, len(layers) - 0.5, -0.5)
    finite_row = run.finite[run.tensors.rows][grid.rows]
    odd = np.full(grid.values.shape, np.nan)
    odd[grid.values == 0] = 0
    odd[np.isnan(grid.values) & finite_row] = 1
    odd[~np.isfinite(grid.values) & ~finite_row] = 2
    ordinary = np.where(np.isnan(odd), grid.values, np.nan)
    how: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "extent": extent}
    if np.isfinite(ordinary).any():
        image = axes.imshow(ordinary, norm=_norm(ordinary), cmap="viridis", **how)
        bar = axes.inset_axes((1.01, 0, 0.014, 1))
        axes.figure.colorbar(image, cax=bar, label="norm (log scale)")
    axes.imshow(odd, cmap=ListedColormap([*ODD.values()]), vmin=-0.5, vmax=2.5, **how)
    present = [Patch(color=c, label=n) for k, (n, c) in enumerate(ODD.items()) if (odd == k).any()]
    if present:
        axes.legend(handles=present, loc="upper right", fontsize=8, ncols=3, framealpha=0.9)
    _label_rows(axes, layers)
    title = _title(run, layers, norms)
    return f"{shortened(run.name, 30)}: {title}" if with_name else title


def _norm(values: Floats) -> LogNorm:
    """A hundredth of the cells may be below the scale: one tiny norm would take all of it."""
    low, high = np.percentile(values[np.isfinite(values)], [1, 100]).clip(1 / MOST, MOST)
    return LogNorm(low if low < high else high / 10, high, clip=True)


def _label_rows(axes: Axes, layers: tuple[str, ...]) -> None:
    every = -(-len(layers) // _MOST_LABELS)
    rows = range(0, len(layers), every)
    size = 8 if len(rows) < 30 else 7
    axes.set_yticks(rows, [shortened(layers[k], 28) for k in rows], fontsize=size)


def _title(run: Run, layers: tuple[str, ...], norms: Floats) -> str:
    about = [each for each in [*depth.find(run), *trends.find(run)] if each.is_warning]
    if named := [each.text for each in about if each.tensors]:
        return shortened(named[0].partition(":")[0], 80)
    known = np.where(np.isfinite(norms), norms, np.nan)
    lost = np.flatnonzero(~run.finite[run.tensors.rows] & ~np.isfinite(norms).all(axis=1))
    if len(lost):
        first = chosen(layers, ~np.isfinite(norms[lost[0]]))
        some = "layer " if len(first) == 1 else "layers "
        where = f"in {some}{listed([shortened(name, 24) for name in first], 2)}"
        where = "in all layers" if len(first) == len(layers) else where
        return f"Not finite in step {run.steps[run.tensors.rows[lost[0]]]} {where}"
    has = np.isfinite(known).sum(axis=0) > 0
    if not has.any():
        return "No norm of a layer was finite"
    usual = np.nanmedian(known[:, has], axis=0)
    names = [shortened(name, 24) for name in chosen(layers, has)]
    ends = dict.fromkeys((int(usual.argmin()), int(usual.argmax())))
    texts = (f"{number(float(usual[k]))} (layer {names[k]})" for k in ends)
    return f"The usual norm is {' to '.join(texts)}"
