"""A loss that fell, rose, stayed, or became NaN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from distclip.monitoring.findings import MOST_STEPS, Finding, number
from distclip.monitoring.findings import steps_in_words as in_words
from distclip.monitoring.records import Floats, Ints, Run

NUM_PARTS = 10  # of the run: the median of the first is compared with that of the last
# Standard errors: three are chance in one of 400 runs.
CERTAIN = 3.0
MIN_CHANGE = 0.01  # of the loss: less is of no use, however certain
MIN_ROWS = 20  # fewer have no trend
MIN_STAYED = 100  # steps: warm-up may take as long
NUM_LAST = 10  # losses at the end, whose mean is the last loss
HALF_LOST = 0.5  # of what the loss had fallen by


class _Part(NamedTuple):
    median: float
    error: float  # its standard error


def loss_name(run: Run) -> str | None:
    """The column "loss", else the first whose name ends so, such as "train_loss"."""
    ends = [name for name in run.columns if name.lower().endswith("loss")]
    return "loss" if "loss" in run.columns else next(iter(ends), None)


def nonfinite_losses(run: Run, losses: Floats) -> Ints:
    """The rows in which the loss was not finite.

    NaN stands for a row without a loss too. A NaN loss makes the norm NaN: others are such rows.
    """
    in_all_rows = np.isnan(losses[run.finite]).sum() <= 0.1 * run.finite.sum()
    is_nan = np.isnan(losses) & ~run.finite & in_all_rows
    return np.flatnonzero(np.isinf(losses) | is_nan)


def last_loss(losses: Floats) -> float:
    """Mean of the last ten; NaN where the run ended with losses that were not finite."""
    logged = np.flatnonzero(np.isfinite(losses))
    if len(logged) == 0 or np.isinf(losses[logged[-1] :]).any():
        return np.nan
    strides = np.diff(logged)
    usual = int(np.median(strides)) if len(strides) else 1
    if len(losses) - 1 - logged[-1] >= 2 * usual:
        return np.nan
    return float(losses[logged[-NUM_LAST:]].mean())


def find(run: Run) -> Iterator[Finding]:
    name = loss_name(run)
    if name is None:
        text = "No loss was recorded: `history.append(report, loss=loss.detach())` adds it."
        yield Finding("no-loss", False, text)
        return
    losses = run.columns[name]
    rows = nonfinite_losses(run, losses)
    if len(rows):
        steps: list[int] = run.steps[rows].tolist()
        text = f"The loss was not finite in {in_words(steps)}."
        yield Finding("loss", True, text, steps[:MOST_STEPS])
    has = np.flatnonzero(np.isfinite(losses))
    if len(has) >= MIN_ROWS:
        yield _trend(run, has, losses[has])


def _trend(run: Run, rows: Ints, losses: Floats) -> Finding:
    parts = [_part(part) for part in np.array_split(losses, NUM_PARTS)]
    first, last = parts[0], parts[-1]
    low = min(parts, key=lambda part: part.median)
    here = f"{number(last.median)} at the end, from {number(first.median)} at the start"
    if _is_higher(last, first):
        return Finding("loss", True, f"The loss rose: {here}.")
    regained = (last.median - low.median) >= HALF_LOST * (first.median - low.median)
    if _is_higher(first, low) and _is_higher(last, low) and regained:
        step = int(run.steps[rows[losses.argmin()]])
        text = f"The loss fell to {number(low.median)} around step {step} and rose again: {here}."
        return Finding("loss", True, text, [step])
    if _is_higher(first, last):
        return Finding("loss", False, f"The loss fell: {here}.")
    text = f"The loss did not change beyond its noise: {here}."
    return Finding("loss", len(rows) >= MIN_STAYED, text)


def _part(losses: Floats) -> _Part:
    """Differences of neighbours have the noise of the loss, and not its trend."""
    median = float(np.median(losses))
    if len(losses) < 2:
        return _Part(median, 0.0)
    noise = 1.4826 * float(np.median(np.abs(np.diff(losses)))) / np.sqrt(2)
    return _Part(median, 1.25 * noise / np.sqrt(len(losses)))


def _is_higher(one: _Part, other: _Part) -> bool:
    """By more than chance, and by more than nothing."""
    least = MIN_CHANGE * max(abs(one.median), abs(other.median))
    return one.median - other.median > max(CERTAIN * np.hypot(one.error, other.error), least)
