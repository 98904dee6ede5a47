"""Fewer points, and no spike is lost."""

from __future__ import annotations

import numpy as np
import pytest

from distclip.monitoring.thinning import cells, rows_that_show, shares, spans

NAN = np.nan


@pytest.mark.parametrize("row", [0, 1, 4_321, 9_998, 9_999])
@pytest.mark.parametrize("value", [1e9, -1e9])
def test_a_spike_in_any_column_keeps_its_row(row: int, value: float) -> None:
    columns = list(np.random.default_rng(0).standard_normal((2, 10_000)))
    columns[1][row] = value
    columns[0][5_000:6_000] = NAN
    columns[0][5_500] = 1.0
    rows = rows_that_show(columns, 100)
    assert row in rows
    assert 5_500 in rows
    assert list(rows) == sorted({*rows.tolist()})
    assert 200 < len(rows) <= 400
    found = columns[1][rows]
    for start in range(0, 10_000, 100):
        bucket, kept = columns[1][start : start + 100], found[rows // 100 == start // 100]
        assert (bucket.min(), bucket.max()) == (kept.min(), kept.max())


def test_few_rows_are_all_kept() -> None:
    assert list(rows_that_show([np.zeros(7)], 4)) == [*range(7)]
    assert len(rows_that_show([np.full(9, NAN)], 4)) == 4  # one each, as a gap


def test_spans() -> None:
    flags = np.array([1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1], dtype=bool)
    assert spans(flags, 3) == [(0, 0, 1), (4, 5, 2), (11, 11, 1)]
    assert spans(flags, 2) == [(0, 5, 3), (11, 11, 1)]
    assert spans(flags, 1) == [(0, 11, 4)]
    assert spans(~flags & flags, 3) == []
    assert spans(flags | ~flags, 3) == [(0, 11, 12)]


def test_shares() -> None:
    generator = np.random.default_rng(0)
    flags, counted = generator.random((2, 1_003)) < 0.3
    counted[500:540] = False
    found = shares(flags, counted, num_buckets=100, fewest_rows=5)
    assert 95 <= len(found.share) <= 97  # 500 to 540 has no bar
    assert (found.first[0], found.last[-1]) == (0, 1_002)
    for first, last, share in zip(*found, strict=True):
        rows = slice(first, last + 1)
        assert share == pytest.approx(flags[rows][counted[rows]].mean())
    assert shares(flags[:3], flags[:3] | True, 100, 5).share.tolist() == [flags[:3].mean()]


def test_steps_at_equal_distances_have_a_cell_each() -> None:
    steps, values = np.arange(100, 2_100, 100), np.random.default_rng(0).random((20, 3))
    found = cells(steps, values, 400)
    assert (found.left, found.right) == (99.5, 2_099.5)
    assert np.array_equal(found.values, values.T)
    assert np.array_equal(steps[found.rows], [steps] * 3)


def test_a_value_holds_until_the_next() -> None:
    found = cells(np.array([1, 2, 6]), np.array([[1.0], [2.0], [3.0]]), 400)
    assert found.values[0, :6].tolist() == [1, 2, 2, 2, 2, 3]
    assert found.rows[0, :6].tolist() == [0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e9, np.inf, NAN])
def test_a_cell_has_the_value_that_stands_out(value: float) -> None:
    values = np.exp(0.1 * np.random.default_rng(0).standard_normal((1_000, 2)))
    values[537, 1] = value
    found = cells(np.arange(1_000), values, 50)
    assert found.values.shape == (2, 50)
    assert found.values[1, 26] == pytest.approx(value, nan_ok=True)
    assert found.rows[1, 26] == 537
    assert 0.5 < found.values[0].min() < found.values[0].max() < 2


def test_one_row() -> None:
    found = cells(np.array([7]), np.array([[2.0, NAN]]), 50)
    assert found.values.shape == (2, 1)
    assert (found.left, found.right) == (6.5, 7.5)
