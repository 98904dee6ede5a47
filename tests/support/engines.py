"""Real DeepSpeed engines on the ranks of a pool: a small model, many configurations."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional as F

import distclip
from tests.support import reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH = 4  # sequences per rank and micro-batch
LR = 1 / 16  # so small that the weights stay below 1, and a power of two: updates over it are exact
# A weight minus its successor, over the learning rate: half a unit in the last place of a weight
# below 1.
APPLIED = {"rtol": 2e-6, "atol": 0.5 * 2**-23 / LR}


@functools.cache
def load() -> Any:
    """DeepSpeed, without what it compiles when it starts."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["DS_BUILD_OPS"] = "0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Where the CPU has no instructions for fp16 DeepSpeed refuses it; torch computes it slowly.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Pipelines and experts are made before an engine.
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    gc.freeze()  # each ZeRO-3 engine collects garbage: a quarter of a second among these modules
    return deepspeed


def make_model(seed: int = 0) -> nn.Sequential:
    """Tensors of odd sizes, so that partitions cut them."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 11), nn.Tanh(), nn.Linear(11, 5)
    )


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [{"params": params[:3]}, {"params": params[3:]}]


@functools.cache
def has_fp16() -> bool:
    try:
        make_model().half()(torch.zeros(1, 7, dtype=torch.float16)).sum().backward()
    except RuntimeError:
        return False
    return True


def skip_without_fp16() -> None:
    if not has_fp16():
        pytest.skip("torch computes nothing in fp16 on this CPU")


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=LR)


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.01)


def config(
    stage: int, dtype: str = "fp32", gas: int = 1, offload: bool = False, **more: Any
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 150}
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 100,
            "stage3_prefetch_bucket_size": 40,
            "sub_group_size": 30,
        }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": gas,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }
    if dtype == "bf16":
        made["bf16"] = {"enabled": True}
    if dtype == "fp16":
        made["fp16"] = {"enabled": True, "loss_scale": 256.0}
    return made | more


@contextmanager
def engine(
    settings: dict[str, Any],
    model: nn.Module | None = None,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = sgd,
    groups: Callable[[nn.Module], Any] = param_groups,
    **more: Any,
) -> Iterator[Any]:
    deepspeed = load()
    model = make_model() if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = None if make_optimizer is None else make_optimizer(groups(model))
        made, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=copy.deepcopy(settings), **more
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="deepspeed|torch")
            yield made
    finally:
        made.destroy()
        forget_groups()


def forget_groups() -> None:
    """What DeepSpeed keeps of one engine's process groups, and would use for the next engine."""
    from deepspeed.utils import groups

    groups.mpu = None
    for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
        getattr(groups, name).clear()


def batch(step: int, rank: int, micro: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    inputs, targets = (
        torch.randn(BATCH, 7, generator=generator),
        torch.randn(BATCH, 5, generator=generator),
    )
    return inputs, targets * (1 + step % 3)  # norms that rise and fall


def loss_of(
    module: nn.Module, inputs: Tensor, targets: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    return 20 * F.mse_loss(module(inputs.to(dtype)).float(), targets)


def train_step(
    made: Any, step: int, dtype: str = "fp32", gas: int = 1, rank: int | None = None
) -> None:
    for micro in range(gas):
        inputs, targets = batch(step, dist.get_rank() if rank is None else rank, micro)
        made.backward(loss_of(made, inputs, targets, DTYPES[dtype]))
        made.step()


def whole_gradients(
    step: int, gas: int = 1, ranks: int = 2, model: nn.Module | None = None
) -> dict[str, Tensor]:
    """Those of one process with the whole batch, in float64."""
    wide = (make_model() if model is None else model).double()
    for micro in range(gas):
        for rank in range(ranks):
            inputs, targets = (t.double() for t in batch(step, rank, micro))
            (20 * F.mse_loss(wide(inputs), targets) / (gas * ranks)).backward()
    return {name: p.grad.detach() for name, p in wide.named_parameters() if p.grad is not None}


def masters(made: Any) -> dict[str, Tensor]:
    """The float32 weights, whole, on every rank: by DeepSpeed's own means."""
    from deepspeed.utils import safe_get_full_fp32_param

    optimizer = made.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        master_of = {p: p for p in made.module.parameters()}
    elif hasattr(optimizer, "fp32_groups"):  # FP16_UnfusedOptimizer
        params = itertools.chain(*optimizer.fp16_groups)
        master_of = dict(zip(params, itertools.chain(*optimizer.fp32_groups), strict=True))
    elif hasattr(optimizer, "fp32_groups_flat"):  # FP16_Optimizer
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True)
        master_of = {
            param: values.view(param.shape)
            for params, flat in groups
            for param, values in zip(params, flat.split([p.numel() for p in params]), strict=True)
        }
    else:
        master_of = {p: safe_get_full_fp32_param(p) for p in made.module.parameters()}
    named = made.module.named_parameters()
    return {name: master_of[p].detach().double().clone() for name, p in named}


def gradients(made: Any, scale: float = 1.0) -> dict[str, Tensor]:
    """What the engine is about to apply, whole and in float64: by DeepSpeed's own means."""
    from deepspeed.utils import safe_get_full_grad

    named = made.module.named_parameters()
    return {name: safe_get_full_grad(p).detach().double().clone() / scale for name, p in named}


def backward(made: Any, step: int, dtype: str = "fp32", gas: int = 1) -> None:
    """All of a step but its last `engine.step()`."""
    for micro in range(gas):
        inputs, targets = batch(step, dist.get_rank(), micro)
        made.backward(loss_of(made, inputs, targets, DTYPES[dtype]))
        if micro < gas - 1:
            made.step()


class Applied:
    """One step of SGD: the gradients before it, what was applied, and the weights before it."""

    def __init__(
        self, made: Any, step: int, dtype: str = "fp32", gas: int = 1, scale: float = 1.0
    ) -> None:
        backward(made, step, dtype, gas)
        self.grads, self.weights = gradients(made, scale), masters(made)
        made.step()
        self.update = updates(made, self.weights)


def updates(made: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What SGD has subtracted from `weights` since, over the learning rate."""
    return {name: (weights[name] - after) / LR for name, after in masters(made).items()}


def check_applied(update: dict[str, Tensor], expected: Sequence[Tensor]) -> None:
    for (name, found), want in zip(update.items(), expected, strict=True):
        torch.testing.assert_close(found, want, **APPLIED, msg=lambda text, n=name: f"{n}: {text}")


@contextmanager
def collectives() -> Iterator[list[int]]:
    """The number of collectives that each decision inside makes."""
    counts: list[int] = []
    decide = distclip.step.decide

    def counting(*args: Any, **kwargs: Any) -> Any:
        with CommDebugMode() as comms:
            decision = decide(*args, **kwargs)
        counts.append(comms.get_total_counts())
        return decision

    with mock.patch.object(distclip.step, "decide", counting):
        yield counts


def attach_quietly(made: Any, *args: Any) -> Any:
    """`attach` where the config has `gradient_clipping` as well, which it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return distclip.adapters.deepspeed.attach(made, *args)


def norm_of(tensors: dict[str, Tensor], norm_type: float = 2.0) -> float:
    return reference.total_norm(list(tensors.values()), norm_type).item()
