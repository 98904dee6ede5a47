"""Numbers of views come to their rows by a gather, in one order, whatever the views share."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distclip.kernels import kept_indices
from distclip.norms import power_sums, unit_rows
from distclip.norms.unit_rows import RowIndexes, Rows

CPU = torch.device("cpu")
ROWS = 9
lists = st.lists(
    st.integers(0, ROWS - 1).flatmap(
        lambda i: st.builds(Rows, st.just(i), st.integers(1, ROWS - i))
    ),
    min_size=1,
    max_size=6,
).map(tuple)


def expected(rows: tuple[Rows, ...], more: Tensor, norm_type: float) -> Tensor:
    found = torch.zeros(ROWS, more.shape[1], dtype=torch.float64)
    for each, numbers in zip(rows, more.split([r.count for r in rows]), strict=True):
        part = found[each.first : each.first + each.count]
        part.copy_(torch.maximum(part, numbers) if math.isinf(norm_type) else part + numbers)
    return found


@settings(deadline=None)
@given(lists, st.sampled_from([2.0, math.inf]))
def test_gathered_as_added_one_by_one(rows: tuple[Rows, ...], norm_type: float) -> None:
    num = sum(each.count for each in rows)
    more = torch.rand(num, 2, dtype=torch.float64)
    index = RowIndexes(CPU).of_rows(rows, 0, ROWS)
    found = power_sums.gathered(more, index, norm_type)
    torch.testing.assert_close(found, expected(rows, more, norm_type), rtol=1e-14, atol=0)
    first = min(each.first for each in rows)
    some = RowIndexes(CPU).of_rows(rows, first, ROWS - first)
    assert torch.equal(power_sums.gathered(more, some, norm_type), found[first:])


@settings(deadline=None)
@given(lists)
def test_each_number_has_its_row(rows: tuple[Rows, ...]) -> None:
    index = RowIndexes(CPU).of_numbers(rows, ROWS)
    wanted = [row for each in rows for row in range(each.first, each.first + each.count)]
    assert (list(range(ROWS)) if index is None else index.tolist()) == wanted


def test_no_index_where_rows_are_in_order() -> None:
    rows = Rows(0, 4), Rows(4, 1), Rows(5, 4)
    assert RowIndexes(CPU).of_numbers(rows, ROWS) is None
    assert RowIndexes(CPU).of_rows(rows, 0, ROWS) is None
    assert RowIndexes(CPU).of_rows(rows[1:], 4, 5) is None
    assert RowIndexes(CPU).of_rows(rows[:2], 0, ROWS) is not None


def test_an_index_is_kept_for_the_sets_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[Tensor] = []
    upload = kept_indices.upload
    monkeypatch.setattr(
        kept_indices, "upload", lambda host, device: uploads.append(host) or upload(host, device)
    )
    indexes = RowIndexes(CPU)
    for _ in range(4):
        for last in (3, 5):
            indexes.of_rows((Rows(0, last),), 0, ROWS)
            indexes.of_numbers((Rows(0, last),), ROWS)
    assert len(uploads) == 4
    for last in range(1, 9):  # as many again push out the first
        indexes.of_rows((Rows(0, last),), 0, ROWS)
    assert len(indexes._kept._kept) == unit_rows._KEPT
