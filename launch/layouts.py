"""Spreads a whole model over the ranks; only this module and `trainers` know the layouts."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Wrapped:
    """A model spread over the ranks, and which share of every batch this rank takes.

    The forward pass runs under `autocast`, which does nothing where FSDP or DeepSpeed casts.
    """

    model: nn.Module
    data_rank: int
    num_data_ranks: int
    autocast: AbstractContextManager[object]


def wrap(model: nn.Module, layout: str, precision: str, device: torch.device) -> Wrapped:
    """The model on `device` under `layout`; still whole for zero1 to zero3, whose engine shards it.

    Collective: every rank must call it, with the same model.
    """
    model, dtype = model.to(device), DTYPES[precision]
    if layout not in WRAPPERS:
        return Wrapped(model, dist.get_rank(), dist.get_world_size(), nullcontext())
    mesh = _mesh(layout, device)
    wrapped = WRAPPERS[layout](model, mesh, dtype)
    cast = layout in ("ddp", "tp") and dtype != torch.float32
    # The ranks of a tp axis work on one batch together; along other axes each has its own share.
    num_together = mesh["tp"].size() if "tp" in (mesh.mesh_dim_names or ()) else 1
    return Wrapped(
        wrapped,
        data_rank=dist.get_rank() // num_together,
        num_data_ranks=dist.get_world_size() // num_together,
        autocast=torch.autocast(device.type, dtype) if cast else nullcontext(),
    )


def _mesh(layout: str, device: torch.device) -> DeviceMesh:
    """All ranks; tp is the last axis, because its ranks should be on one machine."""
    size = dist.get_world_size()
    shape, names = {
        "hsdp": ((2, size // 2), ("replicate", "shard")),
        "tp": ((size,), ("tp",)),
        "fsdp2+tp": ((size // 2, 2), ("dp", "tp")),
    }.get(layout, ((size,), ("dp",)))
    return init_device_mesh(device.type, shape, mesh_dim_names=names)


def _ddp(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> nn.Module:
    """DDP, after one backward pass whose gradients are thrown away.

    After its first backward pass DDP regroups its buckets, and with more than two ranks the offset
    in a bucket decides the order in which gloo and NCCL add. Otherwise the first step after a
    resume would add in another order than the same step of an undisturbed run, and the losses would
    differ in their last bits.
    """
    wrapped = DistributedDataParallel(model, device_mesh=mesh)
    tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    wrapped(tokens).sum().backward()
    wrapped.zero_grad(set_to_none=True)
    return wrapped


def _fsdp1(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> nn.Module:
    mixed = MixedPrecision(param_dtype=dtype, reduce_dtype=torch.float32)
    with warnings.catch_warnings():
        # With one rank there is nothing to shard, as --nproc-per-node=1 asks for.
        warnings.filterwarnings("ignore", message=".*switching to use `NO_SHARD`.*")
        return FullyShardedDataParallel(
            model,
            device_mesh=mesh,
            auto_wrap_policy=ModuleWrapPolicy({type(block) for block in model.blocks}),  # type: ignore
            mixed_precision=mixed if dtype != torch.float32 else None,
            device_id=next(model.parameters()).device,
        )


def _fsdp2(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> nn.Module:
    # torch warns of in-place writes to what a sharded module returns; nothing writes to it here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    policy = mixed if dtype != torch.float32 else MixedPrecisionPolicy()
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def _fsdp2_tp(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> nn.Module:
    return _fsdp2(_tp(model, mesh["tp"], dtype), mesh["dp"], dtype)


def _tp(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> nn.Module:
    """Layers sharded by columns and rows, with the sequence split between them.

    Only the embedding and the head of an LSTM are sharded, because cuDNN and oneDNN take the LSTM's
    own weights as one.
    """
    if isinstance(model.blocks[0], nn.LSTM):  # type: ignore[index]
        embed = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
        head = ColwiseParallel(output_layouts=Replicate())
        return parallelize_module(model, mesh, {"embed": embed, "head": head})
    for block in model.blocks:  # type: ignore[union-attr]
        parallelize_module(block, mesh, _block_plan())
    plan: dict[str, ParallelStyle] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


def _block_plan() -> dict[str, ParallelStyle]:
    """Activations are split along the sequence between a block's halves, by width inside them."""
    gather = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    return {
        "attention_norm": SequenceParallel(),
        "attention": gather,
        **{f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")},
        "attention.out": RowwiseParallel(output_layouts=Shard(1)),
        "mlp_norm": SequenceParallel(),
        "mlp": gather,
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
    }


WRAPPERS: dict[str, Callable[[nn.Module, DeviceMesh, torch.dtype], nn.Module]] = {
    "ddp": _ddp,
    "fsdp1": _fsdp1,
    "fsdp2": _fsdp2,
    "hsdp": _fsdp2,
    "tp": _tp,
    "fsdp2+tp": _fsdp2_tp,
}
