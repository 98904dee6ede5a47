"""`step` and `attach` do what clipping and stepping one after the other do, with any optimizer."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

import distclip
from tests.support import reference
from tests.support.training import (
    MAX_NORM,
    Make,
    loss_of,
    make_model,
    make_scaler,
    states,
    train,
    train_as_torch,
    weights,
)
from tests.support.writes import counted_writes

# Sums of squares, and of squares of squares in Adam's second moments: two float32 roundings of the
# coefficient.
CLOSE = {"rtol": 2e-6, "atol": 2e-7}


class OwnSGD(Optimizer):
    """As a third party writes it."""

    def __init__(self, params: object, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.data.add_(param.grad, alpha=-group["lr"])


class OwnAdamW(AdamW):
    """A subclass may do anything with gradients in its step: nothing is folded."""

    def step(self, closure: object = None) -> object:
        self.seen = [
            p.grad.norm() for g in self.param_groups for p in g["params"] if p.grad is not None
        ]
        return super().step()


def halves(model: nn.Module, cls: type, **kwargs: object) -> Optimizer:
    """Two groups, of which only one is fused."""
    fused, foreach = ({"fused": True}, {"fused": False, "foreach": True})
    groups = [
        {"params": model[0].parameters(), **fused},
        {"params": model[2].parameters(), **foreach},
    ]
    return cls(groups, **kwargs)


FUSED: dict[str, Make] = {
    "Adam": lambda m: Adam(m.parameters(), lr=0.05, fused=True),
    "AdamW": lambda m: AdamW(m.parameters(), lr=0.05, fused=True, amsgrad=True),
    "SGD": lambda m: SGD(m.parameters(), lr=0.05, fused=True),
    "SGD with momentum": lambda m: SGD(
        m.parameters(), lr=0.05, momentum=0.9, nesterov=True, fused=True
    ),
    "Adagrad": lambda m: Adagrad(m.parameters(), lr=0.05, lr_decay=0.1, fused=True),
}
OTHERS: dict[str, Make] = {
    "SGD, fused, with dampening": lambda m: SGD(
        m.parameters(), lr=0.05, momentum=0.9, dampening=0.2, fused=True
    ),
    "AdamW, foreach": lambda m: AdamW(m.parameters(), lr=0.05, foreach=True),
    "SGD, for-loop": lambda m: SGD(m.parameters(), lr=0.05, momentum=0.9, foreach=False),
    "NAdam": lambda m: NAdam(m.parameters(), lr=0.05),
    "RMSprop": lambda m: RMSprop(m.parameters(), lr=0.01),
    "mixed groups": lambda m: halves(m, AdamW, lr=0.05),
    "mixed groups, SGD": lambda m: halves(m, SGD, lr=0.05, momentum=0.9),
    "mixed groups of a fused optimizer": lambda m: halves(m, AdamW, lr=0.05, fused=True),
    "third party": lambda m: OwnSGD(m.parameters(), lr=0.05),
    "subclass": lambda m: OwnAdamW(m.parameters(), lr=0.05, fused=True),
}


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("name", [*FUSED, *OTHERS])
def test_as_torch_clips_and_steps(name: str, scaled: bool) -> None:
    """Overflows at the first step, where optimizers have no state, and later."""
    make = (FUSED | OTHERS)[name]
    overflows = (0, 2) if scaled else ()
    control = make_scaler(scaled)
    expected, expected_optimizer, norm = train_as_torch(make, control, overflows=overflows)
    for way in ("step", "attach", "clip_"):
        if (
            way == "clip_"
            and scaled
            and name in ("SGD, fused, with dampening", "mixed groups of a fused optimizer")
        ):
            continue  # torch's own scaler.step fails on them
        scaler = make_scaler(scaled)
        with counted_writes() as written:
            model, optimizer, reports = train(way, make, scaler, overflows=overflows)
        assert reports[-1].clipped
        torch.testing.assert_close(
            reports[-1].total_norm, norm, rtol=1e-5, atol=0
        )  # without the scale
        assert 0 < reports[-1].coefficient < 0.5
        assert math.isclose(reports[-1].limit, MAX_NORM)
        folds = name in FUSED and way != "clip_"
        assert folds == (not written)
        torch.testing.assert_close(weights(model), weights(expected), **CLOSE)
        torch.testing.assert_close(states(optimizer), states(expected_optimizer), **CLOSE)
        assert scaler.get_scale() == control.get_scale() == (256 if scaled else 1)


@pytest.mark.parametrize("rule", ["skip", "zero"])
@pytest.mark.parametrize(
    "name", [*FUSED, "SGD, fused, with dampening", "AdamW, foreach", "mixed groups", "subclass"]
)
def test_skip_and_zero_without_a_scaler(name: str, rule: str) -> None:
    make = (FUSED | OTHERS)[name]
    for way in ("step", "attach"):
        model, optimizer, reports = train(
            way, make, make_scaler(False), overflows=(0, 2), on_nonfinite=rule
        )
        assert [bool(r.finite) for r in reports] == [False, True, False, True]
        assert reports[-1].clipped
        if rule == "zero":
            assert weights(model).isfinite().all()
            assert [float(r.coefficient) for r in reports[::2]] == [0, 0]
            continue
        expected, expected_optimizer, _ = train_as_torch(make, make_scaler(False), overflows=(0, 2))
        torch.testing.assert_close(weights(model), weights(expected), **CLOSE)
        torch.testing.assert_close(states(optimizer), states(expected_optimizer), **CLOSE)


@pytest.mark.parametrize("way", ["step", "attach", "clip_"])
def test_a_skipped_first_step_leaves_no_garbage_in_momentum(way: str) -> None:
    torch.use_deterministic_algorithms(True)  # fills what torch leaves uninitialised with NaN
    try:
        model, _, reports = train(way, FUSED["SGD with momentum"], make_scaler(), overflows=(0,))
    finally:
        torch.use_deterministic_algorithms(False)
    assert reports[-1].clipped
    assert weights(model).isfinite().all()


def with_gradients(step: int = 0) -> nn.Module:
    model = make_model()
    loss_of(model, step).backward()
    return model


def test_the_attributes_are_gone_when_the_step_raises() -> None:
    for scaler in (None, make_scaler()):
        model = make_model()
        optimizer = FUSED["AdamW"](model)
        loss = loss_of(model, 0)
        (loss if scaler is None else scaler.scale(loss)).backward()
        clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM))
        seen = []

        def fail(optimizer: Optimizer, *_: object, seen: list[object] = seen) -> None:
            seen.append(optimizer.grad_scale)
            raise KeyError("stop")

        hook = optimizer.register_step_pre_hook(fail)
        with pytest.raises(KeyError, match="stop"):
            clipper.step(optimizer, scaler)
        assert seen[0] > 1  # it did fold
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
        hook.remove()


def test_attached_the_attributes_go_with_the_next_step_or_remove() -> None:
    model = with_gradients()
    optimizer = FUSED["AdamW"](model)
    attached = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM)).attach(optimizer)
    fail = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert attached.report.clipped
    attached.remove()
    assert not hasattr(optimizer, "grad_scale")
    fail.remove()
    before = weights(model)
    optimizer.step()
    assert not torch.equal(before, weights(model))
    assert not optimizer._optimizer_step_pre_hooks


def test_a_closure_is_clipped_at_each_evaluation() -> None:
    def run(way: str, cls: type, **kwargs: object) -> Tensor:
        model = make_model().double()
        optimizer = cls(model.parameters(), **kwargs)
        clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM))
        attached = clipper.attach(optimizer) if way == "attach" else None
        norms = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            if way == "by hand":  # torch's 1e-6 would lead LBFGS elsewhere
                grads = [p.grad for p in model.parameters()]
                norms.append(reference.total_norm(grads))
                for grad, clipped in zip(grads, reference.clip_norm(grads, MAX_NORM), strict=True):
                    grad.copy_(clipped)
            return loss

        for _ in range(3):
            if way == "step":
                norms.append(clipper.step(optimizer, closure=closure).total_norm)
            else:
                optimizer.step(closure)
            if attached is not None:
                norms.append(attached.report.total_norm)
        assert max(norms) > MAX_NORM
        return weights(model)

    for cls, kwargs in (
        (LBFGS, {"lr": 0.1, "max_iter": 4}),
        (SGD, {"lr": 0.1, "fused": True}),
        (SGD, {"lr": 0.1, "foreach": False}),
    ):
        expected = run("by hand", cls, **kwargs)
        for way in ("step", "attach"):
            torch.testing.assert_close(run(way, cls, **kwargs), expected, rtol=1e-4, atol=1e-6)


def test_a_closure_that_overflows_is_skipped() -> None:
    for cls in (LBFGS, SGD):
        model = make_model()
        optimizer = cls(model.parameters(), lr=0.1)
        clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM), on_nonfinite="skip")

        def closure(model: nn.Module = model, optimizer: Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, 0) * math.inf
            loss.backward()
            return loss

        before = weights(model)
        report = clipper.step(optimizer, closure=closure)
        assert not report.finite
        assert torch.equal(weights(model), before)
        assert not model[0].weight.grad.isfinite().all()  # kept for inspection


@pytest.mark.parametrize("fused", [True, False])
def test_one_clipper_over_two_optimizers(fused: bool) -> None:
    """One after the other and both at once: always one coefficient, that of all gradients."""

    def make(model: nn.Module) -> list[Optimizer]:
        return [SGD(part.parameters(), lr=0.05, fused=fused) for part in (model[0], model[2])]

    model = with_gradients()
    first, second = make(model)
    assert nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM) > 2 * MAX_NORM
    first.step()
    second.step()
    expected = weights(model)
    for way in ("both", "in turn", "attached"):
        model = with_gradients()
        first, second = make(model)
        clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM))
        if way == "both":
            assert clipper.step([first, second]).clipped
        elif way == "in turn":
            assert clipper.step(first).clipped
            clipper.step(second)
        else:
            for optimizer in (first, second):
                clipper.attach(optimizer)
                optimizer.step()
        torch.testing.assert_close(weights(model), expected, **CLOSE)


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return (10 * model(x) - 5).square().mean()


def test_a_compiled_step_has_no_graph_break() -> None:
    """The loss is one graph (`fullgraph`), and the clip after it is as without compilation."""

    def run(compiled: bool) -> Tensor:
        model = make_model()
        optimizer = FUSED["AdamW"](model)
        clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM))
        loss = torch.compile(squares, fullgraph=True, backend="aot_eager") if compiled else squares
        reports = []
        for _ in range(3):
            loss(model, torch.arange(24.0).reshape(6, 4)).backward()
            reports.append(clipper.step(optimizer))
            optimizer.zero_grad()
        assert all(r.clipped for r in reports)
        return weights(model)

    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(run(True), run(False), **CLOSE)
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("rule", ["propagate", "skip", "zero"])
def test_no_host_synchronisation_and_capture_in_a_cuda_graph(rule: str) -> None:
    model = make_model("cuda")
    # Where nothing folds ("zero") the step itself is torch's; "skip" folds.
    optimizer = AdamW(model.parameters(), lr=0.05, fused=True, capturable=True)
    clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM), on_nonfinite=rule)
    for _ in range(8):
        loss_of(model, 0).backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            clipper.clip_()
            report = clipper.step(optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert report.total_norm <= MAX_NORM * (1 + 1e-6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = clipper.step(optimizer)
    for param in model.parameters():
        param.grad.fill_(3.0)
    before = weights(model)
    graph.replay()
    assert report.clipped
    assert not torch.equal(before, weights(model))
    model[0].weight.grad[0, 0] = math.nan
    before = weights(model)
    graph.replay()
    assert not report.finite
    if rule == "skip":
        assert torch.equal(before, weights(model))
        assert clipper.skipped == 1
    elif rule == "zero":
        assert weights(model).isfinite().all()
