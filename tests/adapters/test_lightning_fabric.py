"""`clip_gradients` in the place of Fabric's, on two ranks, against one process in float64."""

from __future__ import annotations

import gc
import importlib.util
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip.adapters import frameworks
from tests.support import lightning_runs as runs
from tests.support import reference
from tests.support.lightning_runs import LIMIT, LR, WORLD, quietly, train_whole
from tests.support.ranks import Ranks, same_bits_everywhere

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="needs lightning"
)


def make(layout: str, scaler: Any = None, **sgd: Any) -> tuple[Any, Any, Any]:
    """A Fabric, and a model and an optimizer that it has set up."""
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import MixedPrecision
    from lightning.fabric.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
    from torch.distributed.fsdp import FullyShardedDataParallel

    class OnCPU(FSDPStrategy):
        def setup_module(self, module: nn.Module) -> nn.Module:
            cpu = torch.device("cpu")
            return FullyShardedDataParallel(module, device_id=cpu, **self._fsdp_kwargs)

    def parallelize(net: nn.Module, mesh: Any) -> nn.Module:
        runs.modules().shard(net, "fsdp2", mesh)
        return net

    strategies: dict[str, Any] = {
        "single": lambda: "auto",
        "ddp": DDPStrategy,
        "fsdp": lambda: OnCPU(auto_wrap_policy={nn.Linear}),
        "fsdp_flat": lambda: OnCPU(use_orig_params=False),
        "fsdp2": lambda: ModelParallelStrategy(parallelize, 2, 1),
    }
    fabric = Fabric(
        accelerator="cpu",
        devices=1 if layout == "single" else WORLD,
        strategy=strategies[layout](),
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)] if scaler is not None else [],
    )
    fabric.launch()
    options = {"lr": LR, **sgd}
    net = runs.make_net()
    if layout in ("fsdp_flat", "fsdp2"):
        model = fabric.setup_module(net)
        made = torch.optim.SGD(model.parameters(), **options)
        return fabric, model, fabric.setup_optimizers(made)
    return fabric, *fabric.setup(net, torch.optim.SGD(net.parameters(), **options))


def backward(fabric: Any, model: Any, batches: Any, spoiled_by: float = 1.0) -> None:
    """Rank 1 spoils its loss."""
    rank = dist.get_rank() if fabric.world_size > 1 else 0
    for batch in batches:
        mine = batch[rank :: fabric.world_size]
        inputs, targets = (torch.stack(each) for each in zip(*mine, strict=True))
        factor = spoiled_by if rank == 1 else 1.0
        fabric.backward(runs.loss_of(model, inputs, targets) * factor / len(batches))


def train(made: Any, steps: int = 3, policy: Any = None, **options: Any) -> list[distclip.Report]:
    from distclip.adapters.lightning import clip_gradients

    fabric, model, optimizer = made
    reports = []
    for batches in runs.whole_batches(steps, fabric.world_size):
        optimizer.zero_grad()
        backward(fabric, model, batches)
        policy = policy or distclip.ClipNorm(LIMIT)
        reports.append(clip_gradients(fabric, model, optimizer, policy, **options))
        optimizer.step()
    return reports


def norms_of(reports: list[distclip.Report]) -> list[float]:
    return [report.total_norm.item() for report in reports]


def strategies() -> None:
    for layout in ("single", "ddp", "fsdp", "fsdp_flat", "fsdp2"):
        with quietly():
            made = make(layout)
            reports = train(made)
        whole = train_whole(3, made[0].world_size)
        assert min(whole) > LIMIT
        assert norms_of(reports) == pytest.approx(whole, rel=3e-6), layout
        assert same_bits_everywhere(reports[-1].total_norm)


def test_every_strategy_clips_as_one_process(two_lightning_ranks: Ranks) -> None:
    two_lightning_ranks.run(strategies)


def several_modules() -> None:
    """One norm over two modules that one optimizer steps, set up one by one."""
    from distclip.adapters.lightning import clip_gradients, fabric_clipper

    for layout in ("ddp", "fsdp", "fsdp2"):
        with quietly():
            fabric, first, own = make(layout)
            second = fabric.setup_module(nn.Sequential(*runs.make_net()))
            both = [*first.parameters(), *second.parameters()]
            optimizer = fabric.setup_optimizers(torch.optim.SGD(both, lr=LR))
            for model, factor in ((first, 1.0), (second, 2.0)):
                inputs = torch.full((3, 4), dist.get_rank() + 1.0)
                fabric.backward(factor * model(inputs).square().sum())
            grads = []
            for factor in (1.0, 2.0):
                net = runs.make_net(torch.float64)
                for rank in range(WORLD):
                    inputs = torch.full((3, 4), rank + 1.0, dtype=torch.float64)
                    (factor * net(inputs).square().sum() / WORLD).backward()
                grads += [p.grad for p in net.parameters()]
            report = clip_gradients(fabric, [first, second], optimizer, distclip.ClipNorm(LIMIT))
            wanted = reference.total_norm(grads).item()
            assert wanted > LIMIT
            assert report.total_norm.item() == pytest.approx(wanted, rel=3e-6), layout
            kept = fabric_clipper(fabric, (first, second), optimizer, distclip.ClipNorm(LIMIT))
            assert kept is fabric_clipper(fabric, [first, second], optimizer, kept.policy)
            assert len(kept.plan.params) == len(both)
            clipped = clip_gradients(fabric, first, own, distclip.ClipNorm(math.inf))
            assert clipped.total_norm.item() < LIMIT  # a half of what was clipped before


def test_an_optimizer_of_several_modules(two_lightning_ranks: Ranks) -> None:
    two_lightning_ranks.run(several_modules)


def scaled(fused: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with quietly():
        made = make("ddp", scaler, fused=fused)
        reports = train(made)
        assert norms_of(reports) == pytest.approx(train_whole(3), rel=5e-3)
        fabric, model, optimizer = made
        before = model.module[0].weight.detach().clone()
        optimizer.zero_grad()
        backward(fabric, model, runs.whole_batches(1)[0], math.inf)
        from distclip.adapters.lightning import clip_gradients

        report = clip_gradients(*made, distclip.ClipNorm(LIMIT))
        optimizer.step()
    assert not report.finite
    assert torch.equal(before, model.module[0].weight)
    assert scaler.get_scale() == 512


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_are_unscaled_and_clipped(two_lightning_ranks: Ranks, fused: bool) -> None:
    two_lightning_ranks.run(scaled, fused)


def kept() -> None:
    """A Clipper lasts as long as its optimizer, and follows what changes."""
    from distclip.adapters.lightning import clip_gradients, fabric_clipper

    with quietly():
        made = make("ddp")
        fabric, model, optimizer = made
        policy = distclip.AutoClip(50.0)
        train(made, 3, policy)
        clipper = fabric_clipper(*made, distclip.AutoClip(50.0))
        assert fabric_clipper(fabric, model, optimizer.optimizer, policy) is clipper
        assert num_steps(clipper) == 3
        other = fabric_clipper(*made, distclip.AutoClip(10.0))
        assert other is not clipper
        assert num_steps(other) == 3
        assert other.policy == distclip.AutoClip(10.0)
        with pytest.raises(ValueError, match="cannot load the state"):
            fabric_clipper(*made, distclip.AutoClip(10.0, history=7))
        assert train(made, 1, distclip.ClipNorm(0.25))[0].limit.item() == 0.25
        assert num_steps(fabric_clipper(*made, policy)) == 0  # another policy came between

        head = nn.Parameter(torch.zeros(2))
        optimizer.add_param_group({"params": [head], "lr": LR})
        optimizer.zero_grad()
        backward(fabric, model, runs.whole_batches(1)[0])
        head.grad = torch.full((2,), 3.0)
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        whole = reference.total_norm([g.clone() for g in grads]).item()
        report = clip_gradients(*made, distclip.ClipNorm(0.25))
        assert report.total_norm.item() == pytest.approx(whole, rel=1e-6)
        assert reference.total_norm(grads).item() == pytest.approx(0.25, rel=1e-5)

        with pytest.raises(ValueError, match="this SGD with another adapter: "):
            frameworks.claim(optimizer.optimizer, "another adapter")
    ends = [weakref.ref(each) for each in (model, model.module, optimizer.optimizer)]
    del made, fabric, model, optimizer, clipper, other, head, grads, report
    gc.collect()
    assert [end() for end in ends] == [None] * 3


def num_steps(clipper: distclip.Clipper) -> int:
    return int(clipper.state_dict()["groups"]["all"]["AutoClip"]["num_steps"])


def test_a_clipper_is_kept_for_its_optimizer(two_lightning_ranks: Ranks) -> None:
    two_lightning_ranks.run(kept)


def saved(folder: str) -> None:
    from distclip.adapters.lightning import fabric_clipper

    policy = distclip.ZClip(warmup_steps=2, max_norm=5.0)
    for layout in ("ddp", "fsdp2"):
        with quietly():
            whole = train(make(layout, momentum=0.5), 5, policy)
            made = make(layout, momentum=0.5)
            train(made, 5, policy)
            states = []
            for each in (made, make(layout, momentum=0.5)):
                clipper = fabric_clipper(*each, policy)
                states.append({"model": each[1], "optimizer": each[2], "clipper": clipper})
                again = each
            path = f"{folder}/{layout}"
            made[0].save(path, states[0])
            again[0].load(path, states[1])
            first, rest = train(made, 3, policy), train(again, 3, policy)
        assert norms_of(rest) == pytest.approx(norms_of(first), rel=1e-6)
        assert [r.limit.item() for r in rest] == pytest.approx([r.limit.item() for r in first])
        assert any(math.isfinite(r.limit.item()) for r in rest)
        assert norms_of(whole)[:3] != pytest.approx(norms_of(rest), rel=1e-3)


def test_states_are_saved_and_loaded_by_fabric(two_lightning_ranks: Ranks, tmp_path: Path) -> None:
    two_lightning_ranks.run(saved, str(tmp_path))


def refusals() -> None:
    from distclip.adapters.lightning import clip_gradients

    with quietly():
        fabric, model, optimizer = made = make("ddp")
        net = runs.make_net()
        sgd = torch.optim.SGD(net.parameters(), lr=LR)
        with pytest.raises(ValueError, match="Fabric has set up neither it nor its optimizer"):
            clip_gradients(fabric, net, sgd)
        with pytest.raises(TypeError, match="cannot clip with a Trainer: it is no Fabric"):
            clip_gradients(runs.modules().trainer("ddp"), model, optimizer)
        with pytest.raises(TypeError, match="cannot clip with max_norm=: it is none of Clipper's"):
            clip_gradients(*made, max_norm=1.0)
        with pytest.raises(TypeError):
            clip_gradients(*made, 1.0)
        frameworks.claim(optimizer.optimizer, "another adapter")
        with pytest.raises(ValueError, match="another adapter does already"):
            clip_gradients(*made)
        frameworks.release(optimizer.optimizer)
        train(made, 1, distclip.ClipNorm(LIMIT), on_nonfinite="raise")
        backward(fabric, model, runs.whole_batches(1)[0], math.nan)
        with pytest.raises(distclip.NonFiniteGradientError, match=r"is that of '0\.weight'"):
            clip_gradients(*made, distclip.ClipNorm(LIMIT), on_nonfinite="raise")


def test_refusals(two_lightning_ranks: Ranks) -> None:
    two_lightning_ranks.run(refusals)
