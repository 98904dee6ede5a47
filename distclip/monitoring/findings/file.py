"""What the file lacks: steps, lines, and enough of both."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from distclip.monitoring.findings import MOST_STEPS, Finding, count, listed
from distclip.monitoring.records import Run

MIN_STEPS = 20  # fewer have no trend, and no usual norm that a spike could exceed


def find(run: Run) -> Iterator[Finding]:
    if len(run.steps) < MIN_STEPS:
        num = count(len(run.steps), "step")
        yield Finding("short", False, f"{num} are too few to judge spikes and trends.")
    yield from _missing(run)
    if run.num_replaced:
        text = f"A later start made {count(run.num_replaced, 'step')} again, and its rows count."
        yield Finding("file", False, text)
    if run.num_broken:
        was = "was" if run.num_broken == 1 else "were"
        text = f"{count(run.num_broken, 'line')} of the file {was} broken and left out."
        yield Finding("file", True, text)


def _missing(run: Run) -> Iterator[Finding]:
    strides = np.diff(run.steps)
    if len(strides) == 0:
        return
    usual = int(np.median(strides))
    (gaps,) = np.nonzero(strides > usual)
    if len(gaps) == 0:
        return
    num = int((strides[gaps] // usual - (strides[gaps] % usual == 0)).sum())
    firsts = run.steps[gaps] + usual
    spans = [f"{a} to {b}" for a, b in zip(firsts, run.steps[gaps + 1] - 1, strict=True)]
    text = f"{count(num, 'step')} of the run are not in the file: {listed(spans)}."
    yield Finding("file", True, text, firsts[:MOST_STEPS].tolist())
