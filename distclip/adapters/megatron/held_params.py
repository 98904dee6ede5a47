"""What each optimizer class of Megatron-core steps on this rank.

| optimizer class                     | steps                        | gradient before it steps |
|-------------------------------------|------------------------------|--------------------------|
| `FP32Optimizer`                     | the model's parameters       | `.grad` (= `main_grad`)  |
| `Float16OptimizerWithFloat16Params` | float32 copies, whole        | `.grad`                  |
| `DistributedOptimizer`              | flat parts of float32 copies | `.grad`                  |
| the same, precision-aware           | flat parts of parameters     | `.decoupled_grad`        |
| `LayerWiseDistributedOptimizer`     | as the first two, each       | `.grad`                  |
|                                     | parameter on one rank        |                          |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch.distributed as dist
from torch import Tensor

from distclip.adapters.megatron.rank_groups import RankGroups
from distclip.sharding.local_tensors import is_dtensor


@dataclass(frozen=True)
class FlatRange:
    """A range of the elements of a tensor, in row-major order.

    Attributes:
        boundaries: where the ranges of other ranks begin inside of the tensor, or behind its end.
    """

    start: int
    numel: int
    boundaries: tuple[int, ...]


@dataclass(frozen=True)
class HeldParam:
    """A parameter of the model, and what this rank steps of it.

    Attributes:
        stepped: what the inner optimizer steps; None where that is nothing of this parameter.
        flat: which part of the parameter that is; None for all.
        is_first: of the ranks that differ in their data alone and step the same elements, this is
            the first.
        is_owned: one of these ranks steps the whole parameter, and the others nothing of it.
        position: a name for parameters that have none.
    """

    param: Any
    stepped: Tensor | None
    flat: FlatRange | None
    is_first: bool
    is_owned: bool
    position: str

    @property
    def is_expert(self) -> bool:
        return not getattr(self.param, "allreduce", True)

    @property
    def is_split(self) -> bool:
        """Whether tensor-parallel ranks hold different parts of it, or would if there were some."""
        return bool(getattr(self.param, "tensor_model_parallel", False))

    @property
    def is_tied_copy(self) -> bool:
        """Whether another pipeline stage has the same weights, and counts them."""
        return bool(getattr(self.param, "shared", False))

    @property
    def is_tied(self) -> bool:
        return bool(getattr(self.param, "shared_embedding", False))


def chained(optimizer: Any) -> list[Any]:
    """The optimizers in a chain; one that is no chain itself."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def is_layer_wise(optimizer: Any) -> bool:
    """Whether each parameter is stepped by one of the data-parallel ranks."""
    # By the name: not in megatron-core 0.15.
    names = [one.__name__ for one in type(optimizer).__mro__]
    return "LayerWiseDistributedOptimizer" in names


def held_params(optimizer: Any, groups: RankGroups) -> list[HeldParam]:
    """Everything that `optimizer` steps on this rank, in the same order on ranks with copies.

    Raises:
        ValueError: a class, or a way to run it, that keeps its gradients elsewhere.
    """
    is_owned = is_layer_wise(optimizer)
    found: list[HeldParam] = []
    for index, one in enumerate(chained(optimizer)):
        if not getattr(one, "is_stub_optimizer", False):  # nothing on this rank is trained by it
            found += _held_by(one, index, groups, is_owned)
    return found


def _held_by(optimizer: Any, index: int, groups: RankGroups, is_owned: bool) -> Iterator[HeldParam]:
    classes: Any = import_module("megatron.core.optimizer")
    if isinstance(optimizer, classes.DistributedOptimizer):
        _check_no_fsdp(optimizer.ddp_config.use_megatron_fsdp)
        yield from _flat_params(optimizer, index)
        return
    if isinstance(optimizer, classes.Float16OptimizerWithFloat16Params):
        pairs = list(_float16_pairs(optimizer))
    elif isinstance(optimizer, classes.FP32Optimizer):
        pairs = [(param, param) for group in optimizer.param_groups for param in group["params"]]
    else:
        raise ValueError(
            f"cannot clip what {type(optimizer).__name__} steps: no test of distclip has looked "
            f"where its gradients lie, and they might be clipped in part or twice. Known are "
            f"FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer and chains of "
            f"these, as `get_megatron_optimizer` makes them."
        )
    for i, (param, stepped) in enumerate(pairs):
        _check_no_fsdp(is_dtensor(param))
        is_expert = not getattr(param, "allreduce", True)
        is_first = is_owned or groups.data_ranks(is_expert)[0] == dist.get_rank()
        yield HeldParam(param, stepped, None, is_first, is_owned, f"#{index}.{i}")


def _float16_pairs(optimizer: Any) -> Iterator[tuple[Any, Tensor]]:
    """The parameters of the model, and what is stepped for them."""
    for params, mains, wide in zip(
        optimizer.float16_groups,
        optimizer.fp32_from_float16_groups,
        optimizer.fp32_from_fp32_groups,
        strict=True,
    ):
        yield from zip(params, mains, strict=True)
        yield from zip(wide, wide, strict=True)


def _flat_params(optimizer: Any, index: int) -> Iterator[HeldParam]:
    stepped = _flat_stepped(optimizer)
    # Several instances hold the same parts.
    is_first = optimizer.distributed_optimizer_instance_id == 0
    for i, buffer in enumerate(optimizer.buffers):
        for j, (param, (start, end, bucket_id)) in enumerate(buffer.param_index_map.items()):
            flat = _flat_range(buffer, buffer.buckets[bucket_id], start, end)
            values = stepped.pop(param, None)
            if (0 if values is None else values.numel()) != flat.numel:
                raise ValueError(
                    f"cannot attach to this DistributedOptimizer: it steps "
                    f"{0 if values is None else values.numel()} elements of a parameter of shape "
                    f"{list(param.shape)}, but the range of this rank in its buffer has "
                    f"{flat.numel}: the buffers are divided in a way that distclip does not know. "
                    f"Use a version of megatron-core that it is tested with."
                )
            yield HeldParam(param, values, flat, is_first, False, f"#{index}.{i}.{j}")
    if stepped:
        raise ValueError(
            f"cannot attach to this DistributedOptimizer: {len(stepped)} of its parameters lie in "
            f"none of its buffers, and their gradients might be clipped in part. Wrap the model in "
            f"Megatron's DistributedDataParallel before the optimizer is made."
        )


def _flat_stepped(optimizer: Any) -> dict[Any, Tensor]:
    """What is stepped, by the parameters of the model."""
    is_aware = optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    mains = optimizer.shard_float16_groups if is_aware else optimizer.shard_fp32_from_float16_groups
    found: dict[Any, Tensor] = {}
    for params, parts in (
        *zip(optimizer.model_float16_groups, mains, strict=True),
        *zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups, strict=True),
    ):
        found.update(zip(params, parts, strict=True))
    return found


def _flat_range(buffer: Any, bucket: Any, start: int, end: int) -> FlatRange:
    """The range of this rank in a parameter that lies at [start, end) in the buffer."""
    num_ranks, rank = buffer.data_parallel_group.size(), buffer.data_parallel_group.rank()
    size = bucket.grad_data.numel() // num_ranks
    starts = [bucket.offset + size * index - start for index in range(num_ranks)]
    first = max(0, starts[rank])
    numel = max(0, min(end - start, starts[rank] + size) - first)
    inside = [at for at in starts if 0 < at < end - start]
    behind = [end - start] if num_ranks > 1 else []  # where ranks begin that hold nothing of it
    return FlatRange(first if numel else 0, numel, (*inside, *behind))


def _check_no_fsdp(is_fsdp: bool) -> None:
    if is_fsdp:
        raise ValueError(
            "cannot attach to an optimizer over FSDP inside Megatron (use_megatron_fsdp, or "
            "torch's FSDP2): its gradients are DTensors of buffers, which no test of distclip has "
            "looked at. Use Megatron's DistributedDataParallel; the distributed optimizer shards "
            "too."
        )
