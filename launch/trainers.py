"""One update of the weights from a loss: by a torch optimizer, or by DeepSpeed's engine.

All ranks must call each method of a trainer together.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

import distclip
from launch.dcp_reader import SafePlanner, SafeReader
from launch.options import Options
from launch.ranks import UserError

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
ENGINE_FOLDER = "zero"  # for the engine's own files inside a checkpoint


class TorchTrainer(Stateful):
    """Backward, clip and step, for every layout that torch has."""

    def __init__(self, model: nn.Module, options: Options[Any], device: torch.device) -> None:
        self.model, self.optimizer = model, _make_optimizer(model, options)
        self.scaler = GradScaler(device.type, enabled=options.precision == "fp16")
        self.clipper = distclip.Clipper(
            model, options.policy, tensor_norms=options.tensor_norms or False
        )

    def update(self, loss: Tensor) -> distclip.Report:
        self.scaler.scale(loss).backward()
        report = self.clipper.step(self.optimizer, self.scaler)
        self.scaler.update()
        self.optimizer.zero_grad()
        return report

    def save(self, folder: Path) -> None:
        dcp.save(self._states(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        _load(self._states(), folder)

    def _states(self) -> dict[str, Any]:
        return {"training": self, "clipper": self.clipper, "scaler": self.scaler}

    def state_dict(self) -> dict[str, Any]:
        """Model and optimizer, by names that are the same in every layout."""
        with warnings.catch_warnings():
            # FSDP1 asks for a device in a way that torch has deprecated; its answer is right.
            for message in (".*_get_pg_default_device.*", "Multiple backends are registered.*"):
                warnings.filterwarnings("ignore", message=message)
            model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        model, optimizer = state["model"], state["optimizer"]
        states = {"model_state_dict": model, "optim_state_dict": optimizer}
        set_state_dict(self.model, self.optimizer, **states)

    def close(self) -> None: ...


class ZeroTrainer:
    """DeepSpeed's ZeRO: its engine does backward and step, and distclip clips inside the step."""

    def __init__(self, model: nn.Module, options: Options[Any], device: torch.device) -> None:
        deepspeed = _import_deepspeed(options.layout, device)
        precision = {} if options.precision == "fp32" else {options.precision: {"enabled": True}}
        config = {
            "train_batch_size": options.batch,
            "zero_optimization": {"stage": STAGES[options.layout]},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
            **precision,
        }
        optimizer = _make_optimizer(model, options)
        self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.optimizer = self.model.optimizer
        self.clipper = distclip.adapters.deepspeed.attach(self.model, options.policy)

    def update(self, loss: Tensor) -> distclip.Report:
        self.model.backward(loss)
        self.model.step()
        assert self.clipper.report is not None
        return self.clipper.report

    def save(self, folder: Path) -> None:
        dcp.save({"clipper": self.clipper}, checkpoint_id=folder)
        self.model.save_checkpoint(str(folder), tag=ENGINE_FOLDER)

    def load(self, folder: Path) -> None:
        if not (folder / ENGINE_FOLDER).is_dir():
            raise UserError(
                f"checkpoint {folder} is of a run without ZeRO: use its --layout, or another --out"
            )
        self.model.load_checkpoint(str(folder), tag=ENGINE_FOLDER)
        _load({"clipper": self.clipper}, folder)

    def close(self) -> None:
        self.model.destroy()


Trainer = TorchTrainer | ZeroTrainer


def make_trainer(model: nn.Module, options: Options[Any], device: torch.device) -> Trainer:
    """The trainer of a model that is wrapped for `options.layout`."""
    try:
        return (ZeroTrainer if options.layout in STAGES else TorchTrainer)(model, options, device)
    except ValueError as error:  # as where --policy.exclude matches nothing
        raise UserError(str(error)) from None


def _make_optimizer(model: nn.Module, options: Options[Any]) -> Optimizer:
    params = list(model.parameters())
    # A foreach kernel refuses DTensors beside plain tensors, which an LSTM under tp has.
    mixed = len({isinstance(param, DTensor) for param in params}) > 1
    foreach = False if mixed else None
    if options.optimizer == "adamw":
        return AdamW(params, lr=options.lr, betas=(0.9, 0.95), foreach=foreach)
    return SGD(params, lr=options.lr, foreach=foreach)


def _load(states: dict[str, Any], folder: Path) -> None:
    dcp.load(states, storage_reader=SafeReader(folder), planner=SafePlanner())


def _import_deepspeed(layout: str, device: torch.device) -> Any:
    # DeepSpeed reads these; without a launcher there is one rank.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in {"DS_ACCELERATOR": device.type, **alone}.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
    except ImportError:
        raise UserError(
            f"--layout {layout} needs DeepSpeed: pip install --no-build-isolation deepspeed"
        ) from None
    if device.type == "cpu":
        # DeepSpeed would compile it, for inference alone; without it no compiler is needed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    deprecated = ".*(all_gather_into|reduce_scatter)_tensor. is deprecated"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
    return deepspeed
