"""Dense tensors as few long runs of memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import add, attrgetter
from typing import cast

from torch import Tensor


def runs(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The elements of tensors of one dtype, neighbours in one storage as one tensor.

    Gradients lie side by side in what FSDP reduces and scatters, in DDP's buckets and in the flat buffers of
    Megatron and DeepSpeed. A run never reaches across a gap, whose padding may hold anything. What has no neighbour
    comes as it is.
    """
    offsets = cast("list[int]", list(map(Tensor.storage_offset, tensors)))
    if not any(offsets):  # each begins its storage, as with thousands of tensors of their own
        return list(tensors)
    begins = list(map(Tensor.data_ptr, tensors))
    ends = list(map(add, begins, map(attrgetter("nbytes"), tensors)))
    order = sorted(range(len(tensors)), key=begins.__getitem__)
    # Two allocations may touch by chance: neighbours are of one storage, which begins at one address.
    itemsize = tensors[0].itemsize
    storages: list[int | None] = [begin - itemsize * offset for begin, offset in zip(begins, offsets, strict=True)]
    for i, contiguous in enumerate(map(Tensor.is_contiguous, tensors)):
        if not contiguous:
            storages[i] = None  # has no neighbour
    touching = enumerate(pairwise(order), 1)
    cuts = [
        place for place, (i, j) in touching if ends[i] != begins[j] or storages[i] is None or storages[i] != storages[j]
    ]
    found = [order[first:end] for first, end in pairwise([0, *cuts, len(order)])]
    return [_joined(tensors[run[0]], tensors[run[-1]]) for run in found]


def flat(tensor: Tensor) -> Tensor:
    """One dim over all elements in the order of memory: a view wherever the elements lie dense."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)


def _joined(first: Tensor, last: Tensor) -> Tensor:
    if first is last:
        return first
    numel = last.storage_offset() - first.storage_offset() + last.numel()
    return first.as_strided((numel,), (1,))
