"""A run with a vetoed step is, bit for bit, the run without it: weights, momentum, step counts, and
what the policies remember. In all ways to step, on plain tensors and on four ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, SGD, AdamW, NAdam, Optimizer

import distclip
from distclip import ClipNorm, SkipSpike, ZClip
from tests.support.ranks import Ranks, device_of, mesh
from tests.support.training import Make, make_scaler
from tests.support.wrapped import local

POLICY = SkipSpike(8.0, window=4, max_norm=1e3) & ClipNorm(0.5) & ZClip(warmup_steps=2)
NUM_STEPS, SPIKES = 9, (0, 5, 8)  # before these steps comes a batch with a spike

MAKE: dict[str, Make] = {
    "AdamW fused": lambda m: AdamW(m.parameters(), lr=0.05, weight_decay=0.1, fused=True),
    "AdamW foreach": lambda m: AdamW(m.parameters(), lr=0.05, weight_decay=0.1, foreach=True),
    "SGD with momentum": lambda m: SGD(
        m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1, foreach=True
    ),
    "SGD fused with momentum": lambda m: SGD(
        m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1, fused=True
    ),
    "SGD fused with dampening": lambda m: SGD(
        m.parameters(), lr=0.05, momentum=0.9, dampening=0.5, fused=True
    ),
    "NAdam": lambda m: NAdam(m.parameters(), lr=0.05, weight_decay=0.1),
}


def loss_of(model: nn.Module, step: int, spike: float = 1.0) -> Tensor:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    rank = dist.get_rank() if dist.is_initialized() else 0
    return (model(x.to(next(model.parameters()).device)) - 3 - rank).square().mean() * spike


def make_model(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(device_of(device))


def spike_on(rank: int) -> float:
    """A spike in the loss of one rank."""
    mine = dist.get_rank() if dist.is_initialized() else rank
    return 1e5 if mine == rank else 1.0


def ways(
    clipper: distclip.Clipper, optimizer: Optimizer, scaler: Any, way: str
) -> Callable[[], distclip.Report]:
    """How to take one step."""
    attached = clipper.attach(optimizer, scaler) if way == "attach" else None

    def attached_step() -> distclip.Report:
        optimizer.step() if scaler is None else scaler.step(optimizer)
        assert attached is not None
        assert attached.report is not None
        return attached.report

    def clip_and_step() -> distclip.Report:
        report = clipper.clip_(optimizer, scaler)
        if scaler is not None:
            scaler.step(optimizer)
        elif not report.skipped:
            optimizer.step()
        return report

    return {
        "step": lambda: clipper.step(optimizer, scaler),
        "attach": attached_step,
        "clip_": clip_and_step,
    }[way]


def train(
    wrapped: nn.Module,
    make: Make,
    way: str,
    takes_spikes: bool,
    scaled: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """The state of everything after the run, and in which batches a step was skipped.

    Without spikes their gradients are computed and thrown away: DDP sums in another order from the
    second backward on.
    """
    optimizer = make(wrapped)
    clipper = distclip.Clipper(wrapped, POLICY, **options)
    scaler = make_scaler() if scaled else None
    take_step, skipped, clipped = ways(clipper, optimizer, scaler, way), [], 0
    for step in range(NUM_STEPS):
        for is_spike in (True, False) if step in SPIKES else (False,):
            optimizer.zero_grad()
            loss = loss_of(wrapped, step, spike_on(step % 4) if is_spike else 1.0)
            (loss if scaler is None else scaler.scale(loss)).backward()
            if is_spike and not takes_spikes:
                continue
            before = [
                None if p.grad is None else local(p.grad).clone() for p in wrapped.parameters()
            ]
            report = take_step()
            clipped += bool(report.clipped)
            if report.skipped and not scaled:  # the scaler may have unscaled them before
                after = [None if p.grad is None else local(p.grad) for p in wrapped.parameters()]
                assert all(
                    torch.equal(a, b)
                    for a, b in zip(after, before, strict=True)
                    if a is not None and b is not None
                )
            skipped.append(bool(report.skipped))
            if scaler is not None:
                scaler.update()
    assert clipped > 3
    assert int(clipper.skipped) == sum(skipped)
    states = optimizer.state_dict()["state"]
    return {
        "weights": [local(p.detach()).clone() for p in wrapped.parameters()],
        "optimizer": {
            key: local(value) if isinstance(value, Tensor) else value
            for i, state in states.items()
            for key, value in ((f"{i} {name}", value) for name, value in state.items())
        },
        "policy": str(clipper.state_dict()),
        "skipped": skipped,
    }


def expected_skips() -> list[bool]:
    return [
        skip for step in range(NUM_STEPS) for skip in ([True, False] if step in SPIKES else [False])
    ]


def assert_the_same(found: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    assert found["skipped"] == expected_skips()
    assert undisturbed["skipped"] == [False] * NUM_STEPS
    assert found["policy"] == undisturbed["policy"]
    for kind in ("weights", "optimizer"):
        torch.testing.assert_close(found[kind], undisturbed[kind], rtol=0, atol=0)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("way", ["step", "attach", "clip_"])
@pytest.mark.parametrize("name", MAKE)
def test_as_if_the_batch_had_not_been_drawn(name: str, way: str, scaled: bool) -> None:
    """The first spike comes before an optimizer has a state, and one lies above max_norm alone."""
    if scaled and way == "clip_" and name == "SGD fused with dampening":
        pytest.skip(
            "torch itself keeps an uninitialised buffer where a scaler skips its first step"
        )
    runs = [
        train(make_model(), MAKE[name], way, takes_spikes, scaled) for takes_spikes in (True, False)
    ]
    assert_the_same(*runs)


@pytest.mark.parametrize("mode", ["raise", "skip", "zero"])
@pytest.mark.parametrize("way", ["step", "attach", "clip_"])
@pytest.mark.parametrize("name", ["AdamW fused", "AdamW foreach"])
def test_in_each_mode(name: str, way: str, mode: str) -> None:
    runs = [
        train(make_model(), MAKE[name], way, takes, on_nonfinite=mode) for takes in (True, False)
    ]
    assert_the_same(*runs)


def test_in_a_closure() -> None:
    """A vetoed first evaluation leaves out the step; in later ones no parameter has a gradient."""
    model = make_model()
    for optimizer in (SGD(model.parameters(), lr=0.1), LBFGS(model.parameters(), max_iter=3)):
        clipper = distclip.Clipper(model, SkipSpike(max_norm=1e3))
        before = [p.detach().clone() for p in model.parameters()]

        def closure() -> Tensor:
            model.zero_grad()
            loss = loss_of(model, 0, 1e6)
            loss.backward()
            return loss

        assert clipper.step(optimizer, closure=closure).skipped
        assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_one_veto_holds_for_several_optimizers(fused: bool) -> None:
    for way in ("step", "attach"):
        model = make_model()
        both = [AdamW(part.parameters(), fused=fused) for part in (model[0], model[2])]
        clipper = distclip.Clipper(model, SkipSpike(max_norm=1e3))
        attached = clipper.attach(both) if way == "attach" else None
        for spike in (1e6, 1.0):
            before = [p.detach().clone() for p in model.parameters()]
            model.zero_grad()
            loss_of(model, 0, spike).backward()
            if attached is None:
                clipper.step(both)
            else:
                for each in both:
                    each.step()
            same = [torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True)]
            assert same == [spike > 1] * 4, (way, spike)


WRAP: dict[str, Callable[[nn.Module, str], nn.Module]] = {
    "ddp": lambda model, device: DistributedDataParallel(model),
    "fsdp2": lambda model, device: fully_shard(model, mesh=mesh((4,), ("fsdp",), device)),
    "hsdp": lambda model, device: fully_shard(
        model, mesh=mesh((2, 2), ("replicate", "shard"), device)
    ),
}


def runs_on_a_rank(kind: str, name: str, way: str, device: str) -> list[bool]:
    """Each spike is in the loss of another rank."""
    runs = [
        train(WRAP[kind](make_model(device), device), MAKE[name], way, takes_spikes)
        for takes_spikes in (True, False)
    ]
    assert_the_same(*runs)
    return runs[0]["skipped"]


@pytest.mark.parametrize("way", ["step", "attach", "clip_"])
@pytest.mark.parametrize("name", ["AdamW fused", "AdamW foreach", "SGD with momentum"])
@pytest.mark.parametrize("kind", WRAP)
def test_all_ranks_veto_together(four_ranks: Ranks, kind: str, name: str, way: str) -> None:
    skipped = four_ranks.run(runs_on_a_rank, kind, name, way, four_ranks.device)
    assert skipped == [expected_skips()] * 4


def a_spike_in_the_shard_of_one_rank(device: str) -> tuple[list[bool], str]:
    """Alone it is above the threshold, or no shard is and all together are."""
    from torch.distributed.tensor import DTensor, Shard

    on = mesh((4,), ("fsdp",), device)
    param = nn.Parameter(DTensor.from_local(torch.zeros(3).to(device_of(device)), on, [Shard(0)]))
    clipper = distclip.Clipper([("w", param)], SkipSpike(max_norm=10.0))
    found: list[bool] = []
    for numbers in ([1.0] * 4, [1.0, 1.0, 50.0, 1.0], [5.0] * 4, [6.0] * 4, [math.sqrt(8.0)] * 4):
        local_grad = torch.full((3,), numbers[dist.get_rank()]).to(device_of(device))
        param.grad = DTensor.from_local(local_grad, on, [Shard(0)])
        found.append(bool(clipper.clip_().skipped))
    return found, str(clipper.state_dict())


def test_the_norm_over_all_ranks_decides(four_ranks: Ranks) -> None:
    answers = four_ranks.run(a_spike_in_the_shard_of_one_rank, four_ranks.device)
    assert [found for found, _ in answers] == [[False, True, True, True, False]] * 4
    assert len({state for _, state in answers}) == 1
