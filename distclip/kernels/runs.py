"""Dense tensors as few long runs of memory."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add, attrgetter

from torch import Tensor


def runs(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The elements of tensors of one dtype, neighbours in one storage as one tensor.

    Gradients lie side by side in what FSDP reduces and scatters, in DDP's buckets and in the flat buffers of
    Megatron and DeepSpeed. A run never reaches across a gap, whose padding may hold anything. What has no neighbour
    comes as it is; empty tensors may be left out.
    """
    begins = list(map(Tensor.data_ptr, tensors))
    ends = list(map(add, begins, map(attrgetter("nbytes"), tensors)))
    if set(begins).isdisjoint(ends):  # nothing touches, as with thousands of tensors of their own
        return list(tensors)
    order = sorted((i for i in range(len(tensors)) if ends[i] > begins[i]), key=begins.__getitem__)
    itemsize = tensors[0].itemsize
    found: list[list[Tensor]] = []
    end = storage = -1
    for i in order:
        tensor, begin = tensors[i], begins[i]
        # Two allocations may touch by chance: neighbours are of one storage, which begins at one address.
        within = begin - tensor.storage_offset() * itemsize if tensor.is_contiguous() else -1
        if begin == end and within == storage:
            found[-1].append(tensor)
        else:
            found.append([tensor])
        end, storage = (ends[i], within) if within != -1 else (-1, -1)
    return [members[0] if len(members) == 1 else _joined(members) for members in found]


def flat(tensor: Tensor) -> Tensor:
    """One dim over all elements in the order of memory: a view wherever the elements lie dense."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)


def _joined(members: Sequence[Tensor]) -> Tensor:
    first, last = members[0], members[-1]
    numel = last.storage_offset() - first.storage_offset() + last.numel()
    return first.as_strided((numel,), (1,))
