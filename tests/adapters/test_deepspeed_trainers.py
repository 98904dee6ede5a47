"""The trainers of accelerate and transformers, in which backward and step are one call."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from distclip.adapters.deepspeed import attach
from tests.support import engines
from tests.support.engines import config, norm_of
from tests.support.ranks import Ranks


def needs(*names: str) -> pytest.MarkDecorator:
    lacking = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(lacking), reason=f"needs {', '.join(lacking)}")


pytestmark = needs("deepspeed")


def environment() -> None:
    """As torchrun would set it, on a machine without GPUs."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"
    )
    engines.load()


def accelerated(stage: int) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin

    environment()
    AcceleratorState._reset_state(reset_partial_state=True)
    gas = 2
    plugin = DeepSpeedPlugin(hf_ds_config=config(stage, gas=gas))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=gas)
        model = engines.make_model()
        made, optimizer = accelerator.prepare(model, engines.sgd(engines.param_groups(model)))
        handle = attach(made, distclip.ClipNorm(0.5))
        before = engines.masters(made)
        for micro in range(gas):
            with accelerator.accumulate(made):
                inputs, targets = engines.batch(0, dist.get_rank(), micro)
                accelerator.backward(engines.loss_of(made, inputs, targets))
                if accelerator.sync_gradients:  # under DeepSpeed the next call only reports
                    accelerator.clip_grad_norm_(made.parameters(), 1e-3)
                optimizer.step()
                optimizer.zero_grad()
        assert norm_of(engines.updates(made, before)) == pytest.approx(0.5, rel=1e-5)
        whole = norm_of(engines.whole_gradients(0, gas))
        assert handle.report.total_norm.item() == pytest.approx(whole, rel=1e-6)
        made.destroy()
        AcceleratorState._reset_state(reset_partial_state=True)


@needs("accelerate")
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_accelerate(two_engine_ranks: Ranks, stage: int) -> None:
    two_engine_ranks.run(accelerated, stage)


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = engines.make_model()
        self.seen: list[tuple[Tensor, Tensor]] = []  # the Trainer chooses the order of its data

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.seen.append((inputs, labels))
        return {"loss": engines.loss_of(self.body, inputs, labels)}


def samples(num: int) -> list[dict[str, Tensor]]:
    dealt = [engines.batch(step, 0) for step in range(num // engines.BATCH)]
    return [
        {"inputs": i, "labels": t}
        for inputs, targets in dealt
        for i, t in zip(inputs, targets, strict=True)
    ]


def norm_of_seen(model: Regression, gas: int) -> float:
    """Of the first step's gradients, in one process with the batches of both ranks."""
    dist.all_gather_object(everyone := [None, None], model.seen[:gas])
    wide = engines.make_model().double()
    for inputs, targets in everyone[0] + everyone[1]:
        (engines.loss_of(wide, inputs, targets.double(), torch.float64) / (2 * gas)).backward()
    return norm_of({name: p.grad for name, p in wide.named_parameters()})


def trained(stage: int, folder: str) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    environment()
    steps, gas = 2, 2
    handles: list[Any] = []
    norms: list[float] = []

    class Clip(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            handles.append(attach(trainer.model_wrapped, distclip.ClipNorm(0.5)))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            norms.append(handles[0].report.total_norm.item())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=engines.BATCH,
            gradient_accumulation_steps=gas,
            max_steps=steps,
            optim="sgd",
            learning_rate=engines.LR,
            lr_scheduler_type="constant",
            max_grad_norm=1e-3,
            deepspeed=config(stage, gas=gas) | {"gradient_clipping": "auto"},
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        model = Regression()
        trainer = Trainer(
            model,
            arguments,
            train_dataset=samples(2 * steps * gas * engines.BATCH),
            callbacks=[Clip()],
        )
        trainer.train()
    assert norms[0] == pytest.approx(norm_of_seen(model, gas), rel=1e-6)
    assert len(norms) == steps
    start = {f"body.{n}": p for n, p in engines.make_model().named_parameters()}
    moved = {
        n: (start[n] - p) / engines.LR for n, p in engines.masters(trainer.model_wrapped).items()
    }
    assert 0.5 < norm_of(moved) <= 1.0 + 1e-5  # two steps of 0.5 each, and not of 0.001
    trainer.model_wrapped.destroy()
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@needs("accelerate", "transformers")
@pytest.mark.parametrize("stage", [2, 3])
def test_the_transformers_trainer(two_engine_ranks: Ranks, tmp_path: Path, stage: int) -> None:
    two_engine_ranks.run(trained, stage, str(tmp_path))
