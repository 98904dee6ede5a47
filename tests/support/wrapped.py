"""One small model in every real wrapper, after a real backward, beside the same model whole in one
process.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from tests.support.ranks import device_of, mesh


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 16)
        self.down = nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Model(nn.Module):
    """Odd sizes, so that shards are uneven; biases of few elements, so that some are empty."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([Block(6), Block(6)])
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


Wrap = Callable[[nn.Module, str], nn.Module]
BATCH, LENGTH = 8, 4


def tokens_of_all_ranks() -> Tensor:
    return torch.randint(11, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return 30 * model(tokens).square().mean()


def make_model(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(1)
    return Model().to(device=device_of(device), dtype=dtype)


@functools.cache
def whole_gradients() -> list[Tensor]:
    """The gradients of the whole model on the whole batch: float64, one process."""
    model = make_model(dtype=torch.float64)
    loss_of(model, tokens_of_all_ranks()).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def _ddp(model: nn.Module, device: str) -> nn.Module:
    return DistributedDataParallel(model)


def _fsdp1(strategy: str, originals: bool, nested: tuple[str, ...] = ()) -> Wrap:
    def wrap(model: nn.Module, device: str) -> nn.Module:
        unit = functools.partial(
            FullyShardedDataParallel, use_orig_params=originals, device_id=device_of(device)
        )
        for index, inner in enumerate(nested):
            model.blocks[index] = unit(model.blocks[index], **_fsdp1_kind(inner, device))
        return unit(model, **_fsdp1_kind(strategy, device))

    return wrap


def _fsdp1_kind(strategy: str, device: str) -> dict[str, object]:
    kind: dict[str, object] = {"sharding_strategy": ShardingStrategy[strategy]}
    if strategy == "HYBRID_SHARD":
        kind["device_mesh"] = mesh((2, 2), ("replicate", "shard"), device)
    return kind


def _fsdp1_last_rank_holds_nothing(model: nn.Module, device: str) -> nn.Module:
    """The head is a unit of 21 elements with 24 after padding; its bias lies on the last ranks
    alone.
    """
    model.head = FullyShardedDataParallel(
        model.head, use_orig_params=True, device_id=device_of(device)
    )
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=device_of(device))


def _fsdp2(model: nn.Module, device: str) -> nn.Module:
    return _fully_sharded(model, mesh=mesh((4,), ("fsdp",), device))


def _hsdp(model: nn.Module, device: str) -> nn.Module:
    return _fully_sharded(model, mesh=mesh((2, 2), ("replicate", "shard"), device))


def _fully_sharded(model: nn.Module, **kwargs: object) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, **kwargs)
    return fully_shard(model, **kwargs)


def _tp(model: nn.Module, device: str) -> nn.Module:
    return tensor_parallel(model, mesh((4,), ("tp",), device))


def _fsdp2_tp(model: nn.Module, device: str) -> nn.Module:
    both = mesh((2, 2), ("fsdp", "tp"), device)
    return _fully_sharded(tensor_parallel(model, both["tp"]), mesh=both["fsdp"])


def tensor_parallel(model: nn.Module, tp: object) -> nn.Module:
    """Column, row and sequence parallel; the embedding and the head stay plain tensors."""
    for block in model.blocks:
        split = PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=(Shard(0),), use_local_output=False
        )
        parallelize_module(block.norm, tp, split)
        plan = {
            "norm": SequenceParallel(sequence_dim=0),  # its gradients come as Partial
            "up": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(block, tp, plan)
    return model


def _kinds() -> dict[str, tuple[Wrap, int]]:
    """Every wrapper by name, and how many ranks see batches of their own."""
    kinds: dict[str, tuple[Wrap, int]] = {"ddp": (_ddp, 4)}
    for strategy, originals in itertools.product(
        ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD"), (False, True)
    ):
        name = f"fsdp1 {strategy} {'original' if originals else 'flat'}"
        kinds[name] = (_fsdp1(strategy, originals), 4)
    kinds["fsdp1 nested, mixed, flat"] = (
        _fsdp1("FULL_SHARD", False, ("NO_SHARD", "SHARD_GRAD_OP")),
        4,
    )
    kinds["fsdp1 nested, mixed, original"] = (
        _fsdp1("FULL_SHARD", True, ("HYBRID_SHARD", "NO_SHARD")),
        4,
    )
    kinds["fsdp1 empty shards"] = (_fsdp1_last_rank_holds_nothing, 4)
    kinds |= {
        "fsdp2": (_fsdp2, 4),
        "hsdp": (_hsdp, 4),
        "tp": (_tp, 1),
        "fsdp2 x tp": (_fsdp2_tp, 2),
    }
    return kinds


WRAPPERS = _kinds()
HAS_PARTIAL = {"tp"}  # FSDP2 reduces those of its own parameters
UNSHARDED = {"ddp", "fsdp1 NO_SHARD flat", "fsdp1 NO_SHARD original"}


def with_gradients(kind: str, device: str) -> nn.Module:
    """The wrapped model after backward on this rank's part of the batch."""
    wrap, num_batches = WRAPPERS[kind]
    model = wrap(make_model(device), device)
    part = dist.get_rank() * num_batches // dist.get_world_size()
    tokens = tokens_of_all_ranks().to(device_of(device)).chunk(num_batches)[part]
    loss_of(model, tokens).backward()
    return model


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_partial(grad: Tensor | None) -> bool:
    return isinstance(grad, DTensor) and any(p.is_partial() for p in grad.placements)
