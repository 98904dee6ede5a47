"""The named layouts that every distributed test runs over, and how to lay a whole gradient out on
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from tests.support.ranks import device_of, mesh


@dataclass(frozen=True)
class Placed:
    """One tensor of shape `shape` on the mesh `shape x axes`; no mesh: a plain tensor, equal on all
    ranks.
    """

    shape: tuple[int, ...]
    placements: tuple[Placement, ...] = ()
    mesh_shape: tuple[int, ...] = (2, 2)
    axes: tuple[str, ...] = ("dp", "tp")


R, S0, S1 = Replicate(), Shard(0), Shard(1)
EXPERTS = ("efsdp", "ep")

LAYOUTS: dict[str, list[Placed]] = {
    "plain": [Placed((6, 4)), Placed((5,)), Placed(())],
    "fsdp": [Placed((8, 3), (S0,), (4,), ("fsdp",)), Placed((4,), (S0,), (4,), ("fsdp",))],
    "fsdp uneven and empty": [
        Placed((5, 3), (S0,), (4,), ("fsdp",)),
        Placed((2,), (S0,), (4,), ("fsdp",)),
    ],
    "hsdp": [Placed((7, 3), (R, S0)), Placed((1,), (R, S0))],
    "tp": [Placed((6, 4), (R, S0)), Placed((6, 4), (R, S1)), Placed((5,), (R, R))],
    "fsdp x tp": [Placed((6, 4), (S0, S1)), Placed((4, 6), (S0, S0)), Placed((5,), (S0, R))],
    "two meshes": [
        Placed((6, 4), (S0, S1)),
        Placed((4, 5), (S0,), (4,), ("fsdp",)),
        Placed((8, 2), (S0, S0), (2, 2), EXPERTS),
        Placed((3, 2), (S1, R), (2, 2), EXPERTS),
    ],
    "beside plain": [Placed((6, 4), (S0, S1)), Placed((3, 3)), Placed((7,), (R, R)), Placed((2,))],
    "all copies": [Placed((6, 4), (R, R)), Placed((3,), (R, R))],
}

# Layouts whose elements all lie on every rank, so that nothing is reduced.
UNSHARDED = {"plain", "all copies"}


def lay_out(
    wholes: Sequence[Tensor], placed: Sequence[Placed], device: str = "cpu"
) -> list[nn.Parameter]:
    """Parameters whose gradients are `wholes`, each laid out as `placed` says. The gradients are
    clones.
    """
    return [_laid_out(whole, p, device) for whole, p in zip(wholes, placed, strict=True)]


def _laid_out(whole: Tensor, placed: Placed, device: str) -> nn.Parameter:
    whole = whole.clone().to(device_of(device))
    if not placed.placements:
        param = nn.Parameter(torch.zeros_like(whole))
        param.grad = whole
        return param
    on = mesh(placed.mesh_shape, placed.axes, device)
    # A Replicate DTensor may share its source's memory: everything is cloned.
    grad = distribute_tensor(whole, on, placed.placements, src_data_rank=None)
    param = nn.Parameter(
        distribute_tensor(torch.zeros_like(whole), on, placed.placements, src_data_rank=None)
    )
    param.grad = grad.clone()
    return param


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def random_wholes(
    placed: Sequence[Placed], seed: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(dtype) for p in placed]


def by_name(names: Sequence[str]) -> Mapping[str, list[Placed]]:
    return {name: LAYOUTS[name] for name in names}
