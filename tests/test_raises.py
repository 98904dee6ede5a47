"""Policies whose coefficients may lie above 1, on every way that a coefficient takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import distclip
from distclip import (
    AGGC,
    AdaGN,
    Clipper,
    ClipTensorNorm,
    EmptyState,
    NormContext,
    Scope,
    SkipSpike,
    StatelessPolicy,
)
from distclip.limits import raising_coefficients
from tests.support import reference
from tests.support.tolerances import TOLERANCES

MOST = 2.0**100
F64 = torch.float64


@dataclass(frozen=True)
class Normalize(StatelessPolicy):
    """Every group gets the norm `target`."""

    target: float = 1.0
    scope: Scope = Scope.MODEL
    norm_type: float = 2.0
    exclude: tuple[str, ...] = ()
    raises = True

    def limit(
        self, norms: Tensor, state: EmptyState, context: NormContext
    ) -> tuple[Tensor, EmptyState]:
        return torch.full_like(norms, self.target), state


def parameters(*grads: list[float] | Tensor, dtype: torch.dtype = torch.float32) -> Any:
    values = [torch.as_tensor(grad).to(dtype) for grad in grads]
    params = [nn.Parameter(torch.zeros_like(value)) for value in values]
    for param, value in zip(params, values, strict=True):
        param.grad = value.clone()
    return params


def test_coefficients() -> None:
    norms = torch.tensor([4.0, 0.25, 0.0, 0.0, 2.0**-60, 1e-300, 3.0, 2.0, math.inf], dtype=F64)
    limits = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0, math.inf, 0.0, 1.0], dtype=F64)
    expected = torch.tensor([0.25, 4.0, 1.0, 1.0, 2.0**60, MOST, 1.0, 0.0, 0.0], dtype=F64)
    assert torch.equal(raising_coefficients(norms, limits), expected)
    nan = torch.tensor([math.nan, 1.0], dtype=F64)
    assert raising_coefficients(nan, nan.flip(0)).isnan().all()
    assert raising_coefficients(norms[1], torch.tensor(2.0, dtype=F64)) == 8.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", [Scope.MODEL, Scope.TENSOR, Scope.UNIT], ids=str)
def test_small_gradients_grow_and_zeros_stay(scope: Scope, dtype: torch.dtype) -> None:
    grads = [torch.tensor([[3e-3, -4e-3], [0.0, 5e-3]]), torch.zeros(3), torch.tensor([7e-3])]
    params = parameters(*grads, dtype=dtype)
    rounded = [param.grad.double() for param in params]
    report = Clipper(params, Normalize(1.5, scope)).clip_()
    if scope is Scope.MODEL:
        total = reference.total_norm(rounded)
        expected = [grad * 1.5 / total for grad in rounded]
    elif scope is Scope.TENSOR:
        expected = [grad * (1.5 / grad.norm() if grad.any() else 1.0) for grad in rounded]
    else:
        rows = rounded[0] * 1.5 / rounded[0].norm(dim=1, keepdim=True)
        expected = [rows, rounded[1], rounded[2] * 1.5 / rounded[2].norm()]
    for param, want in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad.double(), want, **TOLERANCES[dtype])
    assert not report.clipped
    # A tensor of zeros keeps 1, the smallest of the coefficients.
    assert report.coefficient == 1.0 if scope is not Scope.MODEL else report.coefficient > 100
    assert report.limit == 1.5


def test_clipped_says_whether_any_gradient_became_smaller() -> None:
    params = parameters([0.3, 0.4], [30.0, 40.0])
    report = Clipper(params, Normalize(1.0, Scope.TENSOR)).clip_()
    assert report.clipped
    assert report.coefficient == pytest.approx(0.02)
    torch.testing.assert_close(params[0].grad, torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(params[1].grad, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("scope", [Scope.MODEL, Scope.TENSOR, Scope.UNIT], ids=str)
@pytest.mark.parametrize("size", [1e-45, 1e-42, 1e-38])
def test_what_float32_barely_holds_is_raised_by_no_more_than_float32_holds(
    size: float, scope: Scope
) -> None:
    for grad in (torch.full((3, 1), size), torch.full((300, 1), size)):
        (param,) = parameters(grad)
        report = Clipper([param], Normalize(1.0, scope)).clip_()
        assert report.coefficient == MOST
        torch.testing.assert_close(param.grad.double(), grad.double() * MOST, rtol=2e-7, atol=0)


def test_excluded_parameters_and_an_infinite_limit_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    for param in model.parameters():
        param.grad = torch.full_like(param, 0.01)
    Clipper(model, Normalize(1.0, Scope.UNIT, exclude=("1",))).clip_()
    assert torch.equal(model[1].weight.grad, torch.full((1, 2), 0.01))
    torch.testing.assert_close(model[0].weight.grad, torch.full((2, 2), 0.5**0.5))
    (param,) = parameters([0.3, 0.4])
    assert Clipper([param], Normalize(math.inf)).clip_().coefficient == 1
    assert torch.equal(param.grad, torch.tensor([0.3, 0.4]))


SIZE = st.floats(0, 2.0**100, width=32) | st.sampled_from([0.0, 1e-45, 1e-38, 1.0])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=st.lists(SIZE, min_size=1, max_size=4), target=st.floats(0, 1e6))
def test_every_tensor_gets_the_norm_or_stays_zero(sizes: list[float], target: float) -> None:
    params = parameters(*([0.6 * size, -0.8 * size] for size in sizes))
    norms = [param.grad.double().norm().item() for param in params]
    Clipper(params, Normalize(target, Scope.TENSOR)).clip_()
    for param, norm in zip(params, norms, strict=True):
        want = min(target, norm * MOST) if norm else 0.0
        assert param.grad.double().norm().item() == pytest.approx(want, rel=2e-7, abs=1e-44)


@pytest.mark.parametrize("mode", ["propagate", "raise", "skip", "zero"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("policy", [Normalize(), AdaGN(), AGGC()], ids=lambda p: type(p).__name__)
def test_a_norm_that_is_not_finite(policy: Any, bad: float, mode: str) -> None:
    clipper = Clipper(parameters([0.3, 0.4], [0.6]), policy, on_nonfinite=mode)
    clipper.clip_()
    before = str(clipper.state_dict())
    params = [held.param for held in clipper.plan.params]
    params[0].grad, params[1].grad = torch.tensor([0.3, bad]), torch.tensor([0.6])
    if mode == "raise":
        with pytest.raises(distclip.NonFiniteGradientError):
            clipper.clip_()
        assert params[0].grad[0] == 0.3
    else:
        report = clipper.clip_()
        assert not report.finite
        if mode == "zero":
            assert not params[0].grad.any()
            assert not params[1].grad.any()
        if mode == "skip":
            assert params[0].grad[0] == 0.3
        if mode == "propagate":
            assert not params[0].grad.isfinite().all()
    assert str(clipper.state_dict()) == before


def test_elements_are_clamped_and_cannot_be_raised() -> None:
    with pytest.raises(TypeError, match=r"raises norms and has Scope\.ELEMENT.*clamped"):
        Clipper(parameters([1.0]), Normalize(1.0, Scope.ELEMENT))


# Ways into an optimizer --------------------------------------------------------------------------

WAYS = ["clip_", "step", "attach", "overlap"]
MAKES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "fused": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
    "fused adamw": lambda params: torch.optim.AdamW(params, lr=0.01, eps=0.1, fused=True),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def losses(of: nn.Module) -> Any:
    """Each much smaller or larger than the one before."""
    for step, size in enumerate([0.01, 0.01, 100.0, 1e-3, 1.0]):
        generator = torch.Generator().manual_seed(step)
        yield size * of(torch.randn(16, 4, generator=generator)).square().mean()


def by_hand(policy: Any, make: Any) -> nn.Module:
    """Gradients times the coefficients of the float64 reference, and an ordinary step."""
    trained = model()
    optimizer, norms = make(trained.parameters()), []
    raised = lowered = 0
    for loss in losses(trained):
        optimizer.zero_grad()
        loss.backward()
        grads = [param.grad for param in trained.parameters()]
        if isinstance(policy, AdaGN):
            norms.append([grad.double().norm().item() for grad in grads])
            new = reference.adagn(norms, 0.7, 0.9, 1e-8)[-1]
            factors = (new / torch.tensor(norms[-1], dtype=F64)).tolist()
        else:
            norms.append(reference.total_norm(grads).item())
            new = reference.aggc(norms, 0.95, 0.6, 0.95, 0.9, 1.1)[-1]
            factors = [new / norms[-1]] * len(grads)
        raised += max(factors) > 1
        lowered += min(factors) < 1
        for grad, factor in zip(grads, factors, strict=True):
            grad.mul_(factor)
        optimizer.step()
    assert raised
    assert lowered
    return trained


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", [AdaGN(), AGGC(), SkipSpike() & AGGC()], ids=["n", "g", "s"])
def test_every_way_into_an_optimizer(policy: Any, way: str, make: Any, scaled: bool) -> None:
    expected, trained = by_hand(policy, make), model()
    optimizer = make(trained.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if scaled else None
    clipper = Clipper(trained, policy, overlap=way == "overlap")
    attached = clipper.attach(optimizer, scaler) if way == "attach" else None
    for loss in losses(trained):
        optimizer.zero_grad()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if way == "step":
            clipper.step(optimizer, scaler=scaler)
        elif attached is None:
            clipper.clip_(optimizer=optimizer if scaler else None, scaler=scaler)
        if way != "step":
            optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
    for mine, want in zip(trained.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, want, rtol=2e-5, atol=1e-6)


def test_a_scale_is_folded_in() -> None:
    params = parameters([30.0, 40.0])
    report = Clipper(params, Normalize(2.0)).clip_(scale=1 / 1000)
    assert report.total_norm == pytest.approx(0.05)
    assert report.coefficient == pytest.approx(40.0)
    torch.testing.assert_close(params[0].grad, torch.tensor([1.2, 1.6]))


def test_one_group_raises_and_another_clips() -> None:
    params = parameters([0.3, 0.4], [30.0, 40.0], [0.5])
    groups = [
        {"name": "a", "params": params[:1], "policy": Normalize(5.0)},
        {"name": "b", "params": params[1:], "policy": ClipTensorNorm(1.0)},
    ]
    report = Clipper(groups).clip_()
    assert report.coefficients["a"] == pytest.approx(10.0)
    assert report.coefficients["b"] == pytest.approx(0.02)
    assert report.clipped
    torch.testing.assert_close(params[0].grad, torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(params[1].grad, torch.tensor([0.6, 0.8]))
    assert params[2].grad == 0.5


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_groups_with_an_optimizer_each(fused: bool) -> None:
    """Of which one is raised while the other is scaled down."""
    params = parameters([0.3, 0.4], [30.0, 40.0])
    groups = [
        {"name": name, "params": [param], "policy": Normalize(5.0)}
        for name, param in zip("ab", params, strict=True)
    ]
    optimizers = [torch.optim.SGD([param], lr=1.0, fused=fused) for param in params]
    report = Clipper(groups).step(optimizers)
    assert report.coefficients["a"] == pytest.approx(10.0)
    assert report.coefficients["b"] == pytest.approx(0.1)
    for param in params:
        torch.testing.assert_close(param.detach(), torch.tensor([-3.0, -4.0]))


def test_in_backward_what_raises_the_whole_model_is_refused() -> None:
    trained = model()
    optimizers = [torch.optim.SGD([param], lr=0.1) for param in trained.parameters()]
    for policy in (AGGC(), Normalize()):
        with pytest.raises(ValueError, match=r"in hooks of backward.*one step late.*AdaGN"):
            Clipper(trained, policy).attach_in_backward(optimizers)
