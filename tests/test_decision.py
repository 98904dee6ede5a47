"""`decide` measures and writes nothing, `apply_` writes once; `scale=` and `gradient=` cost no
pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

import distclip
from distclip import (
    AGC,
    AutoClip,
    ClipNorm,
    Clipper,
    ClipTensorNorm,
    ClipValue,
    Decision,
    Policy,
    step,
)
from tests.support import reference
from tests.support.ranks import Ranks, mesh

POLICIES = {
    "norm": ClipNorm(1.0),
    "tensor": ClipTensorNorm(0.5),
    "units": AGC(0.1),
    "value": ClipValue(0.3),
    "adaptive": AutoClip() & ClipNorm(1.0),
}
SCALES: dict[str, Callable[[], float | Tensor]] = {
    "number": lambda: 0.25,
    "whole number": lambda: 3,
    "numpy": lambda: np.float32(0.25),
    "tensor": lambda: torch.tensor(0.25),
    "one element": lambda: torch.tensor([0.25], dtype=torch.bfloat16),
    "count": lambda: torch.tensor(2),
    "negative": lambda: -0.5,
}


class HalvingState(NamedTuple):
    limit: Tensor


@dataclass(frozen=True)
class Halving(distclip.PolicyBase):
    """Writes the next limit to the tensor that it has returned."""

    max_norm: float
    scope = distclip.Scope.MODEL
    norm_type = 2.0

    def init(self, num_groups: int, device: torch.device) -> HalvingState:
        return HalvingState(torch.tensor(2 * self.max_norm, dtype=torch.float64, device=device))

    def limit(
        self, norms: Tensor, state: HalvingState, context: distclip.NormContext
    ) -> tuple[Tensor, HalvingState]:
        state.limit.mul_(0.5)
        return state.limit, state


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    fill(model, seed)
    return model


def fill(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator) * 4


def grads_of(model: nn.Module) -> list[Tensor]:
    return [param.grad.clone() for param in model.parameters()]


def assert_same_grads(model: nn.Module, expected: list[Tensor], **tolerances: float) -> None:
    for param, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.grad, grad, **tolerances)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_decide_writes_nothing_and_apply_does_what_clip_does(policy: Policy) -> None:
    model, clipped = make_model(), make_model()
    before = grads_of(model)
    decision = Clipper(model, policy).decide()
    assert isinstance(decision, Decision)
    assert_same_grads(model, before, rtol=0, atol=0)
    report = Clipper(clipped, policy).clip_()
    decision.apply_()
    assert decision.report.to_dict() == report.to_dict()
    assert_same_grads(model, grads_of(clipped), rtol=0, atol=0)
    if "AutoClip" not in str(policy):  # its first step clips to max_norm alone
        assert report.clipped


def test_a_decision_applies_once() -> None:
    model = make_model()
    decision = Clipper(model).decide()
    decision.apply_()
    once = grads_of(model)
    with pytest.raises(RuntimeError, match="cannot apply this decision twice"):
        decision.apply_()
    assert_same_grads(model, once, rtol=0, atol=0)


def test_a_folded_decision_cannot_be_applied_as_well() -> None:
    model = make_model()
    clipper = Clipper(model)
    decision = clipper.decide()
    decision.take_effect()  # what `step` calls where the optimizer multiplies
    with pytest.raises(RuntimeError, match="twice"):
        decision.apply_()


def test_each_decision_is_one_step_of_the_policy() -> None:
    model = make_model()
    clipper = Clipper(model, AutoClip())
    for _ in range(3):
        clipper.decide()
    (state,) = clipper.state_dict()["groups"]["all"].values()
    assert int(state["num_steps"]) == 3


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("name", SCALES)
def test_scale_is_a_factor_of_the_gradients(policy: Policy, name: str) -> None:
    scale = SCALES[name]()
    model, by_hand = make_model(), make_model()
    for param in by_hand.parameters():
        param.grad.mul_(float(scale))
    report = Clipper(model, policy).clip_(scale=scale)
    expected = Clipper(by_hand, policy).clip_()
    want = reference.total_norm([p.grad for p in make_model().parameters()]) * abs(float(scale))
    if policy.norm_type == 2:
        torch.testing.assert_close(report.total_norm.double(), want, rtol=1e-6, atol=0)
    for figure in ("total_norm", "limit", "coefficient"):
        torch.testing.assert_close(getattr(report, figure), getattr(expected, figure))
    assert_same_grads(model, grads_of(by_hand), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("loss_scale", [None, 1024.0])
def test_scale_goes_into_the_step(fused: bool, loss_scale: float | None) -> None:
    """With the loss scale and the coefficient: as a step on gradients that were scaled before."""
    model, by_hand = make_model(), make_model()
    for param in by_hand.parameters():
        param.grad.mul_(1 / 7)
    scaler = None
    if loss_scale is not None:
        scaler = GradScaler("cpu", init_scale=loss_scale)
        scaler.scale(torch.zeros(()))
        for param in model.parameters():
            param.grad.mul_(loss_scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    report = Clipper(model, ClipNorm(0.5)).step(optimizer, scaler, scale=1 / 7)
    Clipper(by_hand, ClipNorm(0.5)).step(torch.optim.SGD(by_hand.parameters(), lr=0.1, fused=fused))
    assert report.clipped
    for param, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(param, expected)


def test_scale_goes_into_each_evaluation_of_a_closure() -> None:
    model, by_hand = make_model(), make_model()

    def closure_of(each: nn.Module, factor: float) -> Callable[[], float]:
        def closure() -> float:
            fill(each, seed=1)
            for param in each.parameters():
                param.grad.mul_(factor)
            return 1.0

        return closure

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = Clipper(model, ClipNorm(0.5)).step(
        optimizer, scale=0.125, closure=closure_of(model, 8.0)
    )
    expected = Clipper(by_hand, ClipNorm(0.5)).step(
        torch.optim.SGD(by_hand.parameters(), lr=0.1), closure=closure_of(by_hand, 1.0)
    )
    torch.testing.assert_close(report.total_norm, expected.total_norm)
    for param, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(param, other)


@pytest.mark.parametrize(
    ("scale", "error", "match"),
    [
        ("0.5", TypeError, "cannot scale by '0.5'"),
        ([0.5], TypeError, "cannot scale by"),
        (True, TypeError, "cannot scale by True"),
        (math.nan, ValueError, "no gradient would be finite"),
        (math.inf, ValueError, "no gradient would be finite"),
        (torch.ones(2), ValueError, r"a tensor of shape \[2\]"),
        (torch.tensor(True), ValueError, "one number"),
        (torch.tensor(1j), ValueError, "one number"),
    ],
)
def test_what_is_no_scale(scale: object, error: type[Exception], match: str) -> None:
    model = make_model()
    before = grads_of(model)
    for call in ("clip_", "decide"):
        with pytest.raises(error, match=match):
            getattr(Clipper(model), call)(scale=scale)
    assert_same_grads(model, before, rtol=0, atol=0)


def test_optimizers_of_other_parameters_are_refused_with_a_scale() -> None:
    """Their gradients would be left without the factor."""
    model, other = make_model(), make_model(1)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="4 parameters of the optimizer are not the Clipper's"):
        Clipper(model).step(optimizer, scale=0.5)


def test_a_nan_scale_on_the_device_is_a_norm_that_is_not_finite() -> None:
    model = make_model()
    before = grads_of(model)
    clipper = Clipper(model, on_nonfinite="skip")
    report = clipper.clip_(scale=torch.tensor(math.nan))
    assert not report.finite
    assert_same_grads(model, before, rtol=0, atol=0)


def with_main_grads(model: nn.Module) -> dict[int, Tensor]:
    """Gradients beside the parameters, as Megatron keeps them, and others in `.grad` that do not
    count.
    """
    main = {id(p): p.grad.double() for p in model.parameters()}
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e6)
    return main


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_gradients_that_lie_elsewhere(policy: Policy) -> None:
    model, plain = make_model(), make_model()
    main = with_main_grads(model)

    def gradient(param: Tensor) -> Tensor | None:
        return main[id(param)]

    report = Clipper(model, policy, gradient=gradient).clip_()
    expected = Clipper(plain, policy).clip_()
    torch.testing.assert_close(report.total_norm, expected.total_norm)
    for param, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(main[id(param)].float(), other.grad)
        assert bool((param.grad == 1e6).all())


def test_an_optimizer_does_not_multiply_gradients_that_lie_elsewhere() -> None:
    """It would multiply `.grad`, which is another tensor."""
    model, plain = make_model(), make_model()
    main = with_main_grads(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    Clipper(model, ClipNorm(0.5), gradient=lambda p: main[id(p)]).step(optimizer)
    Clipper(plain, ClipNorm(0.5)).clip_()
    for param, start, other in zip(
        model.parameters(), make_model().parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(main[id(param)].float(), other.grad)
        torch.testing.assert_close(param, start - 0.1 * 1e6)


def test_some_gradients_may_be_missing_elsewhere() -> None:
    model = make_model()
    first = next(model.parameters())
    grad = first.grad.clone()
    report = Clipper(model, gradient=lambda p: p.grad if p is first else None).clip_()
    torch.testing.assert_close(report.total_norm, grad.norm())


def test_what_is_no_gradient_function() -> None:
    model = make_model()
    with pytest.raises(TypeError, match=r"cannot clip '0.weight': `gradient=` returned a float"):
        Clipper(model, gradient=lambda _: 1.0).clip_()
    with pytest.raises(ValueError, match="cannot measure gradients during backward with gradient="):
        Clipper(model, gradient=lambda p: p.grad, overlap=True)
    sparse = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,), check_invariants=False)
    with pytest.raises(distclip.LayoutError, match="uncoalesced"):
        Clipper([torch.zeros(3)], gradient=lambda _: sparse).clip_()


def test_a_decision_applies_to_gradients_that_moved() -> None:
    """Measured in one place, scaled in another: optimizers that copy gradients to their own."""
    model, plain = make_model(), make_model()
    decision = Clipper(model, ClipNorm(0.5)).decide(scale=0.5)
    moved = {id(p): p.grad.double() * 4 for p in model.parameters()}
    params = list(model.parameters())
    for some in (params[:1], params[1:]):  # one after the other
        ids = {id(p) for p in some}
        decision.apply_(
            gradient=lambda p, ids=ids: moved[id(p)] if id(p) in ids else None, scale=0.125
        )
    report = Clipper(plain, ClipNorm(0.5)).clip_(scale=0.5)
    assert report.clipped
    for param, other in zip(params, plain.parameters(), strict=True):
        torch.testing.assert_close(moved[id(param)].float(), other.grad)
    with pytest.raises(ValueError, match="cannot apply a decision with scale= alone"):
        decision.apply_(scale=0.5)


def test_a_scaler_learns_of_it_when_the_decision_is_applied() -> None:
    """Before, its gradients are still scaled."""
    model = make_model()
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decision = Clipper(model).decide(optimizer, scaler)
    stage = scaler._per_optimizer_states[id(optimizer)]
    assert stage["stage"] is OptState.READY
    decision.apply_()
    assert stage["stage"] is OptState.UNSCALED
    scaler.step(optimizer)
    scaler.update()


def test_nothing_is_written_before_a_complex_gradient_is_refused() -> None:
    first, second = torch.zeros(2), torch.zeros(2, dtype=torch.complex64)
    first.grad, second.grad = torch.ones(2), torch.ones(2, dtype=torch.complex64)
    groups = [{"params": [first], "policy": ClipNorm(0.1)}, {"params": [second]}]
    with pytest.raises(ValueError, match="cannot clamp a complex gradient"):
        Clipper(groups, ClipValue(0.5)).clip_(scale=0.5)
    assert first.grad.tolist() == [1.0, 1.0]
    assert second.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_figures_in_a_graph_stay_the_same_tensors(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each replay writes the tensors that were there when the graph was captured."""
    monkeypatch.setattr(step, "is_capturing", lambda device: True)
    param = nn.Parameter(torch.ones(3, 2))
    param.grad = torch.full_like(param, 3.0)
    clipper = Clipper([param], policy)
    decision = clipper.decide()
    report = decision.report
    for name in ("total_norm", "limit", "coefficient"):
        assert getattr(report, name) is getattr(report, name)
        assert getattr(report, name).dtype is torch.float32
    assert decision.finite is decision.finite


def test_figures_of_a_step_outlive_the_next() -> None:
    """Figures are converted when they are read, perhaps after other steps."""
    param = nn.Parameter(torch.zeros(2))
    clipper = Clipper([param], Halving(8.0))
    reports = []
    for norm in (5.0, 10.0, 20.0):
        param.grad = torch.tensor([norm * 0.6, norm * 0.8])
        reports.append(clipper.clip_())
    assert [round(r.total_norm.item(), 5) for r in reports] == [5.0, 10.0, 20.0]
    assert [r.limit.item() for r in reports] == [8.0, 4.0, 2.0]
    assert [round(r.coefficient.item(), 5) for r in reports] == [1.0, 0.4, 0.1]


def sharded_decisions() -> None:
    on = mesh((4,), ("dp",))
    whole = torch.arange(1.0, 17.0).reshape(8, 2)
    param = nn.Parameter(distribute_tensor(torch.zeros(8, 2), on, [Shard(0)], src_data_rank=None))
    elsewhere = distribute_tensor(whole.clone(), on, [Shard(0)], src_data_rank=None)
    clipper = Clipper([param], ClipNorm(1.0), gradient=lambda _: elsewhere)
    decision = clipper.decide(scale=1 / 16)
    torch.testing.assert_close(elsewhere.full_tensor(), whole)
    torch.testing.assert_close(decision.report.total_norm, whole.norm() / 16)
    decision.apply_()
    torch.testing.assert_close(elsewhere.full_tensor(), whole / whole.norm())
    count = DTensor.from_local(torch.tensor(4.0), on, [Partial()])  # tokens of each rank, 16 in all
    param.grad = distribute_tensor(whole.clone(), on, [Shard(0)], src_data_rank=None)
    report = Clipper([param], ClipNorm(100.0)).clip_(scale=count)
    torch.testing.assert_close(report.total_norm, whole.norm() * 16)
    partial = DTensor.from_local(torch.ones(8, 2), on, [Partial()])
    with pytest.raises(distclip.LayoutError, match="partial sum"):
        Clipper([param], gradient=lambda _: partial).clip_()


def test_sharded_decisions(four_ranks: Ranks) -> None:
    if four_ranks.device == "cpu":
        four_ranks.run(sharded_decisions)
