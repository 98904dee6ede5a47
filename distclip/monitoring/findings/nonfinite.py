"""Steps whose norm was NaN or infinite, and who caused them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from distclip.monitoring.findings import MOST_STEPS, Finding, count, listed, steps_in_words
from distclip.monitoring.records import Floats, Ints, Run

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
    text = f"The norm was not finite in {steps_in_words(steps)}{_how_it_ended(run, rows)}."
    causes, tensors = _causes(run, rows)
    yield Finding("nonfinite", True, f"{text} {causes}", steps[:MOST_STEPS], tensors)


def _how_it_ended(run: Run, rows: Ints) -> str:
    last = len(run.steps) - 1
    if len(rows) > 1 and rows[-1] == last and (np.diff(rows) == 1).all():
        return ", to the end of the run: weights became NaN"
    return f" ({len(rows):,} of {count(last + 1, 'step')})"


def _causes(run: Run, rows: Ints) -> tuple[str, list[str]]:
    """In the first step about which something is known: later ones may follow from it."""
    for row in rows:
        if named := run.nonfinite.get(int(row)):
            return _by_parameters(int(run.steps[row]), named)
        if len(index := np.flatnonzero(run.tensors.rows == row)):
            return _by_tensor_norms(run, int(run.steps[row]), run.tensors.norms[index[0]])
    return WHAT_TO_ADD, []


def _by_parameters(step: int, named: Mapping[str, Sequence[int]]) -> tuple[str, list[str]]:
    ranks = sorted({rank for each in named.values() for rank in each})
    where = f"rank{'' if len(ranks) == 1 else 's'} {listed([*map(str, ranks)], 8)}"
    who = listed([*named])
    return f"In step {step} it came from {who} on {where}.", [*named]


def _by_tensor_norms(run: Run, step: int, norms: Floats) -> tuple[str, list[str]]:
    names = [
        name for name, norm in zip(run.tensors.names, norms, strict=True) if not np.isfinite(norm)
    ]
    if len(names) == len(run.tensors.names):
        return f"In step {step} no tensor's gradient was finite: the loss was not, either.", names
    return f"In step {step} it came from {listed(names)}.", names
