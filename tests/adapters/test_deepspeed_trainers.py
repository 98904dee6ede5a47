"""Checkpoints of DeepSpeed engines, and the trainers in which backward and step are one call."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from tests.adapters.test_deepspeed import attach, check_applied
from tests.support import engines, reference
from tests.support.engines import Applied, config, engine, norm_of
from tests.support.ranks import Ranks


def needs(*names: str) -> pytest.MarkDecorator:
    lacking = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(lacking), reason=f"needs {', '.join(lacking)}")


pytestmark = needs("deepspeed")


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


def one_rank_alone() -> None:
    for stage in range(4):
        for policy, clip in (
            (distclip.ClipNorm(0.5), lambda g, w: reference.clip_norm(g, 0.5)),
            (distclip.AGC(0.02), lambda g, w: reference.agc(w, g, 0.02)),
        ):
            with engine(config(stage)) as made:
                attach(made, policy)
                step = Applied(made, 0)
                check_applied(step.update, clip(list(step.grads.values()), list(step.weights.values())))


@pytest.mark.ranks
def test_one_rank_alone() -> None:
    ranks = Ranks(1)
    try:
        ranks.run(one_rank_alone)
    finally:
        ranks.stop()


POLICIES = {
    "adagc": distclip.AdaGC(ratio=0.9, max_norm=2.0, beta=0.9, warmup_steps=2),
    "zclip": distclip.ZClip(z_thresh=0.5, warmup_steps=2, max_norm=8.0),
}


def resumed(stage: int, dtype: str, name: str, folder: str, attach_first: bool) -> None:
    settings = config(stage, dtype, gradient_clipping=0.01)
    with engine(settings, make_optimizer=engines.adamw) as made:
        handle = quietly_attached(made, name)
        for step in range(3):
            engines.train_step(made, step, dtype)
        made.save_checkpoint(folder, client_state={"clipper": handle.state_dict()})
        for step in range(3, 6):
            engines.train_step(made, step, dtype)
        expected, end = engines.masters(made), str(handle.state_dict())
    with engine(settings, engines.make_model(seed=1), make_optimizer=engines.adamw) as made:
        handle = quietly_attached(made, name) if attach_first else None
        _, client_state = made.load_checkpoint(folder)
        handle = quietly_attached(made, name) if handle is None else handle
        handle.load_state_dict(client_state["clipper"])
        for step in range(3, 6):
            engines.train_step(made, step, dtype)
            assert getattr(made.optimizer, "clip_grad", 0.0) == 0.0  # load_checkpoint had put it back
        found = engines.masters(made)
        assert all(torch.equal(found[n], weights) for n, weights in expected.items())
        assert str(handle.state_dict()) == end


def quietly_attached(made: Any, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that gradient_clipping is set as well
        return attach(made, POLICIES[name])


@pytest.mark.parametrize(
    ("stage", "dtype", "name", "attach_first"),
    [
        (0, "fp32", "adagc", True),
        (0, "bf16", "zclip", True),
        (1, "fp32", "adagc", True),
        (2, "bf16", "adagc", False),
        (2, "fp32", "zclip", True),
        (3, "fp32", "adagc", True),
    ],
)
def test_a_resumed_run_goes_on_to_the_same_bits(
    two_ranks: Ranks, tmp_path: Path, stage: int, dtype: str, name: str, attach_first: bool
) -> None:
    two_ranks.run(resumed, stage, dtype, name, str(tmp_path), attach_first)


def moved_between_stages(first: int, second: int) -> None:
    with engine(config(first)) as made:
        handle = attach(made, POLICIES["adagc"])
        for step in range(3):
            engines.train_step(made, step)
        saved = handle.state_dict()
    with engine(config(second)) as made:
        handle = attach(made, POLICIES["adagc"])
        handle.load_state_dict(saved)
        assert str(handle.state_dict()) == str(saved)
        with pytest.raises(ValueError, match="cannot load the state of a Clipper"):
            handle.load_state_dict({"version": 1, "groups": {"all": {"ZClip": {}}}})


def test_a_state_fits_another_stage(two_ranks: Ranks) -> None:
    two_ranks.run(moved_between_stages, 0, 3)
    two_ranks.run(moved_between_stages, 3, 2)


# --- accelerate and transformers -------------------------------------------------------------------------------------


def environment() -> None:
    """As torchrun would set it, on a machine without GPUs."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
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
        handle = distclip.adapters.deepspeed.attach(made, distclip.ClipNorm(0.5))
        before = engines.masters(made)
        for micro in range(gas):
            with accelerator.accumulate(made):
                accelerator.backward(engines.loss_of(made, *engines.batch(0, dist.get_rank(), micro)))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(made.parameters(), 1e-3)  # under DeepSpeed it only reports
                optimizer.step()
                optimizer.zero_grad()
        update = {n: (before[n] - after) / engines.LR for n, after in engines.masters(made).items()}
        assert norm_of(update) == pytest.approx(0.5, rel=1e-5)
        whole = norm_of(engines.whole_gradients(0, gas))
        assert handle.report.total_norm.item() == pytest.approx(whole, rel=1e-6)
        made.destroy()
        AcceleratorState._reset_state(reset_partial_state=True)


@needs("accelerate")
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_accelerate(two_ranks: Ranks, stage: int) -> None:
    two_ranks.run(accelerated, stage)


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
    return [{"inputs": i, "labels": t} for inputs, targets in dealt for i, t in zip(inputs, targets, strict=True)]


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
            handles.append(distclip.adapters.deepspeed.attach(trainer.model_wrapped, distclip.ClipNorm(0.5)))

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
    moved = {n: (start[n] - p) / engines.LR for n, p in engines.masters(trainer.model_wrapped).items()}
    assert 0.5 < norm_of(moved) <= 1.0 + 1e-5  # two steps of 0.5 each, and not of 0.001
    trainer.model_wrapped.destroy()
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@needs("accelerate", "transformers")
@pytest.mark.parametrize("stage", [2, 3])
def test_the_transformers_trainer(two_ranks: Ranks, tmp_path: Path, stage: int) -> None:
    two_ranks.run(trained, stage, str(tmp_path))
