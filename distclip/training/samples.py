"""Samples of gradients, which show a write that `Tensor._version` does not count.

`GradScaler.unscale_`, the collectives of `torch.distributed`, fused optimizers, `.data` and NumPy
write to a tensor without a trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor

from distclip.kernels.contiguous import flat
from distclip.kernels.kept_indices import KeptIndices

WHOLE = 1 << 12  # elements: tensors of so few are compared whole
# Elements from one of a sample to the next: a write to so many neighbours touches the sample. Each
# reads a line of the cache, and 1,021 float32 are 64 of them. A flat tensor may hold matrices whose
# rows are not known. Primes visit all columns of a matrix, unless they divide their number.
STEP, FLAT_STEP = 1021, 251
_OTHER_STEP = 1019

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sample(values: Tensor) -> Tensor | None:
    """Some elements as integers with the same bits, flat; a view, which shows later writes.

    All elements of a short tensor; else every `STEP`-th, but at least one of each row (index of dim
    0): rows of an embedding that no token used are zero, until a collective adds those of others.

    None where no such view exists: complex numbers, gaps between the elements, subclasses.
    """
    if type(values) is not Tensor or values.is_complex() or values.is_neg():
        return None
    elements = flat(values)
    if elements.data_ptr() != values.data_ptr():  # a copy, which shows nothing
        return None
    if values.numel() > WHOLE:
        elements = elements[:: _step(values)]
    return elements.view(_BITS[values.itemsize])


def _step(values: Tensor) -> int:
    if values.ndim < 2:
        return FLAT_STEP
    row = values.numel() // values.shape[0]
    return max(1, min(STEP if row % STEP else _OTHER_STEP, row - 1))


class Samples:
    """The samples of several tensors: as they were when they were taken, and as they are now."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._count, self._device = count, device
        self._waits = device.type == "cpu"
        # Whether a multiplication would change the sample; found in the call on an accelerator.
        self._shows = [False] * count
        self._ends = KeptIndices(device)
        self.forget()

    def forget(self) -> None:
        """Keeps no tensor alive."""
        self._now: list[Tensor | None] = [None] * self._count
        self._then = list(self._now)
        self._taken: list[Tensor] = []  # those that were taken together, in one tensor

    def has(self, i: int) -> bool:
        return self._now[i] is not None

    @torch.no_grad()
    def take(self, indices: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Takes the samples of `tensors` as they are, with one copy for each dtype."""
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i, values in zip(indices, tensors, strict=True):
            self._now[i] = now = sample(values)
            if now is not None:
                by_dtype.setdefault(now.dtype, []).append(i)
        for alike in by_dtype.values():
            now = [cast(Tensor, self._now[i]) for i in alike]
            taken = torch.cat(now)
            self._taken.append(taken)
            first = 0
            for i, each in zip(alike, now, strict=True):
                self._then[i] = then = taken[first : (first := first + each.numel())]
                if self._waits:
                    # Without the sign, because -0 is zero.
                    self._shows[i] = not then.numel() or bool((then * 2).any())

    @torch.no_grad()
    def move(self, i: int, values: Tensor) -> None:
        """From now on `values` has what was taken."""
        now, then = sample(values), self._then[i]
        fits = now is not None and then is not None and _are_alike(then, now)
        self._now[i] = now if fits else None

    def changed(self, indices: Sequence[int]) -> set[int]:
        """Which of these may have changed; all must have a sample. Waits for the device."""
        now, then = self._of(indices)
        found = {i for i in indices if not self._shows[i]}
        for dtype in set(map(attrgetter("dtype"), then)):
            alike = [k for k, each in enumerate(then) if each.dtype is dtype]
            if not torch.equal(
                torch.cat([now[k] for k in alike]), torch.cat([then[k] for k in alike])
            ):
                found |= {indices[k] for k in alike if not torch.equal(now[k], then[k])}
        return found

    def changed_on_device(self, indices: Sequence[int]) -> Tensor:
        """As `changed`, without a wait: a bool for each of `indices`."""
        self._outlive_reading()
        now, then = self._of(indices)
        differs, shows = torch.cat(now) != torch.cat(then), torch.cat(then) * 2 != 0
        counts = torch.stack([differs, shows]).cumsum(1)
        counts = torch.cat([counts.new_zeros(2, 1), counts], dim=1)
        ends = self._ends.on_device([0, *accumulate(each.numel() for each in then)])
        num_differing, num_showing = counts.index_select(1, ends).diff(dim=1)
        return (num_differing > 0) | (num_showing == 0)

    def _outlive_reading(self) -> None:
        """Samples are taken on the streams of backward, and may go while another reads them."""
        stream = current_stream(self._device)
        for taken in self._taken:
            if stream is not None and not taken.is_cpu:
                taken.record_stream(stream)

    def _of(self, indices: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        now, then = ([each[i] for i in indices] for each in (self._now, self._then))
        return cast("list[Tensor]", now), cast("list[Tensor]", then)


def current_stream(device: torch.device) -> Any:
    """What runs now on a device; None where it has no streams, as on the meta device."""
    device_module: Any = getattr(torch, device.type, None)
    if not hasattr(device_module, "current_stream"):
        return None
    return device_module.current_stream(device)


def _are_alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype
