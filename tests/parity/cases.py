"""A small model, its steps, layouts, and ways to clip that are right or wrong in one respect.

Module-level, because the ranks import them.
"""

from __future__ import annotations

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import distclip
from tests.support.ranks import mesh

CPU = torch.device("cpu")


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2))


def batch(index: int, rows: int = 8) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(index))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (10 * model(x.to(next(model.parameters()).dtype)) - 5).square().mean()


def step(model: nn.Module, rank: int, world_size: int) -> Tensor:
    return loss_of(model, batch(0).chunk(world_size)[rank])


def second_step(model: nn.Module, rank: int, world_size: int) -> None:
    """Calls backward itself."""
    (7 * loss_of(model, batch(1).chunk(world_size)[rank])).backward()


def same_batch(model: nn.Module, rank: int, world_size: int) -> Tensor:
    return loss_of(model, batch(0))


def no_gradients(model: nn.Module, rank: int, world_size: int) -> None:
    """Forgets backward."""
    loss_of(model, batch(0))


def only_whole(model: nn.Module, rank: int, world_size: int) -> Tensor | None:
    return None if dist.is_initialized() else step(model, rank, world_size)


# Layouts ------------------------------------------------------------------------------------------


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: nn.Module) -> nn.Module:
    fully_shard(model[0])
    return fully_shard(model)


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=CPU)


def fsdp1_originals(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=CPU, use_orig_params=True)


def tensor_parallel(model: nn.Module) -> nn.Module:
    """DTensors beside a plain LayerNorm."""
    columns = ColwiseParallel(output_layouts=Replicate())
    plan = {"0": columns, "3": columns}
    return parallelize_module(model, mesh((dist.get_world_size(),), ("tp",)), plan)


def unsynced(model: nn.Module) -> nn.Module:
    """Data parallelism that forgets its all-reduce."""
    return model


def nothing(model: nn.Module) -> None:
    """Forgets to return."""


def no_module(model: nn.Module) -> list[nn.Module]:
    return [model]


def raises(model: nn.Module) -> nn.Module:
    raise KeyError("no such layout")


def in_bfloat16(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model.to(torch.bfloat16))


# Ways to clip -------------------------------------------------------------------------------------


def local_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Each rank its own shard: what torch does with a list of FSDP1 parameters."""
    return nn.utils.clip_grad_norm_([p for p in model.parameters() if p.numel()], max_norm)


def of_local_shards(model: nn.Module, max_norm: float) -> float:
    norms = [p.grad.to_local().norm() for p in model.parameters()]
    norm = torch.stack(norms).norm()
    for p in model.parameters():
        p.grad.to_local().mul_((max_norm / norm).clamp(max=1))
    return float(norm)


def not_clipping(model: nn.Module, max_norm: float) -> Tensor:
    return distclip.clip_grad_norm_(model, float("inf"))


def one_parameter_less(model: nn.Module, max_norm: float) -> Tensor:
    kept = next(model.parameters()).grad.clone()
    norm = distclip.clip_grad_norm_(model, max_norm)
    next(model.parameters()).grad.copy_(kept)
    return norm


def always_scaling(model: nn.Module, max_norm: float) -> Tensor:
    """Without the min(1, ...): wrong only where there is nothing to clip."""
    norm = distclip.clip_grad_norm_(model, float("inf"))
    for p in model.parameters():
        p.grad.mul_(max_norm / norm)
    return norm


def blind_on_rank_0(model: nn.Module, max_norm: float) -> float:
    norm = float(distclip.clip_grad_norm_(model, max_norm))
    return 1.0 if dist.get_rank() == 0 and math.isnan(norm) else norm


def scaled_on_rank_1(model: nn.Module, max_norm: float) -> Tensor:
    norm = distclip.clip_grad_norm_(model, max_norm)
    if dist.get_rank() == 1:
        next(model.parameters()).grad.mul_(1 + 2**-20)
    return norm


def raising_on_rank_1(model: nn.Module, max_norm: float) -> Tensor:
    if dist.get_rank() == 1:
        raise RuntimeError("expected a mesh\nand more")
    return distclip.clip_grad_norm_(model, max_norm)


def leaving_rank_1_out(model: nn.Module, max_norm: float) -> Tensor:
    if dist.get_rank() == 1:
        return torch.tensor(1.0)
    dist.all_reduce(norm := torch.zeros(()))
    return norm


def ending_rank_1(model: nn.Module, max_norm: float) -> float:
    if dist.get_rank() == 1:
        import os

        os._exit(3)
    time.sleep(100)
    return 0.0


def raising_if_nonfinite(model: nn.Module, max_norm: float) -> Tensor:
    return distclip.clip_grad_norm_(model, max_norm, error_if_nonfinite=True)


def clamp(model: nn.Module, max_norm: float) -> None:
    distclip.clip_grad_value_(model, max_norm / 4)


def clamped(gradients: dict[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    return {name: grad.clamp(-max_norm / 4, max_norm / 4) for name, grad in gradients.items()}


def moved(model: nn.Module) -> dict[str, Tensor]:
    """Of a framework that keeps gradients elsewhere: by whole names."""
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
