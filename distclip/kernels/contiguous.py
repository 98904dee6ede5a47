"""Dense tensors as few long spans of contiguous memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import add, attrgetter
from typing import cast

from torch import Tensor


def contiguous_spans(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The elements of tensors of one dtype. Neighbours in one storage become one flat view.

    A tensor without a neighbour is returned as it is.
    """
    if _all_begin_storages(tensors):
        return list(tensors)
    return [span(tensors[run[0]], tensors[run[-1]]) for run in neighbours(tensors)]


def neighbours(tensors: Sequence[Tensor], multiple: int = 1) -> list[list[int]]:
    """The indices of tensors of one dtype; those that are neighbours in one storage together.

    Gradients are neighbours in the buffers of FSDP's reduce-scatter, in the buckets of DDP and in
    the flat buffers of Megatron and DeepSpeed. There is never a gap between them, because the
    padding in it may hold any value.

    Args:
        multiple: of so many elements are all neighbours, except the last of each list.
    """
    if _all_begin_storages(tensors):
        return [[i] for i in range(len(tensors))]
    begins = list(map(Tensor.data_ptr, tensors))
    ends = list(map(add, begins, map(attrgetter("nbytes"), tensors)))
    order = sorted(range(len(tensors)), key=begins.__getitem__)
    # Two allocations may touch by chance. Neighbours share a storage, and its first address.
    itemsize = tensors[0].itemsize
    offsets = cast("list[int]", list(map(Tensor.storage_offset, tensors)))
    storages: list[int | None] = [
        begin - itemsize * offset for begin, offset in zip(begins, offsets, strict=True)
    ]
    for i, contiguous in enumerate(map(Tensor.is_contiguous, tensors)):
        if not contiguous:
            storages[i] = None  # has no neighbour
    first_of_run = [
        position
        for position, (i, j) in enumerate(pairwise(order), 1)
        if ends[i] != begins[j]
        or storages[i] is None
        or storages[i] != storages[j]
        or (ends[i] - begins[i]) % (multiple * itemsize)
    ]
    return [order[first:end] for first, end in pairwise([0, *first_of_run, len(order)])]


def span(first: Tensor, last: Tensor) -> Tensor:
    """The first and the last of neighbours, and all between them, as a flat view."""
    if first is last:
        return first
    numel = last.storage_offset() - first.storage_offset() + last.numel()
    return first.as_strided((numel,), (1,))


def flat(tensor: Tensor) -> Tensor:
    """The elements in one contiguous dim; a view if they are dense in memory, in any order."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1).contiguous()


def grouped(tensors: Sequence[Tensor], key: Callable[[Tensor], object]) -> list[list[Tensor]]:
    """The tensors in lists for which `key` is the same, in the order of their first tensors."""
    if len(set(map(key, tensors))) == 1:
        return [list(tensors)]
    return [[t for t in tensors if key(t) == value] for value in dict.fromkeys(map(key, tensors))]


def _all_begin_storages(tensors: Sequence[Tensor]) -> bool:
    """Whether none lies behind another; usual for thousands of small tensors."""
    return not any(map(Tensor.storage_offset, tensors))
