"""What fused optimizers are handed: numbers that have arrived, and a factor only where it pays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

import distclip
from distclip import step, torch_private
from distclip.decision import Decision
from distclip.training import grad_scaler, optimizers

FUSED = [SGD, Adam, AdamW, Adagrad]


class OnDevice(Tensor):
    """A number that says that it lies on an accelerator, and records how it is copied from there.

    Without waiting nothing has arrived: such a copy is NaN.
    """

    waits: ClassVar[list[bool]] = []

    @staticmethod
    def __new__(cls, values: Tensor) -> OnDevice:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device="cuda:0")

    def __init__(self, values: Tensor) -> None:
        self.values_there = values

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None)
        waits = not kwargs.pop("non_blocking", False)
        there = [each.values_there if isinstance(each, cls) else each for each in args]
        result = function(*there, **kwargs)
        if device is None or device.type != "cpu":
            return cls(result)
        cls.waits.append(waits)
        return result if waits else torch.full_like(result, torch.nan)


@pytest.fixture(autouse=True)
def _nothing_recorded() -> Iterator[None]:
    OnDevice.waits.clear()
    yield
    OnDevice.waits.clear()


def model_with_gradients() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    model(torch.ones(4, 5)).square().sum().backward()
    return model


def fused(cls: Callable[..., Optimizer], model: nn.Module) -> Optimizer:
    return cls(model.parameters(), lr=0.1, fused=True)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("found", [0.0, 1.0])
@pytest.mark.parametrize("cls", FUSED)
def test_a_step_on_a_cpu_gets_numbers_that_have_arrived(cls: Any, found: float) -> None:
    model, expected = model_with_gradients(), model_with_gradients()
    for param in expected.parameters():
        param.grad.mul_(0.25)
    if not found:
        fused(cls, expected).step()
    factor = OnDevice(torch.tensor(0.25, dtype=torch.float64))
    optimizer = fused(cls, model)
    with optimizers.folded(optimizer, factor, OnDevice(torch.tensor(found))):
        optimizer.step()
    assert OnDevice.waits == [True, True]
    torch.testing.assert_close(weights(model), weights(expected))


def test_a_factor_of_1_that_was_waited_for_is_left_out() -> None:
    optimizer = fused(AdamW, model_with_gradients())
    optimizers.fold_(optimizer, OnDevice(torch.tensor(1.0, dtype=torch.float64)), None)
    assert optimizer.grad_scale is optimizer.found_inf is None


def test_one_number_serves_parameters_on_several_devices() -> None:
    params = [nn.Parameter(torch.ones(3, device=device)) for device in ("meta", "cpu", "meta")]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = AdamW(params, fused=False)
    optimizers.fold_(optimizer, OnDevice(torch.tensor(0.5)), OnDevice(torch.tensor(0.0)))
    assert optimizer.grad_scale.is_cpu
    assert optimizer.found_inf.is_cpu
    params[1].grad = None  # and is not stepped
    factor = OnDevice(torch.tensor(0.5))
    optimizers.fold_(optimizer, factor, factor)
    assert optimizer.found_inf is factor
    assert type(optimizer.grad_scale) is OnDevice


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions say that their numbers lie on an accelerator."""
    decide, factor_of = step.decide, Decision.factor_of

    def decide_there(*args: Any, **kwargs: Any) -> Decision:
        decision = decide(*args, **kwargs)
        decision.total_norm = OnDevice(decision.total_norm)
        return decision

    monkeypatch.setattr(step, "decide", decide_there)
    monkeypatch.setattr(Decision, "factor_of", lambda d, group: OnDevice(factor_of(d, group)))
    monkeypatch.setattr(
        Decision, "skip", lambda d, scaled: OnDevice(d.found_inf) if scaled else None
    )


def seen_by_steps(optimizer: Optimizer) -> list[tuple[Tensor | None, Tensor | None]]:
    """What each step of `optimizer` reads."""
    seen: list[tuple[Tensor | None, Tensor | None]] = []

    def record(*_: Any) -> None:
        seen.append((optimizer.grad_scale, optimizer.found_inf))

    optimizer.register_step_pre_hook(record)
    return seen


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("way", ["step", "attach"])
def test_offloaded_parameters(way: str, num: int) -> None:
    model, expected = model_with_gradients(), model_with_gradients()
    distclip.clip_grad_norm_(expected, 0.5)
    for param in expected.parameters():
        fused_one(AdamW, [param]).step()
    params = [*model.parameters()]
    parts = [params] if num == 1 else [params[:1], params[1:]]
    several = [fused_one(AdamW, part) for part in parts]
    clipper = distclip.Clipper(model, distclip.ClipNorm(0.5))
    if way == "step":
        clipper.step(several)
    else:
        clipper.attach(several)
        for optimizer in several:
            optimizer.step()
    assert OnDevice.waits
    assert all(OnDevice.waits)
    torch.testing.assert_close(weights(model), weights(expected))


def fused_one(cls: Callable[..., Optimizer], params: Sequence[Tensor]) -> Optimizer:
    return cls(params, lr=0.1, fused=True)


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("cls", FUSED)
def test_a_scaler_of_an_accelerator_leaves_the_flag_to_the_host(
    cls: Any, overflow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, scaler = model_with_gradients(), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    optimizer, before = fused(cls, model), weights(model)
    grad_scaler.record(scaler, [optimizer], torch.tensor(float(overflow)))
    monkeypatch.setattr(scaler, "step", lambda *_: pytest.fail("torch copies without waiting"))
    scale = torch.ones((), device="meta")
    monkeypatch.setattr(torch_private, "loss_scale", lambda _: scale)
    grad_scaler.step_optimizer(optimizer, scaler)
    assert torch.equal(weights(model), before) == overflow
    assert grad_scaler.stage_of(scaler, optimizer) is torch.amp.grad_scaler.OptState.STEPPED


def test_a_scaler_on_the_cpu_steps_itself() -> None:
    optimizer, cpu = fused(AdamW, model_with_gradients()), torch.device("cpu")
    assert not optimizers.reads_too_early(optimizer, cpu)
    assert optimizers.reads_too_early(optimizer, torch.device("cuda"))
    plain = AdamW(model_with_gradients().parameters(), fused=False)
    assert not optimizers.reads_too_early(plain, torch.device("cuda"))


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize(("way", "scale"), [("step", None), ("step", 0.5), ("attach", None)])
def test_without_waiting_a_factor_is_folded_only_where_one_is_needed_anyway(
    way: str, num: int, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = model_with_gradients(), model_with_gradients()
    for param in expected.parameters():
        param.grad.mul_(1 if scale is None else scale)
    distclip.clip_grad_norm_(expected, 0.5)
    fused(AdamW, expected).step()
    monkeypatch.setattr(optimizers, "_steps_on_cpu", lambda _: False)
    decide = step.decide

    def decide_there(*args: Any, **kwargs: Any) -> Decision:
        decision = decide(*args, **kwargs)
        decision.total_norm = OnDevice(decision.total_norm)
        return decision

    monkeypatch.setattr(step, "decide", decide_there)
    params = [*model.parameters()]
    parts = [params] if num == 1 else [params[:1], params[1:]]
    several = [fused_one(AdamW, part) for part in parts]
    clipper = distclip.Clipper(model, distclip.ClipNorm(0.5), on_nonfinite="skip")
    if way == "attach":
        clipper.attach(several)
    seen = [seen_by_steps(each) for each in several]
    if way == "step":
        clipper.step(several, scale=scale)
    else:
        for optimizer in several:
            optimizer.step()
    for ((grad_scale, found_inf),) in seen:
        assert (grad_scale is None) == (scale is None)
        assert found_inf == 0  # nothing waits to skip
    torch.testing.assert_close(weights(model), weights(expected))


def test_a_part_without_gradients_here_is_not_replaced() -> None:
    """Of a part of a model, a rank of FSDP1 may have no elements, and no gradients."""
    part, rest = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    rest.grad = torch.ones(2)
    clipper = distclip.Clipper([part])
    assert clipper.clip_(torch.optim.SGD([part, rest])).total_norm == 0
    with pytest.raises(ValueError, match="that the Clipper does not hold"):
        clipper.clip_(torch.optim.SGD([rest]))
