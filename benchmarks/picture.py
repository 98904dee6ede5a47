"""The picture of a benchmark: how many times as fast as torch, one row of panels for each case."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.baselines import TORCH
from benchmarks.goals import AtMost, Goal
from benchmarks.timing import Row, find, ratio

BLUE, GREY, RED = "#2864a8", "#8a8f98", "#c0282d"
GOAL = {"color": RED, "markersize": 18, "markeredgewidth": 2.5, "label": "goal"}


def draw(rows: Sequence[Row], goals: Sequence[Goal | AtMost], title: str, path: Path) -> None:
    """One column of panels for each state."""
    cases, states = unique(r.case for r in rows), unique(r.state for r in rows)
    timed = [r for r in rows if r.seconds and r.baseline != TORCH]
    names = [unique(r.baseline for r in timed if r.case == case) for case in cases]
    heights = [0.9 + 0.27 * len(each) for each in names]
    figure = Figure(figsize=(5.5 * len(states), 0.8 + sum(heights)), layout="constrained")
    figure.suptitle(f"{title}: times as fast as torch (p20 to p80 of the rounds)", weight="bold")
    alike = {"sharex": True, "sharey": "row", "height_ratios": heights}
    grid = figure.subplots(len(cases), len(states), squeeze=False, **alike)
    for case, baselines, panels in zip(cases, names, grid, strict=True):
        for state, axes in zip(states, panels, strict=True):
            torch = find(rows, case, state, TORCH)
            panel(axes, [find(rows, case, state, name) for name in baselines], torch)
            axes.set_title(f"{case}, {state}", loc="left", fontsize=10)
            for goal in goals:
                here = isinstance(goal, Goal) and (goal.case, goal.state) == (case, state)
                if here and goal.than == TORCH and goal.baseline in baselines:
                    axes.plot(goal.times, baselines.index(goal.baseline), "|", **GOAL)
    handles = (pair for a in grid.flat for pair in zip(*a.get_legend_handles_labels(), strict=True))
    by_label = {label: handle for handle, label in handles}
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower right", ncols=3)
    figure.savefig(path, dpi=110)


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def panel(axes: Axes, rows: Sequence[Row], torch: Row) -> None:
    for y, row in enumerate(rows):
        color, label = (BLUE, "distclip") if "distclip" in row.baseline else (GREY, "others")
        if (found := ratio(torch, row)) is None:
            axes.text(0.02, y, "not measured", transform=axes.get_yaxis_transform(), color=GREY)
            continue
        axes.plot([found.p20, found.p80], [y, y], color=color, linewidth=5, alpha=0.35)
        axes.plot(found.p50, y, "o", color=color, label=label)
        text = f"{float(f'{found.p50:.2g}'):g}"  # 140, not 1.4e+02
        axes.annotate(text, (found.p50, y), (0, 5), textcoords="offset points", ha="center", size=8)
    axes.set_yticks(range(len(rows)), [row.baseline for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(labelbottom=True)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
