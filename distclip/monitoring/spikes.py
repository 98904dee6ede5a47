"""Which norms are spikes: far above the usual norm of the steps around them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distclip.monitoring.records import Floats

# Steps on either side of a step, whose median is its usual norm: it follows a schedule of the
# learning rate, and a spike has to last 50 steps to become usual itself.
HALF_WINDOW = 50
# Of the logarithm, above the usual norm, as in the spike score of Team OLMo, "2 OLMo 2 Furious",
# 2024 (arXiv:2501.00656).
DEVIATIONS = 7.0
# Whatever the deviation, three times the usual norm has to be exceeded, because the batches of a
# healthy run differ by twice. And 10 times the usual norm is a spike however noisy the norms are:
# up to 10 times the average norm, thresholds worked for Pascanu, Mikolov and Bengio, 2013
# (arXiv:1211.5063), section 3.2.
LEAST_RATIO, MOST_RATIO = 3.0, 10.0
_TO_DEVIATION = 1.4826  # a normal distribution's deviation over its median absolute deviation


class Spikes(NamedTuple):
    """
    Attributes:
        usual: the median of the norms around each step; float64 [number of norms].
        ratio: a norm that exceeds the usual one by more is a spike.
        found: where the norm is one; bool [number of norms].
    """

    usual: Floats
    ratio: float
    found: NDArray[np.bool_]


def find_spikes(norms: Floats) -> Spikes:
    """The spikes among norms, which are finite, above 0 and at least one."""
    around = np.pad(norms, HALF_WINDOW, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(around, 2 * HALF_WINDOW + 1)
    usual: Floats = np.median(windows, axis=1)
    logs = np.log(norms / usual)
    deviation = _TO_DEVIATION * np.median(np.abs(logs - np.median(logs)))
    ratio = float(np.clip(np.exp(DEVIATIONS * deviation), LEAST_RATIO, MOST_RATIO))
    return Spikes(usual, ratio, norms > ratio * usual)
