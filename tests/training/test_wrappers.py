"""Optimizers behind wrappers: clipped, unscaled and stepped once, as without the wrapper."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import distclip
from distclip.training.wrappers import list_optimizers
from tests.support.ranks import Ranks
from tests.support.training import (
    MAX_NORM,
    loss_of,
    make_model,
    make_scaler,
    train_as_torch,
    weights,
)

CLOSE = {"rtol": 2e-6, "atol": 2e-7}


class Proxy:
    """Reads go to the optimizer inside, writes stay here."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.hidden = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["hidden"], name)


class Strategy:
    """Lightning's: runs the closure and steps, under AMP by its scaler."""

    def __init__(self, scaler: GradScaler | None) -> None:
        self.scaler = scaler

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        if self.scaler is None or not self.scaler.is_enabled():
            return optimizer.step(closure)
        closure()
        return self.scaler.step(optimizer)


class Lightning:
    """As LightningOptimizer: takes on the class of its optimizer, and is stepped by a strategy."""

    def __init__(self, optimizer: Optimizer, scaler: GradScaler | None) -> None:
        self._optimizer, self._strategy = optimizer, Strategy(scaler)
        self.__class__ = type("Lightning", (self.__class__, type(optimizer)), {})

    @property
    def optimizer(self) -> Optimizer:
        return self._optimizer

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self._strategy.optimizer_step(self._optimizer, closure or (lambda: None))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class Lookahead(Optimizer):
    """A wrapper that is an optimizer with groups of its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__([p for g in optimizer.param_groups for p in g["params"]], {})

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class OwnStep:
    """Holds its optimizer under another name, and does something of its own in the step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.opt, self.num_steps = optimizer, 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.opt.param_groups

    def step(self, closure: Any = None) -> Any:
        self.num_steps += 1
        return self.opt.step()

    def zero_grad(self) -> None:
        self.opt.zero_grad()


class Container:
    """Several optimizers, as a list of an own class."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = list(optimizers)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def accelerated(optimizer: Optimizer, scaler: GradScaler | None = None) -> Any:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.Accelerator(cpu=True)
    return AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)


def titans(model: nn.Module, **options: Any) -> Any:
    """torchtitan's container, of two optimizers."""
    optimizer = pytest.importorskip("torchtitan.components.optimizer.optimizer")

    class Made(optimizer.OptimizersContainer):
        def __init__(self, parts: list[nn.Module]) -> None:
            self.model_parts = parts
            self.optimizers = [AdamW(part.parameters(), **options) for part in parts]
            self._post_init([p for part in parts for p in part.parameters()])

    return Made([model[0], model[2]])


def adamw(params: Any, fused: bool) -> Optimizer:
    return AdamW(params, lr=0.05, fused=fused, foreach=not fused)


# What the user holds, from a model; whether it calls the scaler itself.
WRAPPERS: dict[str, Callable[[nn.Module, bool, GradScaler], Any]] = {
    "accelerate": lambda m, fused, _: accelerated(adamw(m.parameters(), fused)),
    "accelerate with its scaler": lambda m, fused, scaler: accelerated(
        adamw(m.parameters(), fused), scaler if scaler.is_enabled() else None
    ),
    "proxy": lambda m, fused, _: Proxy(adamw(m.parameters(), fused)),
    "proxy of a proxy": lambda m, fused, _: Proxy(Proxy(adamw(m.parameters(), fused))),
    "accelerate, Lightning": lambda m, fused, _: accelerated(
        Lightning(adamw(m.parameters(), fused), None)
    ),
    "Lightning": lambda m, fused, _: Lightning(adamw(m.parameters(), fused), None),
    "Lookahead": lambda m, fused, _: Lookahead(adamw(m.parameters(), fused)),
    "own step": lambda m, fused, _: OwnStep(adamw(m.parameters(), fused)),
    "container": lambda m, fused, _: Container(
        adamw(m[0].parameters(), fused), adamw(m[2].parameters(), fused)
    ),
    "container of wrappers": lambda m, fused, _: Container(
        accelerated(adamw(m[0].parameters(), fused)), Proxy(adamw(m[2].parameters(), fused))
    ),
    "torchtitan": lambda m, fused, _: titans(m, lr=0.05, fused=fused),
}
# `scaler.step(wrapper)` works with these in torch too: nothing inside takes the scale itself.
STEPPED_BY_SCALER = {"accelerate", "Lookahead", "own step"}


def inner(handle: Any) -> list[Any]:
    """The optimizers that a trainer would give to `scaler.step`."""
    if isinstance(handle, Container) or hasattr(handle, "model_parts"):
        return [each for one in handle.optimizers for each in inner(one)]
    for name in ("hidden", "optimizer"):
        if name in vars(handle) or isinstance(handle, Lightning):
            return inner(vars(handle).get(name) or handle.optimizer)
    return [handle]


def steps_as_the_trainer(handle: Any, scaler: GradScaler, own: bool) -> None:
    if own or not scaler.is_enabled():
        handle.step()
    else:
        for each in inner(handle):
            scaler.step(each)


def trained(
    name: str, way: str, fused: bool, scaler: GradScaler, overflows: tuple[int, ...]
) -> tuple[nn.Module, list[distclip.Report], Any]:
    model = make_model()
    handle = WRAPPERS[name](model, fused, scaler)
    policy = distclip.AutoClip(percentile=100.0) & distclip.ClipNorm(MAX_NORM)
    clipper = distclip.Clipper(model, policy)
    attached = clipper.attach(handle, scaler) if way == "attach" else None
    reports = []
    for step in range(4):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step in overflows:
            model[0].weight.grad[0, 0] = math.inf
        own = "its scaler" in name and scaler.is_enabled()
        if way == "step":
            reports.append(clipper.step(handle, scaler))
        elif way == "clip_":
            reports.append(clipper.clip_(handle, scaler=scaler))
        elif way == "decide":
            decision = clipper.decide(handle, scaler)
            decision.apply_()
            reports.append(decision.report)
        if way != "step":
            steps_as_the_trainer(handle, scaler, own)
        if attached is not None and attached.report is not None:
            reports.append(attached.report)
        if scaler.is_enabled() and not own:
            scaler.update()
    (state,) = clipper.state_dict()["groups"]["all"].values()
    num_counted = 4 - len(overflows)
    assert int(state["first"]["num_steps"]) == num_counted
    for each in inner(handle):
        for optimizer in (each, handle):
            assert {"grad_scale", "found_inf"}.isdisjoint(vars(optimizer))
    return model, reports, handle


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("way", ["clip_", "decide", "step", "attach"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_as_without_the_wrapper(name: str, way: str, fused: bool, scaled: bool) -> None:
    overflows = (0, 2) if scaled else ()
    control, scaler = make_scaler(scaled), make_scaler(scaled)
    expected, _, norm = train_as_torch(
        lambda m: adamw(m.parameters(), fused), control, overflows=overflows
    )
    model, reports, handle = trained(name, way, fused, scaler, overflows)
    assert reports[-1].clipped
    torch.testing.assert_close(reports[-1].total_norm, norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(weights(model), weights(expected), **CLOSE)
    assert scaler.get_scale() == control.get_scale()
    if name == "accelerate with its scaler":
        assert not handle.step_was_skipped


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("name", sorted(STEPPED_BY_SCALER))
def test_a_scaler_that_steps_the_wrapper(name: str, fused: bool) -> None:
    scaler, control = make_scaler(), make_scaler()
    expected, _, _ = train_as_torch(lambda m: adamw(m.parameters(), fused), control, overflows=(1,))
    model = make_model()
    handle = WRAPPERS[name](model, fused, make_scaler(False))
    clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM))
    for step in range(4):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 1:
            model[0].weight.grad[0, 0] = math.inf
        clipper.clip_(handle, scaler)
        scaler.step(handle)
        scaler.update()
    torch.testing.assert_close(weights(model), weights(expected), **CLOSE)
    assert scaler.get_scale() == control.get_scale()


def test_accelerate_says_whether_it_skipped() -> None:
    scaler, model = make_scaler(), make_model()
    handle = accelerated(SGD(model.parameters(), lr=0.1), scaler)
    clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM))
    for value in (math.inf, 1.0, math.nan):
        model.zero_grad()
        scaler.scale(loss_of(model, 0)).backward()
        model[0].weight.grad[0, 0] *= value
        before = weights(model)
        report = clipper.step(handle, scaler)
        assert handle.step_was_skipped == (not math.isfinite(value))
        assert torch.equal(before, weights(model)) == handle.step_was_skipped
        assert report.clipped or handle.step_was_skipped


def test_two_of_accelerates_that_each_update_the_scaler() -> None:
    control = make_scaler()
    expected, _, _ = train_as_torch(lambda m: SGD(m.parameters(), lr=0.1), control)
    scaler, model = make_scaler(), make_model()
    handles = [accelerated(SGD(m.parameters(), lr=0.1), scaler) for m in (model[0], model[2])]
    clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM))
    for step in range(4):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        assert clipper.step(handles, scaler).clipped
    torch.testing.assert_close(weights(model), weights(expected), **CLOSE)


@pytest.fixture
def accumulating() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    yield accelerator
    accelerate.state.GradientState._reset_state()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("way", ["step", "attach", "clip_"])
def test_while_accelerate_accumulates(way: str, accumulating: Any) -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    model, both = make_model(), []
    handle = AcceleratedOptimizer(SGD(model.parameters(), lr=0.1), device_placement=False)
    clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM))
    attached = clipper.attach(handle) if way == "attach" else None
    scaler = make_scaler(way == "clip_")
    for step in range(4):
        with accumulating.accumulate(model):
            scaler.scale(loss_of(model, step)).backward()
            before = weights(model)
            both.append(last := accumulating.sync_gradients)
            if way == "attach":
                handle.step()
                assert last == (not torch.equal(before, weights(model)))
            elif not last:
                with pytest.raises(ValueError, match="accelerate is accumulating gradients"):
                    clipper.step(handle) if way == "step" else clipper.clip_(handle, scaler)
                assert torch.equal(before, weights(model))
            else:
                call = clipper.step if way == "step" else clipper.clip_
                assert call(handle, scaler).clipped
            handle.zero_grad()
            scaler.update() if scaler.is_enabled() and last else None
    assert both == [False, True, False, True]
    assert attached is None or attached.report.clipped


def test_attached_to_a_proxy_that_the_scaler_steps() -> None:
    """torch sets what a fused step reads on the proxy."""
    expected, _, norm = train_as_torch(lambda m: adamw(m.parameters(), True), make_scaler())
    model, scaler = make_model(), make_scaler()
    proxy = Proxy(adamw(model.parameters(), True))
    attached = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM)).attach(proxy, scaler)
    for step in range(4):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(proxy)
        scaler.update()
    assert attached.report.clipped
    torch.testing.assert_close(attached.report.total_norm, norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(weights(model), weights(expected), **CLOSE)


# Wrappers that do work of their own


def schedule_free(model: nn.Module, fused: bool) -> Any:
    schedulefree = pytest.importorskip("schedulefree")
    optimizer = schedulefree.ScheduleFreeWrapper(SGD(model.parameters(), lr=0.05, fused=fused))
    optimizer.train()
    return optimizer


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("way", ["clip_", "step", "attach"])
def test_schedule_free(way: str, fused: bool, scaled: bool) -> None:
    """A step that is left out changes nothing, the average of the weights included."""
    results = []
    for ours in (False, True):
        scaler, model = make_scaler(scaled), make_model()
        optimizer = schedule_free(model, fused)
        rule = "propagate" if scaled else "skip"
        clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM), on_nonfinite=rule)
        attached = clipper.attach(optimizer, scaler) if ours and way == "attach" else None
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if step == 2:
                model[0].weight.grad[0, 0] = math.nan
            if not ours:
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
                if norm.isfinite() or scaled:
                    scaler.step(optimizer)
            elif way == "step":
                assert clipper.step(optimizer, scaler).clipped or step == 2
            elif way == "clip_":
                report = clipper.clip_(optimizer, scaler)
                if report.finite or scaled:
                    scaler.step(optimizer)
            else:
                scaler.step(optimizer)
                assert attached.report.clipped or step == 2
            scaler.update()
        optimizer.eval()
        results.append(weights(model))
    torch.testing.assert_close(results[1], results[0], **CLOSE)


@pytest.mark.parametrize("way", ["step", "attach"])
def test_schedule_frees_own_optimizers(way: str) -> None:
    schedulefree = pytest.importorskip("schedulefree")
    results = []
    for ours in (False, True):
        model = make_model()
        optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05)
        optimizer.train()
        clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM))
        attached = clipper.attach(optimizer) if ours and way == "attach" else None
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if ours and way == "step":
                assert clipper.step(optimizer).clipped
                continue
            if not ours:
                nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            assert attached is None or attached.report.clipped
        results.append(weights(model))
    torch.testing.assert_close(results[1], results[0], **CLOSE)


def zero_redundancy(way: str, scaled: bool, make: str) -> None:
    with warnings.catch_warnings():  # torch's own module uses what torch deprecates
        warnings.simplefilter("ignore")
        from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

    results = []
    for ours in (False, True):
        model = DistributedDataParallel(make_model())
        optimizer = (
            ZeroRedundancyOptimizer(model.parameters(), AdamW, lr=0.05)
            if make == "zero"
            else PostLocalSGDOptimizer(AdamW(model.parameters(), lr=0.05), Averager())
        )
        scaler = make_scaler(scaled)
        clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM), on_nonfinite="skip")
        attached = clipper.attach(optimizer, scaler) if ours and way == "attach" else None
        for step in range(4):
            model.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if step == 1:
                next(model.parameters()).grad.fill_(math.nan)
            if ours and way == "step":
                report = clipper.step(optimizer, scaler)
                assert report.clipped or step == 1
            elif ours and way == "clip_":
                report = clipper.clip_(optimizer, scaler)
                if report.finite or scaled:
                    scaler.step(optimizer)
            elif ours:
                scaler.step(optimizer)
                assert attached.report.clipped or step == 1
            else:
                scaler.unscale_(optimizer)
                if nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).isfinite() or scaled:
                    scaler.step(optimizer)
            scaler.update()
        results.append(weights(model))
    torch.testing.assert_close(results[1], results[0], **CLOSE)


class Averager:
    def average_parameters(self, params: Any) -> None:
        self.num_calls = getattr(self, "num_calls", 0) + 1


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("make", ["zero", "post-local"])
@pytest.mark.parametrize("way", ["clip_", "step", "attach"])
def test_optimizers_of_torch_distributed(
    four_ranks: Ranks, way: str, make: str, scaled: bool
) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(zero_redundancy, way, scaled, make)


class Hybrid(Optimizer):
    """Steps matrices itself, and leaves the rest to an optimizer of its own."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        params = [*model.parameters()]
        self.optimizer = SGD([p for p in params if p.ndim < 2], lr=0.05, **options)
        super().__init__(params, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for param in self.param_groups[0]["params"]:
            if param.ndim > 1:
                param.sub_(0.05 * param.grad)
        self.optimizer.step()


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("way", ["clip_", "step", "attach"])
def test_an_optimizer_that_holds_one_for_some_parameters(
    way: str, fused: bool, scaled: bool
) -> None:
    scaler = make_scaler(scaled)
    expected, _, norm = train_as_torch(lambda m: SGD(m.parameters(), lr=0.05), make_scaler(scaled))
    model = make_model()
    optimizer = Hybrid(model, fused=fused)
    clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM))
    attached = clipper.attach(optimizer, scaler) if way == "attach" else None
    for step in range(4):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if way == "step":
            report = clipper.step(optimizer, scaler)
        else:
            report = clipper.clip_(optimizer, scaler) if way == "clip_" else None
            scaler.step(optimizer)
        scaler.update()
    report = attached.report if report is None else report
    assert report.clipped
    torch.testing.assert_close(report.total_norm, norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(weights(model), weights(expected), **CLOSE)


def test_an_optimizer_of_other_parameters_in_an_attribute_is_not_unscaled() -> None:
    model, scaler = make_model(), make_scaler()
    optimizer, other = SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)
    optimizer.helper = other
    clippers = [
        distclip.Clipper(part, distclip.ClipNorm(MAX_NORM)) for part in (model[0], model[2])
    ]
    scaler.scale(loss_of(model, 0)).backward()
    expected = [
        nn.utils.get_total_norm([p.grad for p in c.parameters()]) / 1024 for c in model[::2]
    ]
    for clipper, each, norm in zip(clippers, (optimizer, other), expected, strict=True):
        report = clipper.clip_(each, scaler)
        assert report.clipped
        torch.testing.assert_close(report.total_norm, norm, rtol=1e-6, atol=0)


def test_several_with_a_closure() -> None:
    model = make_model()
    optimizers = [SGD(part.parameters(), lr=0.1) for part in (model[0], model[2])]
    with pytest.raises(ValueError, match="cannot step 2 optimizers with one closure"):
        distclip.Clipper(model).step(optimizers, closure=lambda: loss_of(model, 0))


# What is refused


class Nothing:
    """Looks like an optimizer; what steps is in a closure."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.get = lambda: optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["get"](), name)


class Copies:
    """Steps copies of the parameters, as optimizers for mixed precision do."""

    def __init__(self, params: list[Tensor]) -> None:
        self.optimizer = SGD([p.detach().clone() for p in params], lr=0.1)

    def step(self) -> None: ...


@pytest.mark.parametrize("way", ["clip_", "decide", "step", "attach"])
def test_what_is_no_optimizer(way: str) -> None:
    model = make_model()
    loss_of(model, 0).backward()
    before = [p.grad.clone() for p in model.parameters()]
    clipper = distclip.Clipper(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    call = getattr(clipper, way)
    with pytest.raises(ValueError, match=r"for a Nothing: it is a proxy.*Pass the optimizer its"):
        call(Nothing(optimizer))
    for given in ("x", 3, [None], [optimizer, 3], {"a": optimizer}, optimizer.param_groups):
        with pytest.raises(
            TypeError, match=r"no optimizer, and holds none.*Pass the optimizer that steps"
        ):
            call(given)
    if way in ("step", "attach"):
        with pytest.raises(ValueError, match=r"step of a Copies: .* none of the parameters"):
            call(Copies([*model.parameters()]))
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
    assert "step" not in vars(optimizer)


def test_what_is_no_optimizer_is_found_in_a_list() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    assert list_optimizers([optimizer, optimizer]) == [optimizer]
    with pytest.raises(TypeError, match="optimizer"):
        list_optimizers([optimizer, 3])
