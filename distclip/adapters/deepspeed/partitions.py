"""Where each optimizer class of DeepSpeed keeps the gradients of this rank.

| optimizer class (stages)        | the inner optimizer steps            | gradient before         |
|---------------------------------|--------------------------------------|-------------------------|
| torch optimizer (0, float32)    | the parameters                       | parameter's `.grad`     |
| `FP16_UnfusedOptimizer` (0)     | `fp32_groups[i][j]`                  | parameter's `.grad`     |
| `FP16_Optimizer` (0, FusedAdam) | `fp32_groups_flat[i]`                | parameter's `.grad`     |
| `BF16_Optimizer` (1)            | `fp32_groups_flat_partition[i]`      | see `_flat_gradient`    |
| `DeepSpeedZeroOptimizer` (1, 2) | `single_partition_of_fp32_groups[i]` | `averaged_gradients[i]` |
| `DeepSpeedZeroOptimizer_Stage3` | `fp32_partitioned_groups_flat[i]`    | `averaged_gradients[i]` |
| the last two with offload       | the same, on the CPU                 | that tensor's `.grad`   |

"Before" is when the outer step begins: the gradients are scaled, and averaged over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.adapters.deepspeed.param_slices import (
    ParamSlice,
    equal_slices,
    flat_slices,
    offsets_of,
    whole_slices,
)


@dataclass(frozen=True)
class Partition:
    """One tensor that the inner optimizer steps.

    Attributes:
        ranks: those that hold the other slices of the same parameters, this one included.
    """

    stepped: Tensor
    slices: Sequence[ParamSlice]
    ranks: Sequence[int]

    def weights(self) -> list[Tensor]:
        """The float32 weights of each slice."""
        values = self.stepped.detach()
        return [
            self.stepped if self.stepped is param_slice.param else param_slice.view(values)
            for param_slice in self.slices
        ]

    def gradients(self) -> list[Tensor | None]:
        """The gradient of each slice as the outer step begins: scaled, and averaged over ranks."""
        return [param_slice.param.grad for param_slice in self.slices]

    def stepped_gradients(self) -> list[Tensor | None]:
        """The gradient of each slice as the inner step reads it: in float32, unscaled."""
        grad = self.stepped.grad
        return [
            None if grad is None or not param_slice.shard.numel else param_slice.view(grad)
            for param_slice in self.slices
        ]


GradientBuffers: TypeAlias = Callable[[], Sequence[Tensor] | None]


@dataclass(frozen=True)
class BufferedPartition(Partition):
    """A partition whose gradients lie in tensors of DeepSpeed.

    Attributes:
        buffers: those that follow each other as the slices do: one per slice, padded or not, or a
            flat one for all.
    """

    buffers: GradientBuffers

    def gradients(self) -> list[Tensor | None]:
        buffers = self.buffers()
        if buffers is None:
            return [None] * len(self.slices)
        buffers = [buffer if buffer.ndim == 1 else buffer.reshape(-1) for buffer in buffers]
        offsets = [0, *accumulate(map(Tensor.numel, buffers))]
        return [
            param_slice.view_in(buffers, offsets) if param_slice.shard.numel else None
            for param_slice in self.slices
        ]


def read_partitions(optimizer: Any) -> list[Partition]:
    """Everything that `engine.optimizer` steps on this rank.

    Raises:
        ValueError: a class, or a way to run it, that keeps its gradients elsewhere.
    """
    read = _READERS.get(type(optimizer).__name__)
    if read is None and isinstance(optimizer, torch.optim.Optimizer):
        read = _read_torch
    if read is None:
        raise ValueError(
            f"cannot clip what {type(optimizer).__name__} steps: no test of distclip has looked "
            f"where its gradients lie, and they might be clipped in part or twice. Known are "
            f"torch.optim optimizers and {', '.join(_READERS)}. Use one of these (for ZeRO: "
            f"without ZenFlow, SuperOffload and MiCS)."
        )
    if (obstacle := _find_obstacle(optimizer)) is not None:
        raise ValueError(
            f"cannot clip what {type(optimizer).__name__} steps: {obstacle}. What distclip reads "
            f"when `step` begins is not the gradient that is applied. Switch this off in the "
            f"config of DeepSpeed."
        )
    return list(read(optimizer))


class _Obstacle(NamedTuple):
    """An attribute that is true where the gradient in the table is not the one that is applied.

    Attributes:
        owner: the class that has the attribute in every tested version: there, a missing one
            raises.
    """

    attribute: str
    owner: str | None
    reason: str

    def is_on(self, optimizer: Any) -> bool:
        if type(optimizer).__name__ == self.owner:
            return bool(getattr(optimizer, self.attribute))
        return bool(getattr(optimizer, self.attribute, False))


_LEGACY_FUSION = "legacy fusion hands gradients to the inner step by an argument"
_OBSTACLES = (
    _Obstacle(
        "swap_optimizer", "DeepSpeedZeroOptimizer_Stage3", "NVMe offload keeps gradients in files"
    ),
    _Obstacle("fused_lamb_legacy", "FP16_UnfusedOptimizer", _LEGACY_FUSION),
    _Obstacle("fused_adam_legacy", "FP16_Optimizer", _LEGACY_FUSION),
    _Obstacle(
        "torch_autocast_gradscaler",
        None,  # not in DeepSpeed 0.16.9
        "torch autocast in fp16 scales gradients once more, by a GradScaler inside the step",
    ),
)


def _find_obstacle(optimizer: Any) -> str | None:
    inner = cast("type[Any]", type(getattr(optimizer, "optimizer", optimizer)))
    if "muon" in inner.__name__.lower():
        return "Muon replaces gradients by updates"
    if "onebit" in inner.__module__:
        return f"{inner.__name__} averages gradients inside its own step"
    reasons = (obstacle.reason for obstacle in _OBSTACLES if obstacle.is_on(optimizer))
    return next(reasons, None)


def inner_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Those whose `step` applies the gradients; two where a part of them is offloaded."""
    is_stage_3 = type(optimizer).__name__ == "DeepSpeedZeroOptimizer_Stage3"
    if is_stage_3 and optimizer.offload_optimizer and optimizer.partial_offload != 1.0:
        return [optimizer.optimizer, optimizer.backup_optimizer]
    return [optimizer.optimizer]


def loss_scale(optimizer: Any) -> float:
    """The factor in the gradients: before the outer step updates the scale, and after it."""
    if type(optimizer).__name__ == "BF16_Optimizer":
        return 1.0
    scale = optimizer.loss_scale
    return 1.0 if scale is None else float(scale)  # None: FP16_Optimizer with gradients in bf16


def wait_for_offload(optimizer: Any) -> None:
    """Waits for copies of gradients that are on their way to the CPU."""
    if hasattr(optimizer, "_wait_for_offload_copies"):  # since DeepSpeed 0.19
        optimizer._wait_for_offload_copies()
    name = _OFFLOAD.get(type(optimizer).__name__)
    if name is not None and getattr(optimizer, name):
        # ZeRO-1 and 2 copy to pinned memory. With overlap_comm off nothing has waited for that.
        stream: Any = import_module("deepspeed.accelerator").get_accelerator().current_stream()
        if stream is not None:  # a CPU has none
            stream.synchronize()


# What is true where the inner optimizer steps on the CPU, by the class.
_OFFLOAD = {
    "DeepSpeedZeroOptimizer": "cpu_offload",
    "DeepSpeedZeroOptimizer_Stage3": "offload_optimizer",
}


def _read_torch(optimizer: Any) -> Iterator[Partition]:
    for param in (p for group in optimizer.param_groups for p in group["params"]):
        if param.requires_grad:
            yield Partition(param, whole_slices([param]), [dist.get_rank()])


def _read_unfused(optimizer: Any) -> Iterator[Partition]:
    for params, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for param, master in zip(params, masters, strict=True):
            yield Partition(master, whole_slices([param]), [dist.get_rank()])


def _read_fused(optimizer: Any) -> Iterator[Partition]:
    for params, master in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
        yield Partition(master, whole_slices(params), [dist.get_rank()])


def _read_bf16(optimizer: Any) -> Iterator[Partition]:
    for i, params in enumerate(optimizer.bf16_groups):
        master, group = optimizer.fp32_groups_flat_partition[i], optimizer.real_dp_process_group[i]
        slices = flat_slices(params, offsets_of(params), master.numel(), group)
        yield _partition(master, slices, group, partial(_flat_gradient, optimizer, i))


def _read_zero_1_2(optimizer: Any) -> Iterator[Partition]:
    # Since DeepSpeed 0.19 there may be padding between parameters.
    padded = getattr(optimizer, "round_robin_bit16_offsets", None)
    for i, params in enumerate(optimizer.round_robin_bit16_groups):
        master = optimizer.single_partition_of_fp32_groups[i]
        group = optimizer.real_dp_process_group[i]
        offsets = offsets_of(params) if padded is None else padded[i]
        slices = flat_slices(params, offsets, master.numel(), group)
        buffers = _zero_buffers(optimizer, i, master, optimizer.cpu_offload)
        yield _partition(master, slices, group, buffers)


def _read_zero_3(optimizer: Any) -> Iterator[Partition]:
    # Since DeepSpeed 0.19 experts are divided over groups of their own.
    group_of = getattr(optimizer, "_get_sub_group_process_group", None)
    for i, params in enumerate(optimizer.fp16_groups):
        master = optimizer.fp32_partitioned_groups_flat[i]
        group = optimizer.dp_process_group if group_of is None else group_of(i)
        buffers = _zero_buffers(optimizer, i, master, optimizer.offload_optimizer)
        yield _partition(master, equal_slices(params, group), group, buffers)


_READERS: dict[str, Callable[[Any], Iterator[Partition]]] = {
    "FP16_UnfusedOptimizer": _read_unfused,
    "FP16_Optimizer": _read_fused,
    "BF16_Optimizer": _read_bf16,
    "DeepSpeedZeroOptimizer": _read_zero_1_2,
    "DeepSpeedZeroOptimizer_Stage3": _read_zero_3,
}


def _partition(
    master: Tensor, slices: Sequence[ParamSlice], group: Any, buffers: GradientBuffers
) -> Partition:
    return BufferedPartition(master, slices, dist.get_process_group_ranks(group), buffers)


def _zero_buffers(optimizer: Any, index: int, master: Tensor, offload: bool) -> GradientBuffers:
    if offload:
        return partial(_master_gradient, master)
    return partial(_averaged_gradients, optimizer, index)


def _flat_gradient(optimizer: Any, index: int) -> list[Tensor]:
    return [optimizer.fp32_groups_gradient_flat_partition[index]]


def _master_gradient(master: Tensor) -> list[Tensor] | None:
    return None if master.grad is None else [master.grad]


def _averaged_gradients(optimizer: Any, index: int) -> list[Tensor] | None:
    return optimizer.averaged_gradients.get(index)
