"""Steps whose norm stands out from those around them, and the layers that led them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distclip.monitoring.findings import MOST_STEPS, Finding, count, listed, number, percent
from distclip.monitoring.findings import steps_in_words as in_words
from distclip.monitoring.layers import layer_norms
from distclip.monitoring.records import Floats, Ints, Run
from distclip.monitoring.spikes import MIN_RATIO, find_spikes, window_of

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
    found = spikes_of(run)
    if not found:
        return
    highest = sorted(found, key=lambda spike: -spike.ratio)[:_NUM_EXPLAINED]
    steps: list[int] = run.steps[[spike.row for spike in found]].tolist()
    text = f"The norm has {count(len(found), 'spike')}: {in_words(steps)}."
    leaders = {spike: _leaders(run, spike, found) for spike in highest}
    described = [_described(run, spike, leaders[spike]) for spike in highest]
    names = [leader.layer for each in leaders.values() for leader in each]
    yield Finding(
        "spikes", True, " ".join([text, *described]), steps[:MOST_STEPS], [*dict.fromkeys(names)]
    )


def spikes_of(run: Run) -> list[Spike]:
    """In the order of their steps; steps near each other are one spike."""
    norms = run.columns["total_norm"]
    rows = np.flatnonzero(run.finite & (norms > 0))
    if len(rows) == 0:
        return []
    usual, _, high = find_spikes(norms[rows])
    found = np.flatnonzero(high)
    starts = np.flatnonzero(np.diff(found, prepend=-ONE_SPIKE - 1) > ONE_SPIKE)
    parts = np.split(found, starts[1:])
    return [_spike(rows, part, norms[rows] / usual) for part in parts if len(part)]


def _spike(rows: Ints, part: Ints, ratios: Floats) -> Spike:
    peak = int(part[np.argmax(ratios[part])])
    return Spike(int(rows[peak]), int(rows[part[0]]), int(rows[part[-1]]), float(ratios[peak]))


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


def _described(run: Run, spike: Spike, leaders: Sequence[Leader]) -> str:
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
