"""Wraps a whole model for one of the layouts; nothing after this knows which."""

import contextlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
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

    `autocast` opens the context that the forward pass runs in; FSDP casts by itself, so there it does nothing.
    """

    model: nn.Module
    data_rank: int
    num_data_ranks: int
    autocast: Callable[[], AbstractContextManager[object]]


def wrap(model: nn.Module, layout: str, precision: str, device: torch.device) -> Wrapped:
    """The model on `device` under `layout`.

    Collective: every rank must call it, with the same model.
    """
    # torch warns of in-place writes to what a sharded module returns (a view, for an LSTM): there are none here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = _mesh(layout, device)
    model, dtype = model.to(device), DTYPES[precision]
    wrappers = {"ddp": _ddp, "fsdp1": _fsdp1, "fsdp2": _fsdp2, "hsdp": _fsdp2, "tp": _tp, "fsdp2+tp": _fsdp2_tp}
    if layout not in wrappers:  # zero1 to zero3: an engine takes the whole model
        return Wrapped(model, dist.get_rank(), dist.get_world_size(), contextlib.nullcontext)
    wrapped = wrappers[layout](model, mesh, dtype)
    cast = layout in ("ddp", "tp") and dtype != torch.float32
    # Ranks along the tp axis work on one batch together; along every other axis each has its own share.
    num_copies = mesh["tp"].size() if "tp" in (mesh.mesh_dim_names or ()) else 1
    return Wrapped(
        wrapped,
        data_rank=dist.get_rank() // num_copies,
        num_data_ranks=dist.get_world_size() // num_copies,
        autocast=lambda: torch.autocast(device.type, dtype) if cast else contextlib.nullcontext(),
    )


def _mesh(layout: str, device: torch.device) -> DeviceMesh:
    """All ranks, by named axes; tp is the last axis, so that its ranks are neighbours on one machine."""
    size = dist.get_world_size()
    shape, names = {
        "hsdp": ((2, size // 2), ("replicate", "shard")),
        "tp": ((size,), ("tp",)),
        "fsdp2+tp": ((size // 2, 2), ("dp", "tp")),
    }.get(layout, ((size,), ("dp",)))
    return init_device_mesh(device.type, shape, mesh_dim_names=names)


def _ddp(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> nn.Module:
    wrapped = DistributedDataParallel(model, device_mesh=mesh)
    _settle_buckets(wrapped)
    return wrapped


def _settle_buckets(model: DistributedDataParallel) -> None:
    """Runs one backward pass whose gradients are thrown away.

    DDP regroups its buckets after the first backward pass, and with more than two ranks the place in a bucket
    decides the order in which gloo and NCCL add. Without this, the first step after a resume would add in another
    order than the same step of an undisturbed run, and the losses would differ in the last bits.
    """
    tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    model(tokens).sum().backward()
    model.zero_grad(set_to_none=True)


def _fsdp1(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> nn.Module:
    units = {type(block) for block in model.blocks}  # type: ignore[union-attr]
    mixed = MixedPrecision(param_dtype=dtype, reduce_dtype=torch.float32) if dtype != torch.float32 else None
    with warnings.catch_warnings():
        # One rank has nothing to shard: FSDP1 says so, and that is what --nproc-per-node=1 asked for.
        warnings.filterwarnings("ignore", message=".*switching to use `NO_SHARD`.*")
        return FullyShardedDataParallel(
            model,
            device_mesh=mesh,
            auto_wrap_policy=ModuleWrapPolicy(units),
            mixed_precision=mixed,
            device_id=next(model.parameters()).device,
        )


def _fsdp2(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> nn.Module:
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    policy = mixed if dtype != torch.float32 else MixedPrecisionPolicy()
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def _fsdp2_tp(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> nn.Module:
    return _fsdp2(_tp(model, mesh["tp"], dtype), mesh["dp"], dtype)


def _tp(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> nn.Module:
    """Column- and row-sharded layers with the sequence split between them; an LSTM's own weights stay whole,
    since cuDNN and oneDNN take them as one: only its embedding and its head are sharded."""
    if isinstance(model.blocks[0], nn.LSTM):  # type: ignore[index]
        whole = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
        return parallelize_module(model, mesh, {"embed": whole, "head": ColwiseParallel(output_layouts=Replicate())})
    for block in model.blocks:  # type: ignore[union-attr]
        parallelize_module(block, mesh, _block_plan())
    plan: dict[str, ParallelStyle] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


def _block_plan() -> dict[str, ParallelStyle]:
    """Between the halves of a block the activations are split along the sequence, inside them along the width."""
    gather = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    plan: dict[str, ParallelStyle] = {"attention_norm": SequenceParallel(), "mlp_norm": SequenceParallel()}
    plan |= {"attention": gather, "mlp": gather}
    plan |= {f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")}
    plan |= {"mlp.up": ColwiseParallel()}
    return plan | {name: RowwiseParallel(output_layouts=Shard(1)) for name in ("attention.out", "mlp.down")}
