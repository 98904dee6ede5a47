"""Steps whose norm was NaN or infinite, and who caused them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from distclip.monitoring.findings import MOST_STEPS, Finding, chosen, count, listed, steps_in_words
from distclip.monitoring.records import Ints, Run

WHAT_TO_ADD = (
    "To see who causes such a step, append "
    "`nonfinite_parameters=report.nonfinite_parameters()`, or make the clipper with "
    "`tensor_norms=True`."
)


def find(run: Run) -> Iterator[Finding]:
    rows = np.flatnonzero(~run.finite)
    if len(rows) == 0:
        return
    steps: list[int] = run.steps[rows].tolist()
    text = f"The norm was not finite in {steps_in_words(steps)}{_how_it_ended(run, rows)}"
    causes, tensors = _causes(run, rows)
    yield Finding("nonfinite", True, f"{text} {causes}", steps[:MOST_STEPS], tensors)


def _how_it_ended(run: Run, rows: Ints) -> str:
    last = len(run.steps) - 1
    if len(rows) > 1 and rows[-1] == last and (np.diff(rows) == 1).all():
        return ". That lasted to the end of the run, as it does when weights have become NaN."
    return f" ({len(rows):,} of {count(last + 1, 'step')})."


def _causes(run: Run, rows: Ints) -> tuple[str, list[str]]:
    """In the first step about which something is known: later ones may follow from it."""
    for row in rows.tolist():
        step = f"In step {run.steps[row]}"
        if named := run.nonfinite.get(row):
            ranks = sorted({rank for each in named.values() for rank in each})
            where = listed([*map(str, ranks)], 8) if ranks else "unknown"
            where = f"rank{'s' if len(ranks) > 1 else ''} {where}"
            return f"{step} it came from {listed([*named])} on {where}.", [*named]
        if len(index := np.flatnonzero(run.tensors.rows == row)):
            names = chosen(run.tensors.names, ~np.isfinite(run.tensors.norms[index[0]]))
            if len(names) == len(run.tensors.names):
                return f"{step} no gradient was finite, as where the loss was not.", names
            return f"{step} it came from {listed(names)}.", names
    return WHAT_TO_ADD, []
