"""Where each optimizer class of DeepSpeed keeps this rank's gradients, and of which parameters they are.

| class                                | what the inner optimizer steps       | the gradient as the outer step begins |
|--------------------------------------|--------------------------------------|---------------------------------------|
| a torch optimizer (stage 0, float32) | the parameters                       | their `.grad`                         |
| `FP16_UnfusedOptimizer` (stage 0)    | `fp32_groups[i][j]`                  | `.grad` of the parameter              |
| `FP16_Optimizer` (0, with FusedAdam) | `fp32_groups_flat[i]`                | `.grad` of the parameter              |
| `BF16_Optimizer`                     | `fp32_groups_flat_partition[i]`      | `fp32_groups_gradient_flat_partition` |
| `DeepSpeedZeroOptimizer` (1, 2)      | `single_partition_of_fp32_groups[i]` | `averaged_gradients[i]`               |
| `DeepSpeedZeroOptimizer_Stage3`      | `fp32_partitioned_groups_flat[i]`    | `averaged_gradients[i]`               |
| the last two with offload            | the same, on the CPU                 | `.grad` of what is stepped            |
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

Gradients = Callable[[], "Sequence[Tensor | None]"]


@dataclass(frozen=True, slots=True)
class Fragment:
    """The elements of one parameter of the model that lie in one tensor of the inner optimizer.

    Attributes:
        shape: of the whole parameter.
        first: the first of its elements that lies here.
        offset, size: where they lie in the flat tensor; size is 0 on ranks that hold none.
        boundaries: the elements at which other ranks begin; empty where every rank holds all of it.
    """

    param: Tensor
    shape: tuple[int, ...]
    first: int
    offset: int
    size: int
    boundaries: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        return not self.boundaries and self.size == self.param.numel()

    def of(self, flat: Tensor) -> Tensor:
        """Its part of a tensor that is laid out as the inner optimizer's."""
        if flat.shape == self.shape and self.whole:
            return flat
        values = flat.view(-1).narrow(0, self.offset, self.size)
        return values.view(self.shape) if self.whole else values


@dataclass(frozen=True)
class Partition:
    """One tensor that the inner optimizer steps.

    Attributes:
        ranks: those that hold the other parts of the same parameters, this one included.
        gradients: those of the fragments when the outer step begins, in order: scaled, and averaged over ranks.
    """

    stepped: Tensor
    fragments: Sequence[Fragment]
    ranks: Sequence[int]
    gradients: Gradients


def partitions(optimizer: Any) -> list[Partition]:
    """All that `engine.optimizer` steps on this rank.

    Raises:
        ValueError: a class, or a way to run it, that keeps its gradients elsewhere.
    """
    read = _READERS.get(type(optimizer).__name__)
    if read is None and isinstance(optimizer, torch.optim.Optimizer):
        read = _plain
    if read is None:
        raise ValueError(
            f"cannot clip what {type(optimizer).__name__} steps: its gradients lie where no test of distclip has "
            f"looked, so that they might be clipped in part or twice. Known are torch.optim optimizers and "
            f"{', '.join(_READERS)}. Use one of these (for ZeRO: without ZenFlow, SuperOffload and MiCS)."
        )
    if (why := _elsewhere(optimizer)) is not None:
        raise ValueError(
            f"cannot clip what {type(optimizer).__name__} steps: {why}, so that what distclip reads when `step` "
            f"begins is not the gradient that is applied. Switch this off in the config of DeepSpeed."
        )
    return list(read(optimizer))


def inner_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Those whose `step` applies the gradients; the second one steps what partial offload leaves on the device."""
    found = [getattr(optimizer, "optimizer", None), getattr(optimizer, "backup_optimizer", None)]
    return [each for each in found if each is not None]


def loss_scale(optimizer: Any) -> float:
    """What the gradients are multiplied by: before the outer step's own update, and after it."""
    scale = getattr(optimizer, "loss_scale", None)
    return 1.0 if scale is None else float(scale)  # None: FP16_Optimizer, of gradients in bf16


def settle(optimizer: Any) -> None:
    """Waits for copies of gradients that are on their way to the CPU."""
    if hasattr(optimizer, "_wait_for_offload_copies"):  # DeepSpeed 0.19
        optimizer._wait_for_offload_copies()


def _elsewhere(optimizer: Any) -> str | None:
    inner = cast("type[Any]", type(getattr(optimizer, "optimizer", optimizer)))
    if "muon" in inner.__name__.lower():
        return "Muon puts updates in the place of gradients"
    if "onebit" in inner.__module__:
        return f"{inner.__name__} averages gradients inside its own step"
    if getattr(optimizer, "swap_optimizer", False):
        return "NVMe offload keeps gradients in files"
    if getattr(optimizer, "torch_autocast_gradscaler", None) is not None:
        return "torch autocast in fp16 scales gradients once more, by a GradScaler inside the step"
    if getattr(optimizer, "fused_lamb_legacy", False) or getattr(optimizer, "fused_adam_legacy", False):
        return "legacy fusion hands gradients to the inner step by an argument"
    return None


def _plain(optimizer: Any) -> Iterator[Partition]:
    for param in (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad):
        yield Partition(param, _whole([param]), [dist.get_rank()], partial(_own_gradients, [param]))


def _unfused(optimizer: Any) -> Iterator[Partition]:
    for params, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for param, master in zip(params, masters, strict=True):
            yield Partition(master, _whole([param]), [dist.get_rank()], partial(_own_gradients, [param]))


def _fused(optimizer: Any) -> Iterator[Partition]:
    for params, master in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
        yield Partition(master, _whole(params), [dist.get_rank()], partial(_own_gradients, params))


def _bf16(optimizer: Any) -> Iterator[Partition]:
    for i, params in enumerate(optimizer.bf16_groups):
        master, group = optimizer.fp32_groups_flat_partition[i], optimizer.real_dp_process_group[i]
        fragments = _cut(params, _begins(params), master.numel(), group)
        flat = [optimizer.fp32_groups_gradient_flat_partition[i]]
        yield _partition(master, fragments, group, partial(list[Tensor], flat))


def _zero_1_2(optimizer: Any) -> Iterator[Partition]:
    padded = getattr(optimizer, "round_robin_bit16_offsets", None)  # DeepSpeed 0.19
    for i, params in enumerate(optimizer.round_robin_bit16_groups):
        master, group = optimizer.single_partition_of_fp32_groups[i], optimizer.real_dp_process_group[i]
        fragments = _cut(params, _begins(params) if padded is None else padded[i], master.numel(), group)
        fetch = partial(_of_master, master) if optimizer.cpu_offload else partial(_averaged, optimizer, i)
        yield _partition(master, fragments, group, fetch)


def _zero_3(optimizer: Any) -> Iterator[Partition]:
    for i, params in enumerate(optimizer.fp16_groups):
        master = optimizer.fp32_partitioned_groups_flat[i]
        by_sub_group = getattr(optimizer, "_get_sub_group_process_group", None)  # DeepSpeed 0.19
        group = optimizer.dp_process_group if by_sub_group is None else by_sub_group(i)
        fetch = partial(_of_master, master) if optimizer.offload_optimizer else partial(_averaged, optimizer, i)
        yield _partition(master, _shares(params, group), group, fetch)


_READERS: dict[str, Callable[[Any], Iterator[Partition]]] = {
    "FP16_UnfusedOptimizer": _unfused,
    "FP16_Optimizer": _fused,
    "BF16_Optimizer": _bf16,
    "DeepSpeedZeroOptimizer": _zero_1_2,
    "DeepSpeedZeroOptimizer_Stage3": _zero_3,
}


def _begins(params: Sequence[Tensor]) -> list[int]:
    return [0, *accumulate(p.numel() for p in params)][:-1]


def _whole(params: Sequence[Tensor]) -> list[Fragment]:
    begins = zip(params, _begins(params), strict=True)
    return [Fragment(p, tuple(p.shape), 0, begin, p.numel()) for p, begin in begins]


def _cut(params: Sequence[Tensor], begins: Sequence[int], size: int, group: Any) -> list[Fragment]:
    """Parameters that lie one after the other in a flat buffer, of which each rank holds `size` elements."""
    here = size * dist.get_rank(group)
    made: list[Fragment] = []
    for param, begin in zip(params, begins, strict=True):
        first = max(0, here - begin)
        held = max(0, min(param.numel(), here + size - begin) - first)
        boundaries = tuple(size * rank - begin for rank in range(1, dist.get_world_size(group)))
        offset = begin + first - here if held else 0
        made.append(Fragment(param, tuple(param.shape), first if held else 0, offset, held, boundaries))
    return made


def _shares(params: Sequence[Any], group: Any) -> list[Fragment]:
    """Parameters each of which is divided among the ranks, padded to equal shares."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    made: list[Fragment] = []
    begin = 0
    for param in params:
        share, numel = param.partition_numel(), param.ds_numel
        held = max(0, min(share, numel - rank * share))
        boundaries = tuple(share * other for other in range(1, ranks))
        made.append(Fragment(param, tuple(param.ds_shape), rank * share if held else 0, begin, held, boundaries))
        begin += share
    return made


def _partition(master: Tensor, fragments: Sequence[Fragment], group: Any, fetch: Callable[[], Any]) -> Partition:
    return Partition(master, fragments, dist.get_process_group_ranks(group), partial(_located, fragments, fetch))


def _own_gradients(params: Sequence[Tensor]) -> list[Tensor | None]:
    return [param.grad for param in params]


def _of_master(master: Tensor) -> list[Tensor] | None:
    return None if master.grad is None else [master.grad]


def _averaged(optimizer: Any, index: int) -> list[Tensor] | None:
    return optimizer.averaged_gradients.get(index)


def _located(fragments: Sequence[Fragment], fetch: Callable[[], list[Tensor] | None]) -> list[Tensor | None]:
    """The fragments inside tensors that follow each other: one a parameter, with padding or without, or a flat one."""
    pieces = fetch()
    if pieces is None:
        return [None] * len(fragments)
    begins = [0, *accumulate(piece.numel() for piece in pieces)]
    return [_taken(fragment, pieces, begins) if fragment.size else None for fragment in fragments]


def _taken(fragment: Fragment, pieces: Sequence[Tensor], begins: Sequence[int]) -> Tensor:
    at = bisect_right(begins, fragment.offset) - 1
    values = pieces[at].reshape(-1).narrow(0, fragment.offset - begins[at], fragment.size)
    return values.view(fragment.shape) if fragment.whole else values
