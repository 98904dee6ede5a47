"""What `lightning_runs` makes of Lightning's classes; importing it imports Lightning."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import distclip
from distclip.adapters.lightning import DistClip
from tests.support.lightning_runs import BATCH, LIMIT, LR, WORLD, loss_of, make_net, samples

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


class Net(pl.LightningModule):
    """SGD on the tiny network; `shard` is how `ModelParallelStrategy` lets a model do it."""

    def __init__(self, shard: str = "", lr: float = LR, **sgd: Any) -> None:
        super().__init__()
        self.net = make_net()
        self.shard, self.sgd = shard, {"lr": lr, **sgd}

    def configure_model(self) -> None:
        if self.shard:
            shard(self.net, self.shard, self.device_mesh)
        self.shard = ""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return loss_of(self.net, *batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), **self.sgd)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", loss_of(self.net, *batch), sync_dist=True)

    test_step = validation_step


def shard(net: nn.Sequential, how: str, mesh: Any) -> None:
    if how == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in (net[0], net[2], net):
            fully_shard(layer, mesh=mesh["data_parallel"])
    else:
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(net, mesh["tensor_parallel"], plan)


class OnCPU(FSDPStrategy):
    """The Trainer refuses its own class without a GPU, by its type alone, and so does torch where
    the strategy names no device: `torch.device("cpu").index` is None.
    """

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )


class Log(Logger):
    """What a logger of the Trainer is given."""

    name, version = "log", 0

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.norms += [value for name, value in metrics.items() if name == "grad_norm"]


class Norms(pl.Callback):
    """The norms of the reports and of the Trainer's metrics, after each step."""

    def __init__(self, clip: DistClip) -> None:
        self.clip = clip
        self.reports: list[distclip.Report] = []
        self.logged: list[float] = []

    @property
    def norms(self) -> list[float]:
        return [report.total_norm.item() for report in self.reports]

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        report = self.clip.report
        if report is not None and (not self.reports or report is not self.reports[-1]):
            self.reports.append(report)
            if "grad_norm" in trainer.callback_metrics:
                self.logged.append(trainer.callback_metrics["grad_norm"].item())


def strategy(name: str) -> Any:
    return {
        "ddp": DDPStrategy,
        "ddp_unused": lambda: DDPStrategy(find_unused_parameters=True),
        "fsdp": lambda: OnCPU(auto_wrap_policy={nn.Linear}),
        "fsdp_flat": lambda: OnCPU(use_orig_params=False),
        "fsdp_sharded": lambda: OnCPU(auto_wrap_policy={nn.Linear}, state_dict_type="sharded"),
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        "tp": lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2),
        "single": lambda: "auto",
    }[name]()


def world_of(layout: str) -> int:
    """Over how many ranks the batches are dealt."""
    return 1 if layout in ("single", "tp") else WORLD


def loader(layout: str, steps: int) -> DataLoader[Any]:
    world = world_of(layout)
    dealt: Any = samples(steps * BATCH * world)
    rank = dist.get_rank() if world > 1 else 0
    sampler = DistributedSampler(dealt, num_replicas=world, rank=rank, shuffle=False)
    return DataLoader(dealt, batch_size=BATCH, sampler=sampler)


def trainer(layout: str, *callbacks: Any, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1 if layout == "single" else WORLD,
        strategy=strategy(layout),
        callbacks=list(callbacks),
        **{
            "max_epochs": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "use_distributed_sampler": False,
            **options,
        },
    )


def net_for(layout: str, **options: Any) -> Net:
    return Net(shard=layout if layout in ("fsdp2", "tp") else "", **options)


def amp(scale: float = 1024.0) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))


class Run(Norms):
    """A Trainer with DistClip, to be fitted."""

    save_to = ""

    def __init__(self, layout: str, policy: Any = None, *others: Any, **options: Any) -> None:
        clip = (
            policy if isinstance(policy, DistClip) else DistClip(policy or distclip.ClipNorm(LIMIT))
        )
        super().__init__(clip)
        self.layout = layout
        self.accumulate = options.get("accumulate_grad_batches", 1)
        self.trainer = trainer(layout, clip, *others, self, **options)

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        if self.save_to:
            trainer.save_checkpoint(self.save_to)

    def fit(self, steps: int, net: Any = None, **kwargs: Any) -> Run:
        self.net = net or net_for(self.layout)
        self.trainer.fit(self.net, loader(self.layout, steps * self.accumulate), **kwargs)
        return self
