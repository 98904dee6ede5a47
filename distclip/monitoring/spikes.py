"""Which norms are spikes: far above the usual norm of the steps around them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from distclip.monitoring.records import Floats

# A spike lies seven standard deviations from a running average in the spike score of Team OLMo,
# "2 OLMo 2 Furious", 2024, arXiv:2501.00656. Here they are those of the logarithm, and robust: the
# MAD times 1.4826, as for a normal distribution.
DEVIATIONS = 7.0
# Norms that hardly vary have deviations near 0, and twice the usual norm is within what the batches
# of a healthy run differ by.
MIN_RATIO = 3.0
MIN_WINDOW, MAX_WINDOW = 15, 100  # steps on each side; a twentieth of the run between these
MIN_BEFORE = 10  # steps: what is usual shows in fewer neither at the start nor after warm-up


class Spikes(NamedTuple):
    """
    Attributes:
        usual: the usual norm of each step; float64 [number of norms].
        threshold: a norm above it is a spike; inf in the first steps.
        found: where the norm is one; bool [number of norms].
    """

    usual: Floats
    threshold: Floats
    found: NDArray[np.bool_]


def find_spikes(norms: Floats) -> Spikes:
    """The spikes among norms, which are finite and above 0.

    What is usual is the higher of two medians, before and after: a level that stays, and the fall
    of the norm in the first steps, are no spikes.
    """
    logs = np.log(norms)
    window = window_of(len(norms))
    before = medians_before(logs, window, MIN_BEFORE)
    after = medians_before(logs[::-1], window, MIN_BEFORE)[::-1]
    usual = np.fmax(before, after)
    usual = np.where(np.isnan(usual), logs, usual)
    height = np.maximum(np.log(MIN_RATIO), DEVIATIONS * _deviations(logs, window))
    with np.errstate(over="ignore"):
        threshold = np.where(np.isnan(before), np.inf, np.exp(usual + height))
    return Spikes(np.exp(usual), threshold, norms > threshold)


def window_of(num_steps: int) -> int:
    return int(np.clip(num_steps // 20, MIN_WINDOW, MAX_WINDOW))


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
    every = max(1, window // 10)  # steps near each other have much the same deviation
    windows = sliding_window_view(logs, width)[::every]
    medians = np.median(windows, axis=1, keepdims=True)
    mads = np.median(np.abs(windows - medians), axis=1)
    nearest = (np.arange(len(logs)) - width // 2 + every // 2) // every
    return 1.4826 * mads[np.clip(nearest, 0, len(mads) - 1)]
