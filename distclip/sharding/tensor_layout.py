"""What the reader of one kind of tensor returns: the shards on this rank, and its mesh axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distclip.sharding.shard import ParamShard


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """How a tensor lies on ranks, as far as the tensor itself or its wrapper says.

    Attributes:
        shards: the tensors of the model that it holds elements of: several in a flat parameter,
            else one.
        ranks_by_axis: for each axis of the tensor's own mesh, the ranks along it through this one.
            Empty for a plain tensor, and on a rank that is not on the mesh.
        sharded: the axes whose ranks hold different elements.
        device: where the collectives of these ranks run, with an index where it is known; offloaded
            parameters lie elsewhere. None without axes.
        mesh: the DeviceMesh that it lies on, where one was recorded.
    """

    shards: tuple[ParamShard, ...]
    ranks_by_axis: Mapping[str, list[int]]
    sharded: frozenset[str]
    device: torch.device | None
    mesh: DeviceMesh | None = None

    @classmethod
    def without_mesh(cls, shard: ParamShard) -> TensorLayout:
        return cls((shard,), {}, frozenset(), None)


# Returns None for a tensor that it does not recognise.
ParamReader: TypeAlias = Callable[[str, Tensor], TensorLayout | None]
# A wrapper that keeps its layout on modules looks for it in those that the user passed.
MakeReader: TypeAlias = Callable[[Sequence[nn.Module]], ParamReader]
