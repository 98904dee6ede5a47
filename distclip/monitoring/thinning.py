"""Fewer points that show what all of them would: no spike and no dip is lost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distclip.monitoring.records import Floats, Ints


def rows_that_show(columns: Sequence[Floats], num_buckets: int) -> Ints:
    """The rows with the smallest and the largest number of each column in each bucket, in order.

    All rows where they are no more than two per bucket and column. A bucket in which a column has
    no finite number keeps one of its rows.
    """
    num_rows = len(columns[0])
    if num_rows <= 2 * num_buckets * len(columns):
        return np.arange(num_rows)
    rows: set[int] = set()
    for start, end in _buckets(num_rows, num_buckets):
        for column in columns:
            part = column[start:end]
            finite = np.isfinite(part)
            rows.add(start + int(np.argmin(np.where(finite, part, np.inf))))
            rows.add(start + int(np.argmax(np.where(finite, part, -np.inf))))
    return np.array(sorted(rows), dtype=np.int64)


class Span(NamedTuple):
    """The rows from `first` to `last`; `num` of them have the flag."""

    first: int
    last: int
    num: int


def spans(flags: NDArray[np.bool_], most: int) -> list[Span]:
    """The rows whose flag is set, as at most `most` spans: those that are near become one."""
    rows, gap = np.flatnonzero(flags), 1
    found = np.split(rows, np.flatnonzero(np.diff(rows) > gap) + 1)
    while len(found) > most:
        gap *= 2
        found = np.split(rows, np.flatnonzero(np.diff(rows) > gap) + 1)
    return [Span(int(each[0]), int(each[-1]), len(each)) for each in found if len(each)]


class Shares(NamedTuple):
    """Of how many rows a flag is set, by bucket; arrays [number of buckets]."""

    first: Ints
    last: Ints
    share: Floats


def shares(
    flags: NDArray[np.bool_], counted: NDArray[np.bool_], num_buckets: int, fewest_rows: int
) -> Shares:
    """Of the rows that are counted, in buckets of at least `fewest_rows` rows, or one of all.

    Buckets without such a row are left out.
    """
    num_buckets = max(1, min(num_buckets, len(flags) // fewest_rows))
    buckets = _buckets(len(flags), num_buckets)
    starts = np.array([start for start, _ in buckets])
    ends = np.array([end for _, end in buckets])
    num_set = np.add.reduceat(flags & counted, starts, dtype=np.int64)
    num_counted = np.add.reduceat(counted, starts, dtype=np.int64)
    there = num_counted > 0
    return Shares(starts[there], ends[there] - 1, num_set[there] / num_counted[there])


class Cells(NamedTuple):
    """A grid over steps: each cell has a number, and the step that it is from.

    Attributes:
        left, right: the edges of the grid, in steps.
        values: [number of columns of `values`, number of cells].
        rows: of the same shape; where each value stood.
    """

    left: float
    right: float
    values: Floats
    rows: Ints


def cells(steps: Ints, values: Floats, most: int) -> Cells:
    """Values [number of steps, number of columns] in at most `most` cells of the same width.

    A cell has the value of its steps that is the farthest from the column's median, as a factor; a
    value that is not finite is farther. A cell without a step has the value of the step before.
    """
    gaps = np.diff(steps)
    width = int(gaps.min()) if len(gaps) else 1
    left = float(steps[0]) - 0.5
    last_width = float(np.median(gaps)) if len(gaps) else 1.0
    right = float(steps[-1]) - 0.5 + last_width
    number = max(1, min(most, round((right - left) / width)))
    ends = np.searchsorted(steps, np.linspace(left, right, number + 1)[1:])
    starts = np.concatenate([[0], ends[:-1]])
    starts = np.where(starts == ends, np.maximum(ends - 1, 0), starts)
    distances, num_columns = _distances(values), int(values.shape[1])
    kept, rows = np.zeros((num_columns, number)), np.zeros((num_columns, number), dtype=np.int64)
    for i, (start, end) in enumerate(zip(starts, np.maximum(ends, starts + 1), strict=True)):
        rows[:, i] = start + np.argmax(distances[start:end], axis=0)
        kept[:, i] = values[rows[:, i], range(num_columns)]
    return Cells(left, right, kept, rows)


def _distances(values: Floats) -> Floats:
    """How far each value is from the median of its column, in powers."""
    with np.errstate(divide="ignore", invalid="ignore"):
        powers = np.log(np.where(np.isfinite(values), values, np.nan))
    known = np.where(np.isfinite(powers), powers, np.nan)
    empty = np.isnan(known).all(axis=0)
    medians = np.zeros(values.shape[1])
    medians[~empty] = np.nanmedian(known[:, ~empty], axis=0)
    return np.nan_to_num(np.abs(known - medians), nan=np.inf)


def _buckets(num_rows: int, number: int) -> list[tuple[int, int]]:
    edges = [num_rows * i // number for i in range(number + 1)]
    return list(pairwise(edges))
