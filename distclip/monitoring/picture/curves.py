"""A column as a line in a picture: as it is, or as the median and the range of buckets of rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distclip.monitoring.records import Floats, Ints

MOST_POINTS = 700  # in the width of a picture, of about 1,100 pixels
# Margins of matplotlib's logarithmic scales overflow above. Float32 has no norm above 1e39.
MOST = 1e200


class Curve(NamedTuple):
    """One number per point; `low` and `high` are the range of its rows, and lose no spike."""

    steps: Floats
    low: Floats
    middle: Floats
    high: Floats
    num_rows: int  # of each point


def curve(steps: Ints, values: Floats) -> Curve:
    """A number that is not finite is a gap; one beyond `MOST` is drawn there."""
    values = np.clip(np.where(np.isfinite(values), values, np.nan), -MOST, MOST)
    if len(steps) <= 2 * MOST_POINTS:
        return Curve(steps.astype(np.float64), values, values, values, 1)
    starts = np.linspace(0, len(steps), MOST_POINTS, endpoint=False).astype(np.int64)
    ends = np.append(starts[1:], len(steps))
    low, high = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
    medians = [_median(values[i:j]) for i, j in zip(starts, ends, strict=True)]
    middle_steps = (steps[starts] + steps[ends - 1]) / 2
    return Curve(middle_steps, low, np.array(medians), high, len(steps) // MOST_POINTS)


def _median(values: Floats) -> float:
    values = values[~np.isnan(values)]
    return float(np.median(values)) if len(values) else np.nan
