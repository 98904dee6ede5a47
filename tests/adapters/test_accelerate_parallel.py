"""accelerate: tensor parallelism, several meshes, and DeepSpeed."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from distclip import ClipNorm, ClipTensorNorm, ClipValue, ZClip
from tests.support import accelerated as acc
from tests.support import engines, reference
from tests.support.ranks import Ranks

pytest.importorskip("accelerate")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)

MAX_NORM = 0.5


def prepare(*args: Any, **kwargs: Any) -> Any:
    from distclip.adapters.accelerate import prepare

    return prepare(*args, **kwargs)


class Even(nn.Module):
    """Tensor parallelism needs sizes that the ranks divide; `last` is a plain module."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.down(torch.tanh(self.up(x))))


def make_even() -> Even:
    torch.manual_seed(0)
    return Even()


def tensor_parallel() -> None:
    """Every rank has the same batch; `last` lies on all as plain tensors beside DTensors."""
    from accelerate import ParallelismConfig

    whole = make_even().double()
    acc.loss_of(whole, acc.batch(0, 0).double()).backward()
    expected = {name: param.grad for name, param in whole.named_parameters()}
    for policy in (ClipNorm(MAX_NORM), ClipTensorNorm(MAX_NORM), ClipValue(0.02)):
        config = ParallelismConfig(tp_size=2)
        with acc.accelerator_for("tp", parallelism_config=config) as accelerator:
            net = make_even()
            on = accelerator.torch_device_mesh["tp"]
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            net = parallelize_module(net, on, plan)
            net.tp_size = net._tp_size = 2  # as transformers marks what it has sharded
            model, optimizer = acc.prepared(accelerator, net=net)
            clipper = prepare(accelerator, model, optimizer, policy)
            before = acc.whole_weights(model)
            accelerator.backward(acc.loss_of(model, acc.batch(0, 0)))
            report = clipper.step()
            grads = list(expected.values())
            if isinstance(policy, ClipValue):
                clipped = reference.clip_value(grads, 0.02)
            elif isinstance(policy, ClipTensorNorm):
                clipped = reference.clip_tensor_norm(grads, MAX_NORM)
            else:
                clipped = reference.clip_norm(grads, MAX_NORM)
                acc.check_report(report, acc.whole_norm(expected))
            acc.check_applied(model, before, dict(zip(expected, clipped, strict=True)))


def test_tensor_parallel(two_accelerated_ranks: Ranks) -> None:
    two_accelerated_ranks.run(tensor_parallel)


def fsdp2_on_a_mesh_of_its_own() -> None:
    """A frozen part and one that `ignored_modules` leaves plain, beside sharded parameters."""
    expected = acc.whole_gradients(1)
    with acc.accelerator_for("fsdp2") as accelerator:
        net = acc.make_net()
        accelerator.state.fsdp_plugin.ignored_modules = [net.head]
        model, optimizer = acc.prepared(accelerator, net=net)
        kinds = {type(p).__name__ for p in model.parameters()}
        assert kinds == {"DTensor", "Parameter"} or len(kinds) == 2, kinds
        clipper = prepare(accelerator, model, optimizer, ClipNorm(MAX_NORM))
        before = acc.whole_weights(model)
        acc.run_backward(accelerator, model)
        for param in model.head.parameters():  # FSDP2 leaves these to the user
            dist.all_reduce(param.grad)
            param.grad /= 2
        acc.check_report(clipper.step(), acc.whole_norm(expected))
        acc.check_applied(model, before, acc.norm_clipped(expected, MAX_NORM))


def test_fsdp2_beside_plain_parameters(two_accelerated_ranks: Ranks) -> None:
    two_accelerated_ranks.run(fsdp2_on_a_mesh_of_its_own)


def engine_accelerator(stage: int, gas: int) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"
    )
    engines.load()
    forget()
    plugin = DeepSpeedPlugin(hf_ds_config=engines.config(stage, gas=gas))
    return Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=gas)


def forget() -> None:
    """What accelerate keeps for a whole process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def refused_under_deepspeed(accelerator: Any, model: Any, optimizer: Any, clipper: Any) -> None:
    with pytest.raises(ValueError, match="cannot use overlap= under DeepSpeed"):
        prepare(accelerator, model, optimizer, overlap=True)
    with pytest.raises(ValueError, match="this generator under DeepSpeed"):
        prepare(accelerator, model.parameters(), optimizer)
    with pytest.raises(ValueError, match="again"):
        prepare(accelerator, model, optimizer)
    with pytest.raises(ValueError, match="cannot scale or count this step under DeepSpeed"):
        clipper.clip_(scale=0.5)
    with pytest.raises(ValueError, match="cannot evaluate a closure under DeepSpeed"):
        clipper.step(closure=lambda: None)


def under_deepspeed(stage: int, folder: str) -> None:
    gas = 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerator = engine_accelerator(stage, gas)
        net = engines.make_model()
        raw = engines.sgd(engines.param_groups(net))
        with pytest.raises(ValueError, match="this Sequential under DeepSpeed"):
            prepare(accelerator, net, raw)
        model, optimizer = accelerator.prepare(net, raw)
        policy = ZClip(warmup_steps=2) & ClipNorm(0.5)
        clipper = prepare(accelerator, model, optimizer, policy)
        refused_under_deepspeed(accelerator, model, optimizer, clipper)
        before = engines.masters(model)
        for micro in range(gas):
            with accelerator.accumulate(model):
                inputs, targets = engines.batch(0, dist.get_rank(), micro)
                accelerator.backward(engines.loss_of(model, inputs, targets))
                first, second = clipper.clip_(), clipper.step()
                assert first is second is clipper.report
                assert (first is None) == (micro == 0)
                optimizer.step()
                optimizer.zero_grad()
        assert engines.norm_of(engines.updates(model, before)) == pytest.approx(0.5, rel=1e-5)
        whole = engines.norm_of(engines.whole_gradients(0, gas))
        assert clipper.report.total_norm.item() == pytest.approx(whole, rel=1e-6)
        accelerator.save_state(folder)
        accelerator.wait_for_everyone()
        saved = clipper.state_dict()
        assert (Path(folder) / "distclip.bin").exists()
        clipper.detach()
        clipper = prepare(accelerator, model, optimizer, policy)
        accelerator.load_state(folder)
        torch.testing.assert_close(clipper.state_dict(), saved, rtol=0, atol=0)
        # The same accelerator with another engine.
        accelerator.free_memory()
        engines.forget_groups()
        net = engines.make_model()
        model, optimizer = accelerator.prepare(net, engines.sgd(engines.param_groups(net)))
        again = prepare(accelerator, model, optimizer, policy)
        with pytest.raises(RuntimeError, match="was detached"):
            clipper.step()
        again.detach()
        model.destroy()
        forget()


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeed(two_engine_ranks: Ranks, tmp_path: Path, stage: int) -> None:
    two_engine_ranks.run(under_deepspeed, stage, str(tmp_path))
