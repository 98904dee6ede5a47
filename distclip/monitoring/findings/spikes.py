"""Steps whose norm stands out from those around them, and the layers that led them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from distclip.monitoring.findings import MOST_STEPS, Finding, count, listed, number, percent
from distclip.monitoring.findings import steps_in_words as in_words
from distclip.monitoring.layers import layer_norms
from distclip.monitoring.records import Floats, Ints, Run

# A spike lies seven standard deviations from a running average in the spike score of Team OLMo,
# "2 OLMo 2 Furious", 2024, arXiv:2501.00656. Here they are those of the logarithm, and robust: the
# MAD times 1.4826, as for a normal distribution.
DEVIATIONS = 7.0
# Norms that hardly vary have deviations near 0, and twice the usual norm is within what the batches
# of a healthy run differ by.
MIN_RATIO = 3.0
MIN_WINDOW, MAX_WINDOW = 15, 100  # rows on each side; a twentieth of the run between these
MIN_BEFORE = 10  # rows: what is usual shows in fewer neither at the start nor after warm-up
ONE_SPIKE = 10  # rows: the optimizer's moments carry a bad gradient about that far (beta1 = 0.9)
# A layer below a hundredth of the sum of squares leads no spike, however small it was before.
MIN_SHARE = 0.01
_NUM_EXPLAINED = 3


class Spike(NamedTuple):
    """Consecutive rows that stand out; `row` is that of the largest norm."""

    row: int
    first: int
    last: int
    ratio: float  # of its norm to the usual one


class Leader(NamedTuple):
    """A layer in the row of a spike."""

    layer: str
    ratio: float
    share: float  # of the sum of squares


def find(run: Run) -> Iterator[Finding]:
    spikes = find_spikes(run)
    if not spikes:
        return
    highest = sorted(spikes, key=lambda spike: -spike.ratio)[:_NUM_EXPLAINED]
    steps: list[int] = run.steps[[spike.row for spike in spikes]].tolist()
    text = f"The norm has {count(len(spikes), 'spike')}: {in_words(steps)}."
    leaders = {spike: _leaders(run, spike, spikes) for spike in highest}
    told = [_told(run, spike, leaders[spike]) for spike in highest]
    names = [leader.layer for each in leaders.values() for leader in each]
    yield Finding(
        "spikes", True, " ".join([text, *told]), steps[:MOST_STEPS], [*dict.fromkeys(names)]
    )


def find_spikes(run: Run) -> list[Spike]:
    """In the order of their steps. What is usual is the higher of two medians, before and after.

    A level that stays, and the fall of the norm in the first steps, are no spikes.
    """
    norms = run.columns["total_norm"]
    rows = np.flatnonzero(run.finite & (norms > 0))
    if len(rows) <= MIN_BEFORE:
        return []
    logs = np.log(norms[rows])
    window = window_of(len(rows))
    before = medians_before(logs, window, MIN_BEFORE)
    after = medians_before(logs[::-1], window, MIN_BEFORE)[::-1]
    above = logs - np.fmax(before, after)
    high = above > np.maximum(np.log(MIN_RATIO), DEVIATIONS * _deviations(logs, window))
    found = np.flatnonzero(high & ~np.isnan(before))
    starts = np.flatnonzero(np.diff(found, prepend=-ONE_SPIKE - 1) > ONE_SPIKE)
    parts = np.split(found, starts[1:])
    return [_spike(rows, part, above) for part in parts if len(part)]


def _spike(rows: Ints, part: Ints, above: Floats) -> Spike:
    peak = int(part[np.argmax(above[part])])
    ratio = float(np.exp(above[peak]))
    return Spike(int(rows[peak]), int(rows[part[0]]), int(rows[part[-1]]), ratio)


def window_of(num_rows: int) -> int:
    return int(np.clip(num_rows // 20, MIN_WINDOW, MAX_WINDOW))


def medians_before(values: Floats, window: int, least: int) -> Floats:
    """The median of up to `window` values before each one; NaN where less than `least` are."""
    medians = np.full(len(values), np.nan)
    for i in range(least, min(window, len(values))):
        medians[i] = np.median(values[:i])
    if len(values) > window:
        medians[window:] = np.median(sliding_window_view(values, window)[:-1], axis=1)
    return medians


def _deviations(logs: Floats, window: int) -> Floats:
    """1.4826 × MAD of the values around each one, up to `window` on both sides."""
    width = min(2 * window + 1, len(logs))
    every = max(1, window // 10)  # rows near each other have much the same deviation
    windows = sliding_window_view(logs, width)[::every]
    medians = np.median(windows, axis=1, keepdims=True)
    mads = np.median(np.abs(windows - medians), axis=1)
    nearest = (np.arange(len(logs)) - width // 2 + every // 2) // every
    return 1.4826 * mads[np.clip(nearest, 0, len(mads) - 1)]


def _leaders(run: Run, spike: Spike, spikes: Sequence[Spike]) -> list[Leader]:
    """The layers by how much their norm rose over their own usual one; [] without their norms."""
    index = np.flatnonzero(run.tensors.rows == spike.row)
    if len(index) == 0:
        return []
    layers, norms = layer_norms(run)
    quiet = run.finite[run.tensors.rows] & ~inside(run.tensors.rows, spikes)
    near = np.argsort(np.abs(run.tensors.rows - spike.row), kind="stable")
    near = near[quiet[near]][: 2 * window_of(len(run.steps))]
    at, squares = norms[index[0]], np.nan_to_num(norms[index[0]]) ** 2
    usual = np.nanmedian(norms[near], axis=0) if len(near) else np.full(len(layers), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios, shares = at / usual, squares / squares.sum()
    order = np.argsort(-np.where(shares >= MIN_SHARE, np.nan_to_num(ratios), -1.0))
    return [
        Leader(layers[k], float(ratios[k]), float(shares[k]))
        for k in order
        if shares[k] >= MIN_SHARE and ratios[k] >= MIN_RATIO
    ]


def inside(rows: Ints, spikes: Sequence[Spike]) -> NDArray[np.bool_]:
    inside = np.zeros(len(rows), dtype=bool)
    for spike in spikes:
        inside |= (rows >= spike.first) & (rows <= spike.last)
    return inside


def _told(run: Run, spike: Spike, leaders: Sequence[Leader]) -> str:
    norm = number(float(run.columns["total_norm"][spike.row]))
    text = f"In step {run.steps[spike.row]} it was {norm}, {number(spike.ratio)} times the usual"
    if leaders:
        first, others = leaders[0], [leader.layer for leader in leaders[1:]]
        rose = (
            "usually 0" if np.isinf(first.ratio) else f"{number(first.ratio)} times its own usual"
        )
        with_others = f", and {listed(others)}" if others else ""
        share = percent(first.share)
        text += f", led by layer {first.layer} ({rose}, {share} of the sum of squares){with_others}"
    elif len(run.tensors.rows) and spike.row not in run.tensors.rows:
        text += "; this step has no tensor norms"
    return f"{text}."
