"""accelerate: accumulation, fused optimizers, several of them, parts of a model, fp16."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import ClipNorm, ClipValue, SkipSpike, ZClip
from tests.support import accelerated as acc
from tests.support import reference
from tests.support.ranks import Ranks

pytest.importorskip("accelerate")

MAX_NORM = 0.5
SHARDED = ("ddp", "fsdp1", "fsdp2")


def prepare(*args: Any, **kwargs: Any) -> Any:
    from distclip.adapters.accelerate import prepare

    return prepare(*args, **kwargs)


def a_scaler(layout: str = "ddp", scale: float = 1024.0) -> GradScaler:
    if layout.startswith("fsdp1"):
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        return ShardedGradScaler("cpu", init_scale=scale)
    return GradScaler("cpu", init_scale=scale)


def accumulating(layout: str, way: str) -> None:
    num = acc.num_ranks(layout)
    expected = acc.whole_gradients(2, num)
    with acc.accelerator_for(layout, gradient_accumulation_steps=2) as accelerator:
        model, optimizer = acc.prepared(accelerator)
        policy = ClipNorm(MAX_NORM)
        clipper = prepare(accelerator, model, optimizer, policy, tensor_norms=True)
        before = acc.whole_weights(model)
        call = clipper.step if way == "step" else clipper.clip_
        for micro in range(2):
            with accelerator.accumulate(model):
                acc.run_backward(accelerator, model, micro)
                with CommDebugMode() as counted:
                    report = call()
                if micro == 0:
                    assert report is None
                    assert clipper.report is None
                    assert counted.get_total_counts() == 0
                if way == "clip_":
                    optimizer.step()
                optimizer.zero_grad()
        acc.check_report(report, acc.whole_norm(expected))
        norms = {name: grad.norm().item() for name, grad in expected.items()}
        found = {name.removeprefix("module."): norm for name, norm in report.tensor_norms().items()}
        assert found == pytest.approx(norms, rel=1e-5)
        acc.check_applied(model, before, acc.norm_clipped(expected, MAX_NORM))
        with accelerator.accumulate(model):
            acc.run_backward(accelerator, model)
            assert call() is None
            assert clipper.report is report  # of the latest step


def at_the_end_of_the_data(layout: str) -> None:
    """3 batches in steps of 2: the last step has one batch, divided by 2 as accelerate does."""
    from accelerate.utils import GradientAccumulationPlugin

    plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=True)
    with acc.accelerator_for(layout, gradient_accumulation_plugin=plugin) as accelerator:
        model, optimizer = acc.prepared(accelerator)
        data = accelerator.prepare(
            torch.utils.data.DataLoader([acc.batch(i, 0) for i in range(6)], batch_size=1)
        )
        clipper = prepare(accelerator, model, optimizer, ClipNorm(MAX_NORM))
        stepped = []
        for x in data:
            with accelerator.accumulate(model):
                accelerator.backward(acc.loss_of(model, x[0]))
                stepped.append(clipper.step() is not None)
                optimizer.zero_grad()
        num = 6 // acc.num_ranks(layout)
        assert stepped == [i % 2 == 1 or i == num - 1 for i in range(num)]
        assert num != 3 or stepped == [False, True, True]


def every_accumulation(way: str) -> None:
    for layout in ("one process", *SHARDED):
        accumulating(layout, way)
    at_the_end_of_the_data("ddp")


@pytest.mark.parametrize("way", ["clip_", "step"])
def test_while_accelerate_accumulates_nothing_happens(
    two_accelerated_ranks: Ranks, way: str
) -> None:
    two_accelerated_ranks.run(every_accumulation, way)


def fused_step(layout: str, scaled: bool, several: bool) -> None:
    """As unfused in every bit but rounding, and nothing but the optimizer writes gradients."""
    weights: list[dict[str, Tensor]] = []
    for way in ("step", "clip_"):
        scaler = a_scaler(layout) if scaled else None
        with acc.accelerator_for(layout, scaler) as accelerator:
            model, optimizer = acc.prepared(accelerator, acc.fused)
            handles, held = [optimizer], model
            if several:  # with limits of their own
                split = list(model.parameters())
                parts = {MAX_NORM: split[:1], MAX_NORM / 8: split[1:]}
                handles = [accelerator.prepare(acc.fused(part)) for part in parts.values()]
                held = [{"params": p, "policy": ClipNorm(limit)} for limit, p in parts.items()]
            clipper = prepare(accelerator, held, handles, ClipNorm(MAX_NORM))
            for step in range(2):
                acc.run_backward(accelerator, model, step)
                with mock.patch.object(
                    distclip.decision, "scale_", wraps=distclip.decision.scale_
                ) as writes:
                    report = clipper.step() if way == "step" else clipper.clip_()
                assert report.clipped
                assert bool(writes.call_count) == (way == "clip_")
                for handle in handles:
                    if way == "clip_":
                        handle.step()
                    assert not handle.step_was_skipped
                    inner = vars(handle.optimizer)
                    assert {"grad_scale", "found_inf"}.isdisjoint(inner)
                    handle.zero_grad()
            weights.append(acc.whole_weights(model))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-5, atol=1e-6)


def every_fused() -> None:
    for layout in SHARDED:
        for scaled in (False, True):
            fused_step(layout, scaled, several=layout == "ddp")


def test_fused_optimizers_get_the_coefficient(two_accelerated_ranks: Ranks) -> None:
    two_accelerated_ranks.run(every_fused)


def several_optimizers(way: str, scaled: bool) -> None:
    expected = acc.whole_gradients(1)
    clipped = acc.norm_clipped(expected, MAX_NORM)
    with acc.accelerator_for("ddp", a_scaler() if scaled else None) as accelerator:
        model = accelerator.prepare(acc.make_net())
        handles = [
            accelerator.prepare(acc.sgd(part.parameters()))
            for part in (model.module.body, model.module.head)
        ]
        accelerator.native_amp = scaled
        clipper = prepare(accelerator, model, handles, ClipNorm(MAX_NORM))
        before = acc.whole_weights(model)
        acc.run_backward(accelerator, model)
        report = clipper.step() if way == "step" else clipper.clip_()
        if way == "clip_":
            for handle in handles:
                handle.step()
        acc.check_report(report, acc.whole_norm(expected))
        acc.check_applied(model, before, clipped)
        if scaled:  # one backward changes the scale once, and not for each of its steps
            assert accelerator.scaler.state_dict()["_growth_tracker"] == 1
            acc.run_backward(accelerator, model)
            next(model.parameters()).grad.view(-1)[:1] = math.inf
            clipper.step()
            assert all(handle.step_was_skipped for handle in handles)
            assert accelerator.scaler.get_scale() == 1024 / 2


def every_several() -> None:
    for way in ("clip_", "step"):
        for scaled in (False, True):
            several_optimizers(way, scaled)


def test_several_optimizers_share_one_norm(two_accelerated_ranks: Ranks) -> None:
    two_accelerated_ranks.run(every_several)


def what_to_clip(model: nn.Module, given: str) -> Any:
    if given == "parameters":
        return (p for n, p in model.named_parameters() if "head" in n)
    if given == "named":
        return [(n, p) for n, p in model.named_parameters() if "head" in n]
    if given == "module":
        return next(m for n, m in model.named_modules() if n.endswith("head"))
    return [
        {"params": [p for n, p in model.named_parameters() if part in n], "name": part,
         "policy": ClipNorm(limit)}
        for part, limit in (("body", 0.25), ("head", 0.125))
    ]  # fmt: skip


def a_part(layout: str, given: str, scaled: bool) -> None:
    expected = acc.whole_gradients(1, acc.num_ranks(layout))
    body = {n: g for n, g in expected.items() if "body" in n}
    head = {n: g for n, g in expected.items() if "head" in n}
    clipped = acc.norm_clipped(body, 0.25) if given == "groups" else body
    clipped |= acc.norm_clipped(head, 0.125)
    scaler = a_scaler(layout) if scaled else None
    with acc.accelerator_for(layout, scaler) as accelerator:
        model, optimizer = acc.prepared(accelerator)
        clipper = prepare(accelerator, what_to_clip(model, given), optimizer, ClipNorm(0.125))
        before = acc.whole_weights(model)
        acc.run_backward(accelerator, model)
        report = clipper.step()
        norm = acc.whole_norm(expected if given == "groups" else head)
        acc.check_report(report, norm)
        acc.check_applied(model, before, clipped)
        if scaled:
            assert accelerator.scaler.get_scale() == 1024


def every_part(layout: str) -> None:
    for given in ("parameters", "named", "module", "groups"):
        a_part(layout, given, scaled=given != "named")


@pytest.mark.parametrize("layout", ["one process", *SHARDED])
def test_a_part_of_the_parameters(two_accelerated_ranks: Ranks, layout: str) -> None:
    two_accelerated_ranks.run(every_part, layout)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": acc.sgd,
    "fused": acc.fused,
    "fused with momentum": lambda p: torch.optim.SGD(p, lr=acc.LR, momentum=0.9, fused=True),
    "dampened": lambda p: torch.optim.SGD(p, lr=acc.LR, momentum=0.9, dampening=0.1, fused=True),
}


def has_elements(grad: Tensor | None) -> bool:
    return grad is not None and getattr(grad, "_local_tensor", grad).numel() > 0


def overflow(layout: str, make: str, way: str, unscaled: bool = False, part: bool = False) -> None:
    """On rank 1 alone: all skip, and say so; the scale halves; the next step is a step."""
    with acc.accelerator_for(layout, a_scaler(layout)) as accelerator:
        model, optimizer = acc.prepared(accelerator, OPTIMIZERS[make])
        schedule = torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1)
        schedule = accelerator.prepare(schedule)
        held = what_to_clip(model, "parameters") if part else model
        clipper = prepare(accelerator, held, optimizer, ClipNorm(MAX_NORM))
        rate = optimizer.param_groups[0]["lr"]
        for step in range(3):
            overflows = step != 1
            before = acc.whole_weights(model)
            acc.run_backward(accelerator, model, step)
            if overflows and (dist.get_rank() == 1 or layout == "one process"):
                where = model.parameters() if not part else what_to_clip(model, "parameters")
                grad = next(p.grad for p in where if has_elements(p.grad))
                grad = getattr(grad, "_local_tensor", grad)
                grad.view(-1)[:1] = math.inf
            if unscaled:
                accelerator.unscale_gradients(optimizer)
            report = clipper.step() if way == "step" else clipper.clip_()
            if way == "clip_":
                optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            assert report.finite != overflows
            assert bool(optimizer.step_was_skipped) == overflows
            assert bool(accelerator.optimizer_step_was_skipped) == overflows
            after = acc.whole_weights(model)
            same = all(torch.equal(before[name], after[name]) for name in before)
            assert same == overflows, (layout, make, way, step)
            if make == "dampened" and step == 0:  # torch would keep an uninitialised buffer
                states = optimizer.state.values()
                assert not any(state.get("momentum_buffer") is not None for state in states)
            stepped = 0 if step == 0 else acc.num_ranks(layout)
            now = optimizer.param_groups[0]["lr"]
            assert now == pytest.approx(rate * 0.1**stepped), "the schedule goes with the steps"
        assert accelerator.scaler.get_scale() == 1024 / 4


def every_overflow(layout: str) -> None:
    for way in ("clip_", "step"):
        # torch has no fused SGD for DTensors.
        for make in ("sgd", "fused") if layout == "fsdp2" else OPTIMIZERS:
            overflow(layout, make, way)
    overflow(layout, "sgd", "clip_", unscaled=True)
    overflow(layout, "fused", "step", unscaled=True)
    overflow(layout, "fused", "step", part=True)


@pytest.mark.parametrize("layout", ["fsdp1", "fsdp2", "one process"])
def test_an_overflow_on_one_rank_makes_all_skip(two_accelerated_ranks: Ranks, layout: str) -> None:
    two_accelerated_ranks.run(every_overflow, layout)


def unscaled_before(layout: str) -> None:
    expected = acc.whole_gradients(1, acc.num_ranks(layout))
    clipped = acc.norm_clipped(expected, MAX_NORM)
    for unscale in (False, True):
        with acc.accelerator_for(layout, a_scaler(layout)) as accelerator:
            model, optimizer = acc.prepared(accelerator)
            clipper = prepare(accelerator, model, optimizer, ClipNorm(MAX_NORM))
            before = acc.whole_weights(model)
            acc.run_backward(accelerator, model)
            if unscale:
                accelerator.unscale_gradients()
            report = clipper.clip_()
            with pytest.raises(RuntimeError, match="cannot clip again"):
                clipper.clip_()
            optimizer.step()
            acc.check_report(report, acc.whole_norm(expected))
            acc.check_applied(model, before, clipped)
            optimizer.zero_grad()
            acc.run_backward(accelerator, model)
            assert clipper.step().clipped


def after_an_error() -> None:
    """Who catches the error steps, which skips, or is told that the scaler waits for it."""
    for steps in (True, False):
        with acc.accelerator_for("fsdp2", a_scaler()) as accelerator:
            model, optimizer = acc.prepared(accelerator)
            clipper = prepare(
                accelerator, model, optimizer, ClipNorm(MAX_NORM), on_nonfinite="raise"
            )
            before = acc.whole_weights(model)
            acc.run_backward(accelerator, model)
            if dist.get_rank() == 1:
                grad = next(p.grad for p in model.parameters() if has_elements(p.grad))
                grad._local_tensor.view(-1)[:1] = math.inf
            with pytest.raises(distclip.NonFiniteGradientError):
                clipper.step()
            if steps:
                optimizer.step()
                assert optimizer.step_was_skipped
                torch.testing.assert_close(acc.whole_weights(model), before, rtol=0, atol=0)
            optimizer.zero_grad()
            acc.run_backward(accelerator, model)
            if steps:
                expected = acc.whole_norm(acc.whole_gradients(1))
                acc.check_report(clipper.step(), expected)
            else:
                with pytest.raises(RuntimeError, match="cannot clip again"):
                    clipper.step()


def every_unscaled() -> None:
    for layout in SHARDED:
        unscaled_before(layout)
    after_an_error()


def test_gradients_are_unscaled_once(two_accelerated_ranks: Ranks) -> None:
    two_accelerated_ranks.run(every_unscaled)


def nonfinite(layout: str, make: str, way: str) -> None:
    """Without a scaler: on_nonfinite="skip" leaves the step out, and schedules wait."""
    with acc.accelerator_for(layout) as accelerator:
        model, optimizer = acc.prepared(accelerator, OPTIMIZERS[make])
        policy = ZClip() & ClipNorm(MAX_NORM)
        clipper = prepare(accelerator, model, optimizer, policy, on_nonfinite="skip")
        for step in range(3):
            before = acc.whole_weights(model)
            acc.run_backward(accelerator, model, step)
            if step != 1 and dist.get_rank() == 1:
                grad = next(p.grad for p in model.parameters() if has_elements(p.grad))
                getattr(grad, "_local_tensor", grad).view(-1)[:1] = math.nan
            report = clipper.step() if way == "step" else clipper.clip_()
            if way == "clip_":
                optimizer.step()
            optimizer.zero_grad()
            after = acc.whole_weights(model)
            same = all(torch.equal(before[name], after[name]) for name in before)
            assert same == (step != 1) == bool(optimizer.step_was_skipped) != bool(report.finite)
        (state,) = clipper.state_dict()["groups"]["all"].values()
        assert int(state["first"]["num_steps"]) == 1
        # The last step was skipped, but not one of the user's own after it.
        acc.run_backward(accelerator, model, 3)
        clipper.detach() if way == "step" else None
        optimizer.step()
        assert not optimizer.step_was_skipped


def vetoed(layout: str, make: str, way: str) -> None:
    """Without a scaler, a step that a policy vetoes is left out."""
    with acc.accelerator_for(layout) as accelerator:
        model, optimizer = acc.prepared(accelerator, OPTIMIZERS[make])
        clipper = prepare(accelerator, model, optimizer, SkipSpike(max_norm=0.0))
        before = acc.whole_weights(model)
        acc.run_backward(accelerator, model, 0)
        report = clipper.step() if way == "step" else clipper.clip_()
        if way == "clip_":
            optimizer.step()
        assert report.skipped
        assert optimizer.step_was_skipped
        after = acc.whole_weights(model)
        assert all(torch.equal(before[name], after[name]) for name in before)


def every_nonfinite() -> None:
    for layout in ("fsdp1", "fsdp2"):
        for way in ("clip_", "step"):
            for make in ("sgd", "fused"):
                nonfinite(layout, make, way)
                vetoed(layout, make, way)


def test_a_step_that_is_not_finite_is_left_out(two_accelerated_ranks: Ranks) -> None:
    two_accelerated_ranks.run(every_nonfinite)


def by_value(layout: str, way: str) -> None:
    expected = acc.whole_gradients(1, acc.num_ranks(layout))
    bound = 0.02
    assert any((g.abs() > bound).any() for g in expected.values())
    clipped = reference.clip_value(list(expected.values()), bound)
    with acc.accelerator_for(layout) as accelerator:
        model, optimizer = acc.prepared(accelerator)
        if layout.startswith("fsdp"):
            acc.run_backward(accelerator, model)
            with pytest.raises(Exception, match="FSDP  do not support `clip_grad_value_`"):
                accelerator.clip_grad_value_(model.parameters(), bound)
            optimizer.zero_grad()
        clipper = prepare(accelerator, model, optimizer, ClipValue(bound))
        before = acc.whole_weights(model)
        acc.run_backward(accelerator, model)
        clipper.step() if way == "step" else clipper.clip_()
        if way == "clip_":
            optimizer.step()
        acc.check_applied(model, before, dict(zip(expected, clipped, strict=True)))


def every_by_value() -> None:
    for layout in acc.LAYOUTS:
        by_value(layout, "step" if layout == "fsdp2" else "clip_")


def test_clipping_by_value(two_accelerated_ranks: Ranks) -> None:
    two_accelerated_ranks.run(every_by_value)
