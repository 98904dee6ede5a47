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
    found: list[list[Tensor]] = []
    end = storage = -1
    for i in order:
        # Two allocations may touch by chance: neighbours are of one storage.
        within = tensors[i].untyped_storage().data_ptr() if tensors[i].is_contiguous() else -1
        if begins[i] == end and within == storage:
            found[-1].append(tensors[i])
        else:
            found.append([tensors[i]])
        end, storage = (ends[i], within) if within != -1 else (-1, -1)
    return [members[0] if len(members) == 1 else _joined(members) for members in found]


def flat(tensor: Tensor) -> Tensor:
    """One dim over all elements in the order of memory: a view wherever the elements lie dense."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)


def _joined(members: Sequence[Tensor]) -> Tensor:
    numel = sum(tensor.numel() for tensor in members)
    return members[0].as_strided((numel,), (1,))
