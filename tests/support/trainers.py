"""The Trainer of transformers with a small model, and the same training whole in float64."""

from __future__ import annotations

import copy
import gc
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support import reference

LR = 0.03125
MAX_NORM = 0.5
Clip = Callable[[list[Tensor]], list[Tensor]]


class Net(nn.Module):
    """Remembers what it was trained with: the Trainer chooses the order of its data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.seen.append((inputs.clone(), labels.clone()))
        out = self.second(self.first(inputs).tanh())
        return {"loss": (10 * out - labels).square().mean()}


def samples(num: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "inputs": torch.randn(4, generator=generator),
            "labels": torch.randn(3, generator=generator),
        }
        for _ in range(num)
    ]


def arguments(folder: str, **options: Any) -> Any:
    from transformers import TrainingArguments

    defaults: dict[str, Any] = {
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "optim": "sgd",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(folder, **defaults | options)


def trainer(
    folder: str,
    callbacks: Sequence[Any],
    model: nn.Module | None = None,
    num: int = 8,
    make: Any = None,
    **options: Any,
) -> Any:
    """A Trainer, whose constructor gets the options that are no arguments of training."""
    from transformers import Trainer

    own = ("optimizers", "model_init", "eval_dataset", "compute_loss_func")
    given = {name: options.pop(name) for name in own if name in options}
    if "model_init" not in given:
        given["model"] = Net() if model is None else model
    return (make or Trainer)(
        args=arguments(folder, **options),
        train_dataset=samples(num),
        callbacks=list(callbacks),
        **given,
    )


@contextmanager
def quiet(shards: bool = False) -> Any:
    """Without the warnings of transformers and accelerate, and with their state as it was."""
    from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")  # nobody connects: the process group is there
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # The ranks are shared: a Trainer on DeepSpeed leaves ACCELERATE_USE_DEEPSPEED behind.
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    before = set(os.environ)
    try:
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore")
            if shards:
                # On CPUs accelerate leaves out FSDP, although it works there.
                os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
                os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
                found = ("gloo", DistributedType.MULTI_GPU)
                patch = mock.patch.object(PartialState, "_prepare_backend", return_value=found)
                stack.enter_context(patch)
            yield
    finally:
        for name in set(os.environ) - before:
            del os.environ[name]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        gc.collect()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def norms_of(trained: Any) -> list[float]:
    return [log["grad_norm"] for log in trained.state.log_history if "loss" in log]


def clip_norm(grads: list[Tensor]) -> list[Tensor]:
    return reference.clip_norm(grads, MAX_NORM)


def whole(
    seen: Sequence[Sequence[tuple[Tensor, Tensor]]],
    micro_batches: Sequence[int],
    clip: Clip = clip_norm,
    model: nn.Module | None = None,
    lr: float = LR,
) -> tuple[nn.Module, list[float]]:
    """The training in one process in float64, and the norm of each step.

    Args:
        seen: by each rank.
        micro_batches: how many each step accumulates.
    """
    model = copy.deepcopy(Net() if model is None else model).double()
    norms: list[float] = []
    at = 0
    for num in micro_batches:
        for inputs, labels in (pair for rank in seen for pair in rank[at : at + num]):
            loss = model(inputs.double(), labels.double())["loss"]
            (loss / (num * len(seen))).backward()
        at += num
        params = [p for p in model.parameters() if p.grad is not None]
        grads = [p.grad for p in params]
        norms.append(reference.total_norm(grads).item())
        with torch.no_grad():
            for param, grad in zip(params, clip(grads), strict=True):
                param.sub_(lr * grad)
        model.zero_grad()
    return model, norms


def everyone(value: Any) -> list[Any]:
    dist.all_gather_object(all_of := [None] * dist.get_world_size(), value)
    return all_of
