"""Real Accelerators on the ranks of a pool, on CPUs: as accelerate would make them on GPUs."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor

import distclip
from tests.support import reference

LR = 1 / 16
# `fsdp1 flat`: with `use_orig_params=False`, and the optimizer made after the model.
LAYOUTS = ("one process", "ddp", "fsdp1", "fsdp1 flat", "fsdp2")
_VARIABLES = """
    ACCELERATE_USE_FSDP ACCELERATE_TORCH_DEVICE ACCELERATE_BYPASS_DEVICE_MAP FSDP_VERSION
    LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE RANK MASTER_ADDR MASTER_PORT"""


class Net(nn.Module):
    """Sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def make_net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(100 * step + rank))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (8 * model(x) - 2).square().mean()


def whole_gradients(
    steps: int, num_ranks: int = 2, weights: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """In one process in float64: the mean over all ranks and accumulated batches.

    Args:
        steps: the number of batches of each rank, of which the first is 0.
    """
    net = make_net().double()
    if weights is not None:
        net.load_state_dict(weights)
    for step in range(steps):
        for rank in range(num_ranks):
            (loss_of(net, batch(step, rank).double()) / (steps * num_ranks)).backward()
    return {name: param.grad for name, param in net.named_parameters()}


def whole_norm(grads: dict[str, Tensor], norm_type: float = 2.0) -> Tensor:
    return reference.total_norm(list(grads.values()), norm_type)


def num_ranks(layout: str) -> int:
    return 1 if layout == "one process" else dist.get_world_size()


@contextmanager
def accelerator_for(layout: str, scaler: GradScaler | None = None, **options: Any) -> Iterator[Any]:
    """An Accelerator. Where it would ask for GPUs, only its search for a backend is replaced.

    On CPUs accelerate makes DDP alone, and no GradScaler: a scaler is put where it keeps its own.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    before = {name: os.environ.get(name) for name in _VARIABLES.split()}
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module="torch|accelerate")
        if layout == "one process":
            os.environ.pop("LOCAL_RANK", None)
            os.environ.pop("WORLD_SIZE", None)
            options["cpu"] = True
        elif layout == "ddp":
            options["cpu"] = True
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # asked for, and not used
        else:
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
            os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
            found = ("gloo", DistributedType.MULTI_GPU)
            stack.enter_context(
                mock.patch.object(PartialState, "_prepare_backend", return_value=found)
            )
        if layout.startswith("fsdp"):
            more: dict[str, Any] = {"cpu_ram_efficient_loading": False}
            if layout != "fsdp2":
                # torch 2.13 crashes where FSDP1 gathers a whole state dict on CPUs.
                more["state_dict_type"] = "SHARDED_STATE_DICT"
                more |= {"use_orig_params": layout == "fsdp1", "sync_module_states": False}
            options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                fsdp_version=2 if layout == "fsdp2" else 1, **more
            )
        if scaler is not None:
            options["mixed_precision"] = "fp16"
        try:
            accelerator = Accelerator(**options)
            accelerator.scaler = scaler
            if layout.startswith("fsdp"):
                accelerator.state.fsdp_plugin.mixed_precision_policy = None  # float32 all through
            yield accelerator
            accelerator.free_memory()
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR)


def fused(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.05, fused=True)


def prepared(
    accelerator: Any,
    make: Callable[[Any], torch.optim.Optimizer] = sgd,
    net: nn.Module | None = None,
) -> tuple[Any, Any]:
    net = make_net() if net is None else net
    if accelerator.distributed_type == "FSDP" and not accelerator.is_fsdp2:
        model = accelerator.prepare(net)
        optimizer = accelerator.prepare(make(model.parameters()))
    else:
        model, optimizer = accelerator.prepare(net, make(net.parameters()))
    if accelerator.scaler is not None:
        accelerator.native_amp = True  # only now: the forward stays in float32
    return model, optimizer


def run_backward(accelerator: Any, model: Any, step: int = 0) -> None:
    rank = dist.get_rank() if accelerator.num_processes > 1 else 0
    accelerator.backward(loss_of(model, batch(step, rank)))


def whole_weights(model: Any) -> dict[str, Tensor]:
    """By the names of `Net`, on every rank."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            found = {name: param.detach().clone() for name, param in model.named_parameters()}
    else:
        found = {name: whole(param).clone() for name, param in model.named_parameters()}
    for wrapper in ("module.", "_fsdp_wrapped_module.", "_orig_mod."):
        found = {name.replace(wrapper, ""): value for name, value in found.items()}
    return found


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def applied(model: Any, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients that SGD has stepped with."""
    after = whole_weights(model)
    return {name: (before[name] - after[name]) / LR for name in before}


def check_applied(model: Any, before: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """A difference of weights below 1, over the learning rate."""
    for name, grad in applied(model, before).items():
        torch.testing.assert_close(grad.double(), expected[name], rtol=1e-5, atol=2**-23 / LR)


def norm_clipped(grads: dict[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    clipped = reference.clip_norm(list(grads.values()), max_norm)
    return dict(zip(grads, clipped, strict=True))


def check_report(report: Any, norm: Tensor) -> None:
    assert isinstance(report, distclip.Report)
    assert report.clipped
    torch.testing.assert_close(report.total_norm.double(), norm, rtol=1e-6, atol=0)


def collect() -> None:
    gc.collect()
