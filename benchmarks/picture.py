"""The picture of a benchmark: how many times as fast as torch, one panel a case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.goals import Goal, Judged
from benchmarks.rivals import TORCH
from benchmarks.timing import Row, find, ratio

BLUE, GREY, RED = "#2864a8", "#8a8f98", "#c0282d"


def draw(rows: Sequence[Row], goals: Sequence[Judged], title: str, path: Path) -> None:
    """One row of panels a case, one column a state."""
    cases, states = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("case", "state"))
    measured = [[row for row in rows if row.case == case and row.seconds and row.rival != TORCH] for case in cases]
    rivals = [list(dict.fromkeys(row.rival for row in there)) for there in measured]
    heights = [0.9 + 0.27 * len(names) for names in rivals]
    figure = Figure(figsize=(5.5 * len(states), 0.8 + sum(heights)), layout="constrained")
    figure.suptitle(f"{title}: times as fast as torch (p20 to p80 of the rounds)", fontweight="bold")
    grid = figure.subplots(len(cases), len(states), squeeze=False, sharey="row", sharex=True, height_ratios=heights)
    for case, names, line in zip(cases, rivals, grid, strict=True):
        for state, axes in zip(states, line, strict=True):
            panel(axes, [find(rows, case, state, name) for name in names], find(rows, case, state, TORCH))
            axes.set_title(f"{case}, {state}", loc="left", fontsize=10)
            ours = [g for g in goals if isinstance(g, Goal) and (g.case, g.state, g.than) == (case, state, TORCH)]
            mark_goals(axes, ours, names)
    low, high = grid[0][0].get_xlim()
    for axes in grid.flat:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 200 else (1.0,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in grid[-1]:
        axes.set_xlabel("times as fast as torch (log scale)")
    figure.legend(handles=handles(grid.flat), loc="outside lower right", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def panel(axes: Axes, rows: Sequence[Row], torch: Row) -> None:
    for place, row in enumerate(rows):
        found = ratio(torch, row)
        if found is None:
            axes.text(0.02, place, "not measured", transform=axes.get_yaxis_transform(), color=GREY, va="center")
            continue
        ours = row.rival.startswith("distclip")
        axes.plot([found.p20, found.p80], [place, place], color=BLUE if ours else GREY, linewidth=5, alpha=0.35)
        axes.plot(found.p50, place, "o", color=BLUE if ours else GREY, label="distclip" if ours else "others")
        said = f"{float(f'{found.p50:.2g}'):g}"  # 140, not 1.4e+02
        axes.annotate(said, (found.p50, place), (0, 5), textcoords="offset points", ha="center", size=8)
    axes.set_yticks(range(len(rows)), [row.rival for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.set_xscale("log")
    axes.tick_params(labelbottom=True)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def mark_goals(axes: Axes, goals: Sequence[Goal], names: Sequence[str]) -> None:
    for goal in goals:
        if goal.rival in names:
            place = names.index(goal.rival)
            axes.plot(goal.times, place, "|", color=RED, markersize=18, markeredgewidth=2.5, label="goal")


def handles(panels: Sequence[Axes]) -> list:
    """One handle for each label of any panel."""
    pairs = (pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True))
    return list({label: handle for handle, label in pairs}.values())
