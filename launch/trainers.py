"""DeepSpeed's ZeRO as a layout: its engine does backward and step, and distclip clips inside them."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ranks import UserError
from torch import nn

import distclip

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
TAG = "zero"  # the folder of the engine's own files inside a checkpoint


@dataclass(frozen=True)
class Zero:
    """An engine and its policy: what `train.py` steps in the place of an optimizer and a scaler."""

    engine: Any
    clipper: Any

    @property
    def optimizer(self) -> Any:
        return self.engine.optimizer

    def update(self, loss: torch.Tensor) -> distclip.Report:
        self.engine.backward(loss)
        self.engine.step()
        return self.clipper.report

    def save(self, folder: Path) -> None:
        """Collective: every rank must call it."""
        self.engine.save_checkpoint(str(folder), tag=TAG)

    def load(self, folder: Path) -> None:
        """Collective: every rank must call it."""
        if not (folder / TAG).is_dir():
            raise UserError(f"checkpoint {folder} is of a run without ZeRO: use its --layout, or another --out")
        self.engine.load_checkpoint(str(folder), tag=TAG)


def start_engine(model: nn.Module, optimizer: torch.optim.Optimizer, options: Any, device: torch.device) -> Zero:
    """The engine of `--layout zero1|zero2|zero3`, with the policy attached.

    Collective: every rank must call it.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, alone)  # DeepSpeed reads them; without a launcher there is one rank
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
    except ImportError:
        raise UserError(
            f"--layout {options.layout} needs DeepSpeed: pip install --no-build-isolation deepspeed"
        ) from None
    if device.type == "cpu":
        # Compiled as soon as ranks join, for inference alone; without it no compiler is needed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    warnings.filterwarnings(
        "ignore", message=".*(all_gather_into|reduce_scatter)_tensor. is deprecated", category=FutureWarning
    )
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=_config(options))
        return Zero(engine, distclip.adapters.deepspeed.attach(engine, options.policy))
    except ValueError as error:  # fp16 on a CPU that lacks it, an --policy.exclude that matches nothing
        raise UserError(str(error)) from None


def _config(options: Any) -> dict[str, Any]:
    precision = {} if options.precision == "fp32" else {options.precision: {"enabled": True}}
    return {
        "train_batch_size": options.batch,
        "zero_optimization": {"stage": STAGES[options.layout]},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        **precision,
    }
