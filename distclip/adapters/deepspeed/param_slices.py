"""Which elements of a parameter lie in a flat tensor of DeepSpeed on this rank, and where."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from distclip.sharding import FlatShard


class ParamSlice(NamedTuple):
    """The elements of one parameter that lie in one tensor of the inner optimizer.

    Attributes:
        shard: which elements, and their offset in that tensor. Its `boundaries` are empty where
            every rank holds the whole parameter.
    """

    param: Tensor
    shard: FlatShard

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the parameter. Never under ZeRO-3, where parameters are empty."""
        return not self.shard.boundaries and self.shard.numel == self.param.numel()

    def view(self, stepped: Tensor) -> Tensor:
        """This slice of a tensor that is laid out as the one that the inner optimizer steps."""
        if stepped.shape == self.shard.global_shape and self.is_whole:
            return stepped
        return self._cut(stepped if stepped.ndim == 1 else stepped.view(-1), self.shard.offset)

    def view_in(self, tensors: Sequence[Tensor], offsets: Sequence[int]) -> Tensor:
        """This slice where such a tensor consists of flat ones, which begin at `offsets`."""
        index = bisect_right(offsets, self.shard.offset) - 1
        return self._cut(tensors[index], self.shard.offset - offsets[index])

    def _cut(self, flat: Tensor, first: int) -> Tensor:
        # Thousands of slices in every step: each view takes a microsecond or more.
        numel, shape = self.shard.numel, self.shard.global_shape
        if first or flat.numel() != numel:
            flat = flat.narrow(0, first, numel)
        return flat.view(shape) if len(shape) != 1 and self.is_whole else flat


def offsets_of(params: Sequence[Tensor]) -> list[int]:
    return [0, *accumulate(p.numel() for p in params)][:-1]


def whole_slices(params: Sequence[Tensor]) -> list[ParamSlice]:
    return [
        ParamSlice(param, FlatShard(tuple(param.shape), 0, offset, param.numel(), ()))
        for param, offset in zip(params, offsets_of(params), strict=True)
    ]


def flat_slices(
    params: Sequence[Tensor], offsets: Sequence[int], size: int, group: Any
) -> list[ParamSlice]:
    """Parameters at `offsets` in a flat buffer, of which each rank holds `size` elements."""
    first = size * dist.get_rank(group)
    slices: list[ParamSlice] = []
    for param, offset in zip(params, offsets, strict=True):
        start = max(0, first - offset)
        numel = max(0, min(param.numel(), first + size - offset) - start)
        boundaries = tuple(size * rank - offset for rank in range(1, dist.get_world_size(group)))
        shape = tuple(param.shape)
        shard = FlatShard(shape, 0, 0, 0, boundaries)
        if numel:
            shard = FlatShard(shape, start, offset + start - first, numel, boundaries)
        slices.append(ParamSlice(param, shard))
    return slices


def equal_slices(params: Sequence[Any], group: Any) -> list[ParamSlice]:
    """Parameters each of which is divided among the ranks, padded to equal parts."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    slices: list[ParamSlice] = []
    offset = 0
    for param in params:
        size, start = param.partition_numel(), rank * param.partition_numel()
        numel = max(0, min(size, param.ds_numel - start))
        boundaries = tuple(size * other for other in range(1, num_ranks))
        shard = FlatShard(tuple(param.ds_shape), start if numel else 0, offset, numel, boundaries)
        slices.append(ParamSlice(param, shard))
        offset += size
    return slices
