"""Norms that vanish or explode over the run: the total one, and those of layers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from distclip.monitoring.findings import Finding, chosen, layers_in_words, number
from distclip.monitoring.findings.spikes import find_spikes, inside, medians_before, window_of
from distclip.monitoring.layers import layer_norms
from distclip.monitoring.records import Floats, Run

# The norms of a loss that is averaged are mostly 0.01 to 100, at the start too.
HUGE = 1e4
# Norms of healthy runs rise while the model leaves its initialization, and with a falling learning
# rate (Defazio, "Why gradients rapidly increase near the end of training", 2025,
# arXiv:2506.02285), both by about 10.
GROWN = 100.0
FADED = 1e-4  # of a layer's earlier norm, while the total kept a hundredth of its own: learning
# that ends lets all layers fade alike
NUM_PARTS = 10  # of the run: its first is compared with its last
NUM_LATE = 4  # of the rows with tensor norms, the last quarter
MIN_ROWS = 20
MIN_LATE = 5
NUM_STAYING = 3  # rows: two of them high are more than a spike of one row


def find(run: Run) -> Iterator[Finding]:
    rows = np.flatnonzero(run.finite & ~inside(np.arange(len(run.steps)), find_spikes(run)))
    norms = run.columns["total_norm"][rows]
    if len(norms) == 0:
        return
    start = float(np.median(norms[: max(1, len(norms) // NUM_PARTS)]))
    if start >= HUGE:
        text = (
            f"The norm is {number(start)} from the start: the gradient explodes, the loss is a sum "
            f"that is not averaged, or a loss scale is still in the gradients."
        )
        yield Finding("exploding", True, text, [int(run.steps[rows[0]])])
    elif (grown := _growth(norms)) is not None:
        row, before, after = grown
        step = int(run.steps[rows[row]])
        text = (
            f"The norm explodes: from step {step} on it rises from {number(before)} "
            f"to {number(after)}. Warm-up, a smaller learning rate, or a limit near "
            f"{number(before)} prevent that."
        )
        yield Finding("exploding", True, text, [step])
    yield from _fading(run)


def _growth(norms: Floats) -> tuple[int, float, float] | None:
    """The row where the norm has exploded, with the norms before it and from it on."""
    if len(norms) > 1:
        before = medians_before(norms, window_of(len(norms)), 1)
        padded = np.pad(norms, (0, NUM_STAYING - 1), mode="edge")  # NaN may follow the last one
        after = np.median(sliding_window_view(padded, NUM_STAYING), axis=1)
        (sudden,) = np.nonzero((after >= GROWN * before) & (before > 0))
        if len(sudden):
            last = sudden[-1] + NUM_STAYING
            return int(sudden[0]), float(before[sudden[0]]), float(norms[sudden[0] : last].max())
    if len(norms) >= MIN_ROWS:
        parts = np.array_split(norms, NUM_PARTS)
        first, last = float(np.median(parts[0])), float(np.median(parts[-1]))
        if last >= GROWN * first > 0:
            return int(np.argmax(norms >= GROWN * first)), first, last
    return None


def _fading(run: Run) -> Iterator[Finding]:
    layers, norms = layer_norms(run)
    rows = run.tensors.rows[run.finite[run.tensors.rows]]
    norms = np.nan_to_num(norms[run.finite[run.tensors.rows]])
    num_late = max(len(rows) // NUM_LATE, MIN_LATE)
    if len(rows) < 2 * num_late:
        return
    early, late = norms[:-num_late], norms[-num_late:]
    dead = (np.max(early, axis=0) > 0) & (np.max(late, axis=0) == 0)
    if dead.any():
        last = int(np.flatnonzero((norms[:, dead] > 0).any(axis=1))[-1])
        step = int(run.steps[rows[last + 1]])
        text = f"No gradient any more from step {step} on: {layers_in_words(layers, dead)}."
        why = "Units died or saturated there, or the parameters were frozen."
        yield Finding("vanishing", True, f"{text} {why}", [step], chosen(layers, dead))
    total = run.columns["total_norm"][rows]
    kept = np.median(total[-num_late:]) >= 100 * FADED * np.median(total[:-num_late])
    usual = np.median(early, axis=0)
    faded = (np.median(late, axis=0) <= FADED * usual) & (usual > 0) & ~dead
    if kept and faded.any():
        text = (
            f"The norm of {layers_in_words(layers, faded)} fell below a ten thousandth of what it "
            f"was: units die or saturate there."
        )
        yield Finding("vanishing", True, text, (), chosen(layers, faded))
