"""How transformers, accelerate and torch clip, for the ranks of tests/parity/test_peers.py."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import distclip
from tests.support.ranks import mesh

CPU = torch.device("cpu")
SCALE = 1024.0
NUM_EXPERTS, WIDTH = 4, 6


class Experts(nn.Module):
    """Matrices in one tensor, of which a rank may hold a part.

    Ranks see the same tokens, and add their outputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(NUM_EXPERTS, WIDTH, WIDTH))

    def forward(self, x: Tensor, chosen: list[int]) -> Tensor:
        sharded = isinstance(self.weight, DTensor)
        local = self.weight.to_local() if sharded else self.weight
        first = dist.get_rank() * len(local) if sharded else 0
        here = [x @ local[e - first] for e in chosen if first <= e < first + len(local)]
        out = sum(here, torch.zeros_like(x))
        if sharded:
            dist.all_reduce(total := out.detach().clone())
            out = out + (total - out.detach())
        return out


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = Experts(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, chosen: list[int]) -> Tensor:
        return self.head(self.experts(x, chosen).tanh())


def loss_of(model: nn.Module, chosen: list[int]) -> Tensor:
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0))
    return (10 * model(x.to(next(model.parameters()).dtype), chosen) - 5).square().mean()


def all_experts(model: nn.Module, rank: int, world_size: int) -> Tensor:
    return loss_of(model, [0, 1, 2, 3])


def experts_of_rank_0(model: nn.Module, rank: int, world_size: int) -> Tensor:
    """No token for the others, whose gradients stay None."""
    return loss_of(model, [0, 1])


def scaled_step(model: Any, rank: int, world_size: int) -> None:
    backward_scaled(model, all_experts(model, rank, world_size))


def scaled_step_of_rank_0(model: Any, rank: int, world_size: int) -> None:
    backward_scaled(model, experts_of_rank_0(model, rank, world_size))


def backward_scaled(model: Any, loss: Tensor) -> None:
    """With a new scaler, which has unscaled nothing in this step."""
    scaler = model.trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(loss).backward()


# transformers -------------------------------------------------------------------------------------


def expert_parallel(model: Mixture) -> nn.Module:
    """Experts as a DTensor, everything else plain, as transformers has them."""
    experts = model.experts
    on = mesh((dist.get_world_size(),), ("ep",))
    experts.weight = nn.Parameter(distribute_tensor(experts.weight.detach(), on, [Shard(0)]))
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        tempfile.mkdtemp(), use_cpu=True, report_to=[], ddp_backend="gloo", disable_tqdm=True
    )
    return with_attribute(model, trainer=Trainer(model=model, args=args))


def with_attribute(model: nn.Module, **attributes: Any) -> nn.Module:
    """Beside the module's own parts: a Trainer holds the module in turn."""
    vars(model).update(attributes)
    return model


def two_meshes_in_fp16(model: Mixture) -> nn.Module:
    """Experts on one mesh, the rest by FSDP2 on another, and a loss scale.

    The scale is that of `fp16=True` on an accelerator; the Trainer refuses it on a CPU.
    """
    fully_shard(model.head, mesh=mesh((dist.get_world_size(),), ("fsdp",)))
    model = expert_parallel(model)
    accelerator: Any = model.trainer.accelerator
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator._optimizers = [accelerator.prepare_optimizer(optimizer)]
    return model


def as_trainer(model: Any, max_norm: float) -> Tensor:
    model.trainer.args.max_grad_norm = max_norm
    return model.trainer._clip_grad_norm(model)


def as_trainer_in_fp16(model: Any, max_norm: float) -> Tensor:
    """And then what `scaler.step` does first: it unscales, unless that has been done."""
    norm = as_trainer(model, max_norm)
    accelerator = model.trainer.accelerator
    with contextlib.suppress(RuntimeError):  # "unscale_() has already been called"
        accelerator.scaler.unscale_(accelerator._optimizers[0].optimizer)
    return norm


def as_distclip(model: Any, max_norm: float) -> Tensor:
    return distclip.clip_grad_norm_(model, max_norm)


def as_distclip_in_fp16(model: Any, max_norm: float) -> Tensor:
    accelerator = model.trainer.accelerator
    clipper = distclip.Clipper(model, distclip.ClipNorm(max_norm))
    return clipper.clip_(accelerator._optimizers, scaler=accelerator.scaler).total_norm


# torch and accelerate -----------------------------------------------------------------------------


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 4))


def step(model: nn.Module, rank: int, world_size: int) -> Tensor:
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
    return (10 * model(x.chunk(world_size)[rank]) - 5).square().mean()


def on_two_meshes(model: nn.Module) -> nn.Module:
    size = dist.get_world_size()
    fully_shard(model[0], mesh=mesh((size, 1), ("replicate", "shard")))
    return fully_shard(model, mesh=mesh((size,), ("fsdp",)))


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=CPU, use_orig_params=True)


def under_accelerate(model: nn.Module) -> nn.Module:
    """As FSDP1 on an accelerator; accelerate takes no CPU for it, but for the type of the state."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    wrapped = fsdp1(model)
    accelerator._models.append(wrapped)
    return with_attribute(wrapped, accelerator=accelerator)


def torch_on_a_list(model: nn.Module, max_norm: float) -> Tensor:
    return nn.utils.clip_grad_norm_(list(model.parameters()), max_norm)


def accelerate_on_all(model: Any, max_norm: float) -> Tensor:
    return model.accelerator.clip_grad_norm_(model.parameters(), max_norm)


def accelerate_on_weights(model: Any, max_norm: float) -> Tensor:
    weights = [param for name, param in model.named_parameters() if "weight" in name]
    return model.accelerator.clip_grad_norm_(weights, max_norm)


def distclip_on_weights(model: Any, max_norm: float) -> Tensor:
    weights = [param for name, param in model.named_parameters() if "weight" in name]
    return distclip.clip_grad_norm_(weights, max_norm)


def weights_clipped(gradients: Mapping[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    weights = torch.cat([g.flatten() for name, g in gradients.items() if "weight" in name])
    factor = min(1.0, max_norm / float(weights.norm()))
    return {n: g * factor if "weight" in n else g for n, g in gradients.items()}
