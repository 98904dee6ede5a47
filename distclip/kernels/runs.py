"""Dense tensors as few long runs of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import add, attrgetter

from torch import Tensor


def runs(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The elements of tensors, neighbours in one storage as one tensor.

    Gradients lie side by side in what FSDP reduces and scatters, in DDP's buckets and in the flat buffers of
    Megatron and DeepSpeed. A run never reaches across a gap, whose padding may hold anything. What has no neighbour
    comes as it is; empty tensors may be left out.
    """
    begins = list(map(Tensor.data_ptr, tensors))
    ends = list(map(add, begins, map(attrgetter("nbytes"), tensors)))
    if set(begins).isdisjoint(ends):  # nothing touches, as with thousands of tensors of their own
        return list(tensors)
    order = sorted((i for i in range(len(tensors)) if ends[i] > begins[i]), key=begins.__getitem__)
    return [members[0] if len(members) == 1 else _joined(members) for members in _neighbours(tensors, order)]


def flat(tensor: Tensor) -> Tensor:
    """One dim over all elements in the order of memory: a view wherever the elements lie dense."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)


def _neighbours(tensors: Sequence[Tensor], order: Sequence[int]) -> Iterator[list[Tensor]]:
    members: list[Tensor] = []
    for tensor in (tensors[i] for i in order):
        if members and _continues(members[-1], tensor):
            members.append(tensor)
        else:
            if members:
                yield members
            members = [tensor]
    if members:
        yield members


def _continues(before: Tensor, tensor: Tensor) -> bool:
    return (
        before.data_ptr() + before.nbytes == tensor.data_ptr()
        and before.is_contiguous()
        and tensor.is_contiguous()
        and before.dtype == tensor.dtype
        # Two allocations may touch by chance.
        and before.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    )


def _joined(members: Sequence[Tensor]) -> Tensor:
    numel = sum(tensor.numel() for tensor in members)
    return members[0].as_strided((numel,), (1,))
