"""Which rows of a group's units the numbers of a list of views belong to, as indexes on the device.

The host builds no index of all units: it uploads a few numbers per view, without a wait for the
device. Numbers are gathered, never scattered: the result has the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.kernels.kept_indices import KeptIndices

_KEPT = 8  # indexes: of gradients and of weights, and of a few sets of each that take turns


class Rows(NamedTuple):
    """The rows of one view: `first` to `first + count`."""

    first: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]


class RowIndexes:
    """Indexes for lists of `Rows`; those of the latest lists are kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept = KeptIndices(device, _KEPT)

    def uploaded(self, members: tuple[int, ...], make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns about these parameters, on the device."""
        return self._kept.get(members, lambda: self._kept.upload(make()))

    def of_numbers(self, rows: tuple[Rows, ...], num_rows: int) -> Tensor | None:
        """The row of each number, [number of numbers]; None if it is all rows in order."""
        if _is_all_in_order(rows, 0, num_rows):
            return None
        return self._kept.get(rows, lambda: self._uploaded(_shifts_to_rows(rows)))

    def of_rows(self, rows: tuple[Rows, ...], first: int, num_rows: int) -> Tensor | None:
        """For `num_rows` rows from `first`, the indices of their numbers.

        A row that several views hold elements of has a number in each. Where it has fewer than
        others, the index is the number of all numbers.

        Shapes: [most numbers of a row, num_rows]. None if each row has one number, in order.
        """
        if _is_all_in_order(rows, first, num_rows):
            return None

        def make() -> Tensor:
            num_numbers = sum(each.count for each in rows)
            shifts = _shifts_to_numbers(rows, first, num_rows)
            return self._uploaded(shifts).clamp_(max=num_numbers).view(-1, num_rows)

        return self._kept.get((rows, first, num_rows), make)

    def _uploaded(self, shifts: list[tuple[int, int]]) -> Tensor:
        """0, 1, 2, ... plus a shift for each run of so many of them. shifts: (count, shift)."""
        host = torch.tensor(shifts, dtype=torch.int64, device="cpu").t().contiguous()
        num = sum(count for count, _ in shifts)
        counts, shift = self._kept.upload(host).unbind()
        shift = shift.repeat_interleave(counts, output_size=num)
        return shift.add_(torch.arange(num, device=self._device))


def _is_all_in_order(rows: Sequence[Rows], first: int, num_rows: int) -> bool:
    end = first
    for each in rows:
        if each.first != end:
            return False
        end += each.count
    return end == first + num_rows


def _shifts_to_rows(rows: Sequence[Rows]) -> list[tuple[int, int]]:
    shifts: list[tuple[int, int]] = []
    position = 0
    for first, count in rows:
        shifts.append((count, first - position))
        position += count
    return shifts


def _shifts_to_numbers(rows: Sequence[Rows], first: int, num_rows: int) -> list[tuple[int, int]]:
    """From positions in layers of `num_rows` to the numbers there; beyond all where none is."""
    nothing = sum(each.count for each in rows) + num_rows * len(rows)
    shifts: list[tuple[int, int]] = []
    position = 0
    for layer in _layers(rows):
        end = first
        for (begin, count), number in layer:
            shifts.append((begin - end, nothing))
            position += begin - end
            shifts.append((count, number - position))
            position += count
            end = begin + count
        shifts.append((first + num_rows - end, nothing))
        position += first + num_rows - end
    return shifts


def _layers(rows: Sequence[Rows]) -> list[list[tuple[Rows, int]]]:
    """The rows in layers in which none repeats, ascending, each with the index of its first number.

    The flat pieces of one tensor may share rows: the parts of a cut row and the rows between them
    all have elements in its columns.
    """
    starts: list[int] = []
    position = 0
    for each in rows:
        starts.append(position)
        position += each.count
    layers: list[list[tuple[Rows, int]]] = []
    ends: list[int] = []
    for i in sorted(range(len(rows)), key=rows.__getitem__):
        if not rows[i].count:
            continue
        layer = next((n for n, end in enumerate(ends) if end <= rows[i].first), len(ends))
        if layer == len(ends):
            layers.append([])
            ends.append(0)
        layers[layer].append((rows[i], starts[i]))
        ends[layer] = rows[i].first + rows[i].count
    return layers
