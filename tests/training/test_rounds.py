"""One clipper attached to several optimizers: one norm for all in each step, counted once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.optim import SGD, AdamW, Optimizer

import distclip
from tests.support.ranks import Ranks, mesh, same_bits_everywhere
from tests.support.training import MAX_NORM, loss_of, make_model, make_scaler, weights
from tests.support.wrapped import local

CLOSE = {"rtol": 2e-6, "atol": 2e-7}
POLICY = distclip.AutoClip(percentile=100.0) & distclip.ClipNorm(MAX_NORM)


def optimizers_of(model: nn.Module, fused: Sequence[bool]) -> list[Optimizer]:
    parts = [[*model[0].parameters()], [model[2].weight], [model[2].bias]]
    if len(fused) == 2:
        parts = [parts[0], [*parts[1], *parts[2]]]
    return [
        AdamW(part, lr=0.05, fused=each, foreach=not each)
        for part, each in zip(parts, fused, strict=True)
    ]


def num_counted(clipper: distclip.Clipper) -> int:
    (state,) = clipper.state_dict()["groups"]["all"].values()
    return int(state["first"]["num_steps"])


def by_torch(
    fused: Sequence[bool], overflows: Sequence[int], scaled: bool
) -> tuple[nn.Module, list[Tensor], float]:
    model, scaler, norms = make_model(), make_scaler(scaled), []
    optimizers = optimizers_of(model, fused)
    for step in range(4):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step in overflows:
            model[0].weight.grad[0, 0] = math.inf
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
        if norms[-1].isfinite():
            assert norms[-1] > MAX_NORM
            for optimizer in optimizers:
                optimizer.step()
        scaler.update(scaler.get_scale() / (2 if step in overflows else 1)) if scaled else None
    return model, norms, scaler.get_scale()


CASES = [[True, True], [False, False], [True, False], [False, True], [True, False, True]]


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("at_once", [False, True], ids=["in turn", "at once"])
@pytest.mark.parametrize("fused", CASES, ids=str)
def test_one_norm_for_all(fused: Sequence[bool], at_once: bool, scaled: bool) -> None:
    # An overflow in the first part: all leave out the step, and the statistics do not count it.
    overflows = (0, 2) if scaled and all(fused) else ()
    expected, norms, scale = by_torch(fused, overflows, scaled)
    model, scaler = make_model(), make_scaler(scaled)
    optimizers = optimizers_of(model, fused)
    clipper = distclip.Clipper(model, POLICY)
    given = [optimizers] if at_once else optimizers
    attached = [clipper.attach(each, scaler) for each in given]
    for step in range(4):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step in overflows:
            model[0].weight.grad[0, 0] = math.inf
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for each in attached:
            torch.testing.assert_close(each.report.total_norm, norms[step], rtol=1e-5, atol=0)
        for optimizer in optimizers:
            assert {"grad_scale", "found_inf"}.isdisjoint(vars(optimizer))
    assert attached[-1].report.clipped
    torch.testing.assert_close(weights(model), weights(expected), **CLOSE)
    assert num_counted(clipper) == 4 - len(overflows)
    assert scaler.get_scale() == scale


@pytest.mark.parametrize("fused", [[False, False], [False, True]], ids=str)
@pytest.mark.parametrize("part", [0, 2])
def test_an_overflow_in_one_of_two_that_are_not_fused(fused: Sequence[bool], part: int) -> None:
    """torch leaves out the step of the one; the other shares its norm, and is left out too."""
    model, scaler = make_model(), make_scaler()
    optimizers = optimizers_of(model, fused)
    clipper = distclip.Clipper(model, POLICY)
    for optimizer in optimizers:
        clipper.attach(optimizer, scaler)
    for step in range(3):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 1:
            model[part].weight.grad[0, 0] = math.inf
        before = weights(model)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, weights(model)) == (step == 1)
    assert scaler.get_scale() == 512
    assert num_counted(clipper) == 2


@pytest.mark.parametrize("rule", ["skip", "zero", "propagate"])
@pytest.mark.parametrize("fused", CASES, ids=str)
def test_what_is_not_finite(fused: Sequence[bool], rule: str) -> None:
    model = make_model()
    optimizers = optimizers_of(model, fused)
    clipper = distclip.Clipper(model, POLICY, on_nonfinite=rule)
    attached = clipper.attach(optimizers)
    for step in range(3):
        model.zero_grad()
        loss_of(model, step).backward()
        if step == 1:
            model[2].weight.grad[0, 0] = math.inf
        before = weights(model)
        for optimizer in optimizers:
            optimizer.step()
        if rule == "skip":
            assert torch.equal(before, weights(model)) == (step == 1)
    assert attached.report.finite == (rule != "propagate")
    assert clipper.skipped == (rule != "propagate")
    assert weights(model).isfinite().all() == (rule != "propagate")


@pytest.mark.parametrize("how", ["backward", "set", "multiplied", "unseen", "other tensors"])
@pytest.mark.parametrize("fused", [[False, False], [True, True]], ids=str)
def test_what_changed_between_two_steps_is_measured_again(how: str, fused: Sequence[bool]) -> None:
    model = make_model()
    first, second = optimizers_of(model, fused)
    clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM))
    one, two = clipper.attach(first), clipper.attach(second)
    for step in range(3):
        model.zero_grad()
        loss_of(model, step).backward()
        first.step()
        norm = one.report.total_norm
        first.zero_grad()
        scale = 1.0
        if how == "backward":
            second.zero_grad()
            loss_of(model, step + 7).backward()
        elif how == "set":
            model[2].weight.grad = torch.ones_like(model[2].weight)
        elif how == "multiplied":
            model[2].weight.grad.mul_(3)
        elif how == "other tensors":
            second.zero_grad()
            scale = math.nan
        else:
            model[2].weight.grad.data.mul_(3)
            model[2].bias.grad.data.mul_(3)
            with pytest.raises(ValueError, match="Pass the scaler"):
                second.step()
            return
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        expected = nn.utils.get_total_norm(grads)
        second.step()
        torch.testing.assert_close(two.report.total_norm, expected, rtol=1e-6, atol=0)
        assert two.report.total_norm != norm
        assert two.report.clipped or math.isnan(scale)


def test_a_gan_with_a_clipper_each() -> None:
    """Backward and step of the one, then of the other, whose gradients the first has left."""

    def run(ours: bool) -> Tensor:
        model, both = make_model(), []
        optimizers = optimizers_of(model, [False, True])
        parts = [model[0], model[2]]
        clippers = [distclip.Clipper(part, POLICY) for part in parts]
        if ours:
            both = [c.attach(o) for c, o in zip(clippers, optimizers, strict=True)]
        for step in range(3):
            for part, optimizer in zip(parts, optimizers, strict=True):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                if not ours:
                    assert nn.utils.clip_grad_norm_(part.parameters(), MAX_NORM) > MAX_NORM
                optimizer.step()
        assert all(each.report.clipped for each in both)
        assert [num_counted(c) for c in clippers] == ([3, 3] if ours else [0, 0])
        return weights(model)

    torch.testing.assert_close(run(True), run(False), **CLOSE)


@pytest.mark.parametrize("fused", [[False, False], [True, True]], ids=str)
def test_an_optimizer_that_steps_in_some_iterations_only(fused: Sequence[bool]) -> None:
    """Its gradients are counted in every norm, but scaled only in its own step."""
    model = make_model()
    first, second = optimizers_of(model, fused)
    clipper = distclip.Clipper(model, POLICY)
    one, two = clipper.attach(first), clipper.attach(second)
    for step in range(6):
        first.zero_grad()
        if step % 3 == 0:
            second.zero_grad()
        loss_of(model, step).backward()
        kept = [p.grad.clone() for p in model[2].parameters()]
        expected = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        order = [first, second] if step % 2 else [second, first]
        for optimizer in order if step % 3 == 2 else [first]:
            optimizer.step()
            report = (one if optimizer is first else two).report
            torch.testing.assert_close(report.total_norm, expected, rtol=1e-6, atol=0)
        if step % 3 != 2:
            assert all(
                torch.equal(p.grad, k) for p, k in zip(model[2].parameters(), kept, strict=True)
            )
    assert num_counted(clipper) == 6


def test_attached_twice_and_removed_in_any_order() -> None:
    model = make_model()
    first, second = optimizers_of(model, [False, True])
    clipper = distclip.Clipper(model, POLICY)
    before = [dict(vars(each)) for each in (first, second)]
    for order in ((0, 1), (1, 0)):
        both = [clipper.attach(first), clipper.attach(second)]
        for given in (first, [second, first], second):
            with pytest.raises(ValueError, match="cannot attach to this AdamW again"):
                clipper.attach(given)
        with pytest.raises(ValueError, match="the Clipper is attached to it"):
            clipper.step(second)
        model.zero_grad()
        loss_of(model, 0).backward()
        first.step()
        both[order[0]].remove()
        second.step()
        both[order[1]].remove()
        both[order[1]].remove()
        assert [vars(each).keys() for each in (first, second)] == [b.keys() for b in before]
        assert not first._optimizer_step_pre_hooks
        assert not second._optimizer_step_pre_hooks
        assert clipper.step([first, second]).finite


def test_a_step_that_raises_ends_the_round() -> None:
    model = make_model()
    first, second = optimizers_of(model, [True, True])
    clipper = distclip.Clipper(model, POLICY)
    one, two = clipper.attach(first), clipper.attach(second)
    fail = first.register_step_pre_hook(lambda *_: 1 / 0)
    loss_of(model, 0).backward()
    with pytest.raises(ZeroDivisionError):
        first.step()
    assert {"grad_scale", "found_inf"}.isdisjoint(vars(first))
    fail.remove()
    model.zero_grad()
    loss_of(model, 1).backward()
    expected = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    second.step()
    first.step()
    for each in (one, two):
        torch.testing.assert_close(each.report.total_norm, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fused", [[False, False], [True, False], [False, True]], ids=str)
def test_a_scaler_that_was_not_passed_is_an_error(fused: Sequence[bool]) -> None:
    """In the first step: each optimizer unscales its own gradients when it steps."""
    model, scaler = make_model(), make_scaler()
    optimizers = optimizers_of(model, fused)
    clipper = distclip.Clipper(model, POLICY)
    clipper.attach(optimizers)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizers[0])
    with pytest.raises(ValueError, match=r"Pass the scaler: `clipper.attach\(optimizer, scaler\)`"):
        scaler.step(optimizers[1])


def test_fused_optimizers_need_no_scaler() -> None:
    expected, norms, _ = by_torch([True, True], (), True)
    model, scaler = make_model(), make_scaler()
    optimizers = optimizers_of(model, [True, True])
    clipper = distclip.Clipper(model, POLICY)
    attached = clipper.attach(optimizers)
    for step in range(4):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(attached.report.total_norm, norms[step], rtol=1e-5, atol=0)
    torch.testing.assert_close(weights(model), weights(expected), **CLOSE)


@pytest.mark.parametrize("fused", [[False, False], [True, True]], ids=str)
def test_gradients_in_one_buffer(fused: Sequence[bool]) -> None:
    """A write to one counts for all of them, as for those that FSDP2 reduces together."""
    model = make_model()
    optimizers = optimizers_of(model, fused)
    clipper = distclip.Clipper(model, POLICY)
    attached = clipper.attach(optimizers)

    def writes(*_: Any) -> None:
        """As optimizers do that add weight decay to the gradient itself."""
        model[0].weight.grad.mul_(1.0)

    optimizers[0].register_step_pre_hook(writes)
    params = [*model.parameters()]
    for step in range(3):
        parts = torch.zeros(sum(p.numel() for p in params)).split([p.numel() for p in params])
        for param, part in zip(params, parts, strict=True):
            param.grad = part.view_as(param)
        loss_of(model, step).backward()
        expected = nn.utils.get_total_norm([p.grad for p in params])
        for optimizer in optimizers:
            optimizer.step()
            torch.testing.assert_close(attached.report.total_norm, expected, rtol=1e-6, atol=0)
        assert attached.report.clipped
    assert num_counted(clipper) == 3


@pytest.mark.parametrize("overlap", [True, False])
def test_gradients_outside_of_grad(overlap: bool) -> None:
    """Two optimizers beside `gradient=`, and with overlap."""
    model = make_model()
    first, second = optimizers_of(model, [False, False])
    options: dict[str, Any] = {"overlap": True} if overlap else {"gradient": lambda p: p.grad}
    clipper = distclip.Clipper(model, POLICY, **options)
    attached = clipper.attach([first, second])
    for step in range(2):
        model.zero_grad()
        loss_of(model, step).backward()
        expected = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        first.step()
        second.step()
        torch.testing.assert_close(attached.report.total_norm, expected, rtol=1e-6, atol=0)
        after = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        torch.testing.assert_close(after, torch.tensor(MAX_NORM), rtol=1e-5, atol=0)


# On ranks


def one_norm_on_ranks(fused: bool, scaler_type: type[GradScaler] | None) -> None:
    results = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        fully_shard(model[0], mesh=mesh((4,), ("fsdp",)))
        fully_shard(model, mesh=mesh((4,), ("fsdp",)))
        optimizers = [
            AdamW(part.parameters(), lr=0.1, fused=fused, foreach=False)
            for part in (model[0], model[2])
        ]
        scaler = None if scaler_type is None else scaler_type("cpu", init_scale=1024.0)
        clipper = distclip.Clipper(model, POLICY)
        attached = clipper.attach(optimizers, scaler) if ours else None
        for step in range(3):
            model.zero_grad()
            loss = loss_of(model, step + 10 * dist.get_rank())
            (loss if scaler is None else scaler.scale(loss)).backward()
            if not ours:
                report = clipper.step(optimizers, scaler)
            else:
                for optimizer in optimizers:
                    optimizer.step() if scaler is None else scaler.step(optimizer)
                report = attached.report
            if scaler is not None:
                scaler.update()
            assert report.clipped
            assert same_bits_everywhere(report.total_norm)
            results.append(report.total_norm)
        assert num_counted(clipper) == 3
        results += [local(p.detach()) for p in model.parameters()]
    half = len(results) // 2
    torch.testing.assert_close(results[half:], results[:half], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scaler", [None, GradScaler, ShardedGradScaler])
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_one_norm_for_all_on_ranks(
    four_ranks: Ranks, fused: bool, scaler: type[GradScaler] | None
) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(one_norm_on_ranks, fused, scaler)


def changed_on_one_rank() -> None:
    """Only one rank's gradients change between the steps: all begin a new round, and none waits."""
    experts = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]
    named = [(f"{dist.get_rank()}.{i}", expert) for i, expert in enumerate(experts)]
    clipper = distclip.Clipper(named, POLICY, mesh=mesh((4,), ("pp",)))
    first, second = (SGD([expert], lr=0.1) for expert in experts)
    attached = clipper.attach([first, second])
    for change in (True, False):
        for expert in experts:
            expert.grad = torch.full((4,), 3.0)
        first.step()
        assert attached.report.total_norm == pytest.approx(math.sqrt(4 * 8 * 9))
        if change and dist.get_rank() == 2:
            experts[1].grad = torch.full((4,), 5.0)
        second.step()
        norm = attached.report.total_norm
        assert same_bits_everywhere(norm)
        clipped = MAX_NORM**2 / 2
        again = math.sqrt(3 * 4 * 9 + 4 * 25 + clipped)
        assert norm == pytest.approx(again if change else math.sqrt(4 * 8 * 9), rel=1e-5)


def test_changed_on_one_rank_alone(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(changed_on_one_rank)
