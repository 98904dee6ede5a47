"""Samples of gradients, which show a write that `Tensor._version` does not count.

`GradScaler.unscale_`, the collectives of `torch.distributed`, fused optimizers, `.data` and NumPy
write to a tensor without a trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from distclip.kernels.contiguous import flat

WHOLE = 1 << 12  # elements: gradients of so few are compared whole
# Elements from one of a sample to the next: a write to so many neighbours touches the sample. A
# prime visits all columns of a matrix, unless it divides their number: hence a second one.
STEP, _OTHER_STEP = 127, 113

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sample(values: Tensor) -> Tensor | None:
    """Some elements as integers with the same bits, flat; a view, which shows later writes.

    All elements of a short tensor; else every `STEP`-th, or one of each row where rows are shorter:
    the rows of an embedding that no token used are zero, until a collective adds those of others.

    None where no such view exists: complex numbers, or gaps between the elements.
    """
    if values.is_complex() or values.is_neg():
        return None
    elements = flat(values)
    if elements.data_ptr() != values.data_ptr():  # a copy, which shows nothing
        return None
    if not is_whole(values):
        elements = elements[:: _step(values)]
    return elements.view(_BITS[values.itemsize])


def _step(values: Tensor) -> int:
    if values.ndim < 2:
        return STEP
    row = values.numel() // values.shape[0]
    return max(1, min(STEP if row % STEP else _OTHER_STEP, row - 1))


def is_whole(values: Tensor) -> bool:
    """Whether the sample has all elements."""
    return values.numel() <= WHOLE


def any_nonzero(bits: Tensor) -> Tensor:
    """Whether a multiplication would change one of them; a bool scalar. NaN counts, -0 does not."""
    return (bits * 2).any()  # without the sign


def differ(now: Sequence[Tensor], then: Sequence[Tensor]) -> Tensor:
    """Which samples have changed; a bool for each, on their device, without a wait for it."""
    changed = torch.cat(list(now)) != torch.cat(list(then))
    owners = _owners(tuple(map(Tensor.numel, now)), changed.device)
    counts = torch.zeros(len(now), dtype=torch.int64, device=changed.device)
    return counts.index_add_(0, owners, changed.long()) > 0


def equal(now: Sequence[Tensor], then: Sequence[Tensor]) -> bool:
    """Whether none has changed. Waits for the device."""
    return not now or torch.equal(torch.cat(list(now)), torch.cat(list(then)))


@lru_cache(maxsize=8)
def _owners(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The index of the sample that each element of all samples is from; uploaded once."""
    counts = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    return torch.arange(len(lengths), device="cpu").repeat_interleave(counts).to(device)
