"""Samples of gradients, which show a write that `Tensor._version` does not count.

`GradScaler.unscale_`, the collectives of `torch.distributed`, fused optimizers, `.data` and NumPy
write to a tensor without a trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter
from typing import cast

import torch
from torch import Tensor

from distclip.kernels.contiguous import flat

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
    if not is_whole(values):
        elements = elements[:: _step(values)]
    return elements.view(_BITS[values.itemsize])


def _step(values: Tensor) -> int:
    if values.ndim < 2:
        return FLAT_STEP
    row = values.numel() // values.shape[0]
    return max(1, min(STEP if row % STEP else _OTHER_STEP, row - 1))


def is_whole(values: Tensor) -> bool:
    """Whether the sample has all elements."""
    return values.numel() <= WHOLE


class Samples:
    """The samples of several tensors: as they were when they were taken, and as they are now."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._then: list[Tensor | None] = [None] * count
        # Whether a multiplication of the tensor would change the sample.
        self._shows = torch.ones(count, dtype=torch.bool, device=device)
        self.forget()

    def forget(self) -> None:
        """Keeps no tensor alive."""
        self._now: list[Tensor | None] = [None] * len(self._then)

    def has(self, i: int) -> bool:
        return self._now[i] is not None

    @torch.no_grad()
    def take(self, i: int, values: Tensor) -> None:
        """Takes the sample of `values` as they are."""
        self._now[i] = now = sample(values)
        if now is None:
            return
        then = self._then[i]
        if then is not None and _are_alike(then, now):
            then.copy_(now)  # memory of the same stream in every step
        else:
            self._then[i] = now.clone()
        if not is_whole(values):
            self._shows[i] = (now * 2).any()  # without the sign: -0 is zero

    @torch.no_grad()
    def move(self, i: int, values: Tensor) -> None:
        """From now on `values` has what was taken."""
        now, then = sample(values), self._then[i]
        fits = now is not None and then is not None and _are_alike(then, now)
        self._now[i] = now if fits else None

    def changed(self, indices: Sequence[int]) -> set[int]:
        """Which of these may have changed; all must have a sample. Waits for the device."""
        if not indices:  # fake tensors have no samples, and nothing else can be read there
            return set()
        shows = cast("list[bool]", self._shows.tolist())
        found = {i for i in indices if not shows[i]}
        now, then = self._of(indices)
        for dtype in set(map(attrgetter("dtype"), then)):
            alike = [k for k, each in enumerate(then) if each.dtype is dtype]
            if not torch.equal(
                torch.cat([now[k] for k in alike]), torch.cat([then[k] for k in alike])
            ):
                found |= {indices[k] for k in alike if not torch.equal(now[k], then[k])}
        return found

    def changed_on_device(self, indices: Sequence[int]) -> Tensor:
        """As `changed`, without a wait: a bool for each tensor, any where it has no sample."""
        now, then = self._of(indices)
        counts = [0] * len(self._then)
        for i, each in zip(indices, now, strict=True):
            counts[i] = each.numel()
        differs = torch.cat(now) != torch.cat(then)
        owners = _owners(tuple(counts), differs.device)
        found = torch.zeros(len(counts), dtype=torch.int64, device=differs.device)
        return (found.index_add_(0, owners, differs.long()) > 0) | ~self._shows

    def _of(self, indices: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        now, then = ([each[i] for i in indices] for each in (self._now, self._then))
        return cast("list[Tensor]", now), cast("list[Tensor]", then)


def _are_alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


@lru_cache(maxsize=8)
def _owners(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The index of the tensor that each element of all samples is from; uploaded once."""
    counts = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    return torch.arange(len(lengths), device="cpu").repeat_interleave(counts).to(device)
