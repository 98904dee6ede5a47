"""What `attach` leaves of an optimizer's step, whatever wraps it and whatever raises in it."""

from __future__ import annotations

import math
import sys
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from distclip import AutoClip, ClipNorm, Clipper

LR = 0.1


def with_gradients(value: float = 3.0) -> nn.Linear:
    model = nn.Linear(4, 1, bias=False)
    model.weight.data.zero_()
    model.weight.grad = torch.full_like(model.weight, value)  # the norm is twice the value
    return model


def assert_stepped_once_clipped(model: nn.Linear) -> None:
    torch.testing.assert_close(model.weight.norm(), torch.tensor(LR))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("first", ["scheduler", "attach"])
def test_schedulers_before_and_after(fused: bool, first: str) -> None:
    """A scheduler puts a step of its own in the place of the optimizer's, and warns where another
    did.
    """
    model = with_gradients()
    optimizer = SGD(model.parameters(), lr=LR, fused=fused)
    if first == "scheduler":
        scheduler = StepLR(optimizer, 1)
        attached = Clipper(model).attach(optimizer)
    else:
        attached = Clipper(model).attach(optimizer)
        scheduler = StepLR(optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        scheduler.step()
    assert_stepped_once_clipped(model)
    assert attached.report.clipped
    attached.remove()
    model.weight.grad = torch.ones_like(model.weight)
    before = model.weight.clone()
    optimizer.step()
    torch.testing.assert_close(before - model.weight, torch.full((1, 4), LR * 0.1))


@pytest.mark.parametrize("fused", [True, False])
def test_removed_the_optimizer_is_as_it_was(fused: bool) -> None:
    model = with_gradients()
    optimizer = SGD(model.parameters(), lr=LR, fused=fused)
    before = dict(vars(optimizer))
    attached = Clipper(model).attach(optimizer)
    optimizer.step()
    attached.remove()
    attached.remove()  # once more does nothing
    assert vars(optimizer).keys() == before.keys()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_removed_in_any_order() -> None:
    model = with_gradients()
    optimizer = SGD(model.parameters(), lr=LR)
    first, second = Clipper(model).attach(optimizer), Clipper(model).attach(optimizer)
    first.remove()
    optimizer.step()
    assert_stepped_once_clipped(model)
    assert first.report is None
    assert second.report.clipped


class RaisesOnce(Optimizer):
    """A step that fails after torch's hooks ran."""

    fails = True

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self.fails:
            self.fails = False
            raise ZeroDivisionError
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad, alpha=group["lr"])


@pytest.mark.parametrize("value", [3.0, math.nan])
@pytest.mark.parametrize("replaced", [False, True], ids=["", "another step in the wrapper's place"])
def test_a_step_that_raises_leaves_nothing(value: float, replaced: bool) -> None:
    model = with_gradients(value)
    optimizer = RaisesOnce(model.parameters(), lr=LR)
    clipper = Clipper(model, AutoClip() & ClipNorm(1.0), on_nonfinite="skip")
    original = optimizer.step
    attached = clipper.attach(optimizer)
    if replaced:
        optimizer.step = original
    is_left_out = math.isnan(value) and not replaced
    with nullcontext() if is_left_out else pytest.raises(ZeroDivisionError):
        optimizer.step()
    if not replaced:
        assert model.weight.grad is not None
    optimizer.fails = False
    model.weight.grad = torch.full_like(model.weight, 3.0)
    optimizer.step()
    assert_stepped_once_clipped(model)
    assert attached.report.clipped
    (state,) = clipper.state_dict()["groups"]["all"].values()
    assert int(state["first"]["num_steps"]) == (2 if math.isfinite(value) else 1)


def test_a_fused_step_that_raises_leaves_no_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_gradients()
    optimizer = SGD(model.parameters(), lr=LR, fused=True)
    Clipper(model).attach(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["torch.optim.sgd"], "sgd", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
    assert {"grad_scale", "found_inf"}.isdisjoint(vars(optimizer))


def accelerates_step(optimizer: Optimizer, scaler: GradScaler, original: Any) -> None:
    """As accelerate's AcceleratedOptimizer under a scaler: its own step before, the first one
    after.
    """

    def patched(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    optimizer.step = patched
    scaler.step(optimizer)
    scaler.update()
    optimizer.step = original


@pytest.mark.parametrize("make", [SGD, AdamW])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_framework_that_puts_back_the_step_it_found(make: Any, when: str) -> None:
    """`attach` before accelerate's `prepare`, or after it."""
    model = with_gradients(3.0 * 16)
    optimizer = make(model.parameters(), lr=LR, fused=True)
    scaler = GradScaler("cpu", init_scale=16.0)
    scaler.scale(torch.zeros(()))
    clipper = Clipper(model, AutoClip() & ClipNorm(1.0))
    original = optimizer.step
    attached = clipper.attach(optimizer)
    if when == "before":
        original = optimizer.step
    for steps in (1, 2):
        model.weight.grad = torch.full_like(model.weight, 3.0 * 16)
        accelerates_step(optimizer, scaler, original)
        torch.testing.assert_close(attached.report.total_norm, torch.tensor(6.0))
        (state,) = clipper.state_dict()["groups"]["all"].values()
        assert int(state["first"]["num_steps"]) == steps
        if make is SGD:
            torch.testing.assert_close(model.weight.norm(), torch.tensor(LR * steps))


# Steps that are left out


class NoTestForNone(Optimizer):
    """As papers and tutorials write it: reads every gradient."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(group["lr"] * param.grad)
        return loss


class Inherits(NoTestForNone):
    """torch calls the hooks again in `super().step()`."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("make", [NoTestForNone, Inherits, SGD, AdamW])
def test_a_step_is_left_out(make: Any, with_closure: bool) -> None:
    model = with_gradients()
    optimizer = make(model.parameters(), lr=LR)
    scheduler = StepLR(optimizer, 1)
    clipper = Clipper(model, AutoClip() & ClipNorm(1.0), on_nonfinite="skip")
    attached = clipper.attach(optimizer)
    called: list[str] = []
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    for value in (math.nan, 3.0, math.inf):

        def closure(value: float = value) -> Tensor:
            model.weight.grad = torch.full_like(model.weight, value)
            return torch.tensor(value)

        before = model.weight.clone()
        if with_closure:
            torch.testing.assert_close(optimizer.step(closure), closure(), equal_nan=True)
        else:
            closure()
            assert optimizer.step() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler.step()
        assert attached.report.finite == math.isfinite(value)
        assert torch.equal(before, model.weight) == (not math.isfinite(value))
        assert model.weight.grad.isfinite().all() == math.isfinite(value)
        assert not optimizer.state or make is AdamW
    assert called
    assert clipper.skipped == 2
    (state,) = clipper.state_dict()["groups"]["all"].values()
    assert int(state["first"]["num_steps"]) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("first", [False, True], ids=["after ours", "before ours"])
@pytest.mark.parametrize("value", [3.0, math.nan])
def test_another_hook_that_raises(
    error: type[BaseException], fused: bool, scaled: bool, first: bool, value: float
) -> None:
    model, scaler = with_gradients(), GradScaler("cpu", init_scale=16.0, enabled=scaled)
    optimizer = SGD(model.parameters(), lr=LR, fused=fused)
    clipper = Clipper(model, AutoClip() & ClipNorm(1.0), on_nonfinite="skip")
    fails = [True]

    def other(*_: Any) -> None:
        if fails[0]:
            raise error("stop")

    if first:
        optimizer.register_step_pre_hook(other)
    attached = clipper.attach(optimizer)
    if not first:
        optimizer.register_step_pre_hook(other)
    scaler.scale(torch.zeros(()))
    model.weight.grad = torch.full_like(model.weight, value * (16 if scaled else 1))
    grad = model.weight.grad
    # The host leaves out a step that is not fused and its later hooks, or a scaler does.
    runs = math.isfinite(value) or fused or (first and not scaled)
    with pytest.raises(error) if runs else nullcontext():
        scaler.step(optimizer)
    assert model.weight.grad is grad
    assert runs or scaled or attached.report is not None
    if runs:
        assert {"grad_scale", "found_inf"}.isdisjoint(vars(optimizer))
    fails[0] = False
    model.weight.data.zero_()
    optimizer.zero_grad()
    model.weight.grad = torch.full_like(model.weight, 3.0)
    optimizer.step()
    assert_stepped_once_clipped(model)
    torch.testing.assert_close(attached.report.total_norm, torch.tensor(6.0))


def test_a_step_without_the_wrapper_after_one_with_it_is_left_out() -> None:
    """accelerate calls the step of the class, which runs the hooks alone."""
    model = with_gradients()
    optimizer = SGD(model.parameters(), lr=LR)
    attached = Clipper(model, on_nonfinite="skip").attach(optimizer)
    optimizer.step()
    assert_stepped_once_clipped(model)
    before = model.weight.clone()
    model.weight.grad.fill_(math.nan)
    SGD.step(optimizer)
    assert attached.report.skipped
    assert torch.equal(model.weight, before)
    assert model.weight.grad is not None


def test_hidden_gradients_of_a_step_that_raised_do_not_come_back() -> None:
    """Where another step stands in the wrapper's place; the next one has one gradient less."""
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = NoTestForNone([first, second], LR)
    attached = Clipper([first, second], on_nonfinite="skip").attach(optimizer)
    del vars(optimizer)["step"]
    for param in (first, second):
        param.grad = torch.full((2,), math.nan)
    with pytest.raises(TypeError):
        optimizer.step()
    optimizer.zero_grad()
    first.grad = torch.full((2,), 3.0)
    with pytest.raises(TypeError):
        optimizer.step()
    assert second.grad is None
    assert attached.report.finite


def test_gradients_that_a_later_evaluation_of_a_closure_put_stay() -> None:
    model = with_gradients()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=LR, max_iter=3)
    attached = Clipper(model, on_nonfinite="skip").attach(optimizer)
    values = iter([3.0, math.nan, 1.0, 2.0])

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = next(values)
        model.weight.grad = torch.full_like(model.weight, value)
        return torch.tensor(value)

    optimizer.step(closure)
    assert model.weight.grad is not None
    assert model.weight.isfinite().all()
    assert attached.report is not None
