"""SkipSpike: which steps it accepts, what its window takes, and who may veto at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from distclip import (
    AGC,
    ClipNorm,
    Clipper,
    ClipTensorNorm,
    ClipValue,
    NonFiniteGradientError,
    PolicyBase,
    Scope,
    SkippedStepsError,
    SkipSpike,
    StatelessPolicy,
    ZClip,
)
from distclip.policies import accept, vetoes
from tests.policies.steps import F64, context, spiky_norms
from tests.support import reference


def accepted(policy: Any, norms: Sequence[float]) -> list[bool]:
    """As `Clipper` asks: the state of a step that is left out is forgotten."""
    state, found = policy.init(1, torch.device("cpu")), []
    for norm in torch.tensor(norms, dtype=F64).unbind():
        limit, after = policy.limit(norm, state, context(norm))
        accepts = accept(policy, norm, state, context(norm))
        assert limit is None
        assert accepts is not None
        found.append(bool(accepts))
        state = after if found[-1] else state
    return found


SETTINGS = [(6.0, 128, math.inf), (2.0, 8, math.inf), (1.0, 2, 30.0), (0.5, 7, 2.0)]


@pytest.mark.parametrize(("z_thresh", "window", "max_norm"), [*SETTINGS, (math.inf, 5, 3.0)])
def test_it_accepts_what_the_reference_accepts(
    z_thresh: float, window: int, max_norm: float
) -> None:
    for seed in range(4):
        norms = spiky_norms(400, seed)
        found = accepted(SkipSpike(z_thresh, window, max_norm), norms)
        assert {*found} == {True, False}
        assert found == reference.accepts(norms, z_thresh, window, max_norm)


# Recorded from OLMo-core's optimizer at fa6c501: the highest norm accepted after `num` norms of
# 1 + sin(i²) / 10, with its window and its number of deviations, in float64.
OLMO = {
    (128, 6, 64): 1.4187169406372022,
    (128, 6, 100): 1.4249211656144973,
    (128, 6, 300): 1.422958576438941,
    (16, 4, 15): 1.2810744431729644,
    (16, 4, 40): 1.2610146057112501,
    (8, 2, 9): 1.1426549374970167,
}


@pytest.mark.parametrize(("window", "z_thresh", "num"), OLMO)
def test_the_threshold_is_that_of_olmo_core(window: int, z_thresh: int, num: int) -> None:
    past = [1 + math.sin(i * i) / 10 for i in range(num)]
    policy, highest = SkipSpike(z_thresh, window), OLMO[window, z_thresh, num]
    # It keeps what it skips: the series has nothing that either would skip.
    assert all(accepted(policy, past))
    assert accepted(policy, [*past, highest * (1 - 1e-12)])[-1]
    assert not accepted(policy, [*past, highest * (1 + 1e-12)])[-1]


def test_the_defaults_are_those_of_olmo_core() -> None:
    assert SkipSpike() == SkipSpike(z_thresh=6.0, window=128, max_norm=math.inf)


@pytest.mark.parametrize(("window", "needed"), [(128, 64), (9, 4), (4, 2), (3, 2), (2, 2)])
def test_before_half_of_the_window_only_the_constant_vetoes(window: int, needed: int) -> None:
    past = [1 + i % 2 / 10 for i in range(needed)]
    assert accepted(SkipSpike(window=window), [*past[:-1], 1e9])[-1]
    assert not accepted(SkipSpike(window=window), [*past, 1e9])[-1]
    assert accepted(SkipSpike(window=window, max_norm=5.0), [5.0, 5.1]) == [True, False]


def test_norms_that_are_all_the_same_differ_by_their_rounding() -> None:
    for norm in (0.1, 3e-20, 7e19):
        rounded = [norm, norm * (1 + 2.0**-23), norm * (1 - 2.0**-24)]
        assert all(accepted(SkipSpike(window=4), [norm] * 50))
        assert all(accepted(SkipSpike(window=4), [norm] * 20 + rounded))
        assert not accepted(SkipSpike(window=4), [*[norm] * 20, norm * 1.001])[-1]


def test_the_decision_does_not_depend_on_the_scale_of_the_loss() -> None:
    norms = spiky_norms(200, 3)
    found = accepted(SkipSpike(2.0, 8), norms)
    assert not all(found)
    for power in (-60, 60):
        assert accepted(SkipSpike(2.0, 8), [norm * 2.0**power for norm in norms]) == found


def test_a_norm_of_zero_is_accepted_and_no_statistic() -> None:
    calm = [1.0, 1.1, 0.9, 1.0]
    with_zeros = [1.0, 0.0, 1.1, 0.0, 0.9, 0.0, 1.0]
    for spike in (1.4, 1.6):
        expected = accepted(SkipSpike(window=4), [*calm, spike])[-1]
        assert accepted(SkipSpike(window=4), [*with_zeros, spike])[-1] == expected
    assert accepted(SkipSpike(window=4), [0.0] * 50 + [1.0])[-1]


def test_it_never_waits_for_the_device() -> None:
    policy = SkipSpike(window=4) & ZClip()
    with FakeTensorMode():
        state = policy.init(1, torch.device("cuda"))
        norm = torch.ones((), dtype=F64, device="cuda")
        accepts = accept(policy, norm, state, context(norm))
        assert accepts is not None
        assert accepts.is_cuda


def test_which_policies_veto() -> None:
    assert vetoes(SkipSpike())
    assert vetoes(ClipNorm(1.0) & SkipSpike())
    assert vetoes(SkipSpike() & ZClip() & ClipNorm(1.0))
    for policy in (ClipNorm(1.0), ZClip(), ClipNorm(1.0) & ZClip(), AGC()):
        assert not vetoes(policy)
    norm, both = torch.tensor(3.0, dtype=F64), SkipSpike(max_norm=4.0) & SkipSpike(max_norm=2.0)
    state = both.init(1, torch.device("cpu"))
    assert not accept(both, norm, state, context(norm))
    assert accept(both, norm / 2, state, context(norm))
    assert accept(ClipNorm(1.0), norm, (), context(norm)) is None


def test_other_norms_cannot_be_combined() -> None:
    for other in (ClipTensorNorm(1.0), ClipNorm(1.0, math.inf), ClipValue(1.0)):
        with pytest.raises(ValueError, match="cannot take the smaller limit"):
            SkipSpike() & other


@dataclass(frozen=True)
class Vetoing(StatelessPolicy):
    """A policy of a user's own, without a state."""

    returns: Any
    scope: Any = Scope.MODEL
    norm_type: float = 2.0

    def limit(self, norms: Tensor, state: Any, context: Any) -> Any:
        return None, state

    def accept(self, norms: Tensor, state: Any, context: Any) -> Any:
        return self.returns


def with_gradient(*numbers: float) -> nn.Parameter:
    param = nn.Parameter(torch.zeros(len(numbers)))
    param.grad = torch.tensor(numbers)
    return param


@pytest.mark.parametrize("returns", [True, None, torch.tensor(1.0), torch.tensor([True])], ids=repr)
def test_accept_must_return_a_bool_scalar(returns: Any) -> None:
    param = with_gradient(3.0, 4.0)
    with pytest.raises(TypeError, match=r"its `accept` returned .*Return a bool tensor"):
        Clipper([param], Vetoing(returns)).clip_()
    assert param.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("scope", [Scope.TENSOR, Scope.UNIT, Scope.ELEMENT])
def test_only_a_norm_that_all_ranks_share_may_veto(scope: Scope) -> None:
    with pytest.raises(TypeError, match=r"it has `accept` and Scope\..*on all ranks or on none"):
        Clipper([with_gradient(1.0)], Vetoing(torch.tensor(True), scope))


def test_a_policy_of_ones_own_may_veto() -> None:
    for returns in (True, False):
        param = with_gradient(3.0, 4.0)
        clipper = Clipper([param], Vetoing(torch.tensor(returns)) & ClipNorm(1.0))
        report = clipper.clip_()
        assert bool(report.skipped) is not returns
        assert bool(report.clipped) is returns
        assert (param.grad.tolist() == [3.0, 4.0]) is not returns
    assert not hasattr(PolicyBase, "accept")  # what vetoes has the method


MODES = ["propagate", "raise", "skip", "zero"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_no_spike(value: float, mode: str) -> None:
    param = with_gradient(3.0, value)
    policy = SkipSpike(max_norm=10.0) & ClipNorm(1.0)
    clipper = Clipper([param], policy, on_nonfinite=mode)
    if mode == "raise":
        with pytest.raises(NonFiniteGradientError):
            clipper.clip_()
        return
    control = with_gradient(3.0, value)
    expected = Clipper([control], ClipNorm(1.0), on_nonfinite=mode).clip_()
    report = clipper.clip_()
    torch.testing.assert_close(param.grad, control.grad, rtol=0, atol=0, equal_nan=True)
    assert bool(report.skipped) == bool(expected.skipped) == (mode == "skip")
    assert clipper.state_dict()["groups"]["all"]["Minimum"]["first"]["counts"].tolist() == [0, 0]


@pytest.mark.parametrize("mode", MODES)
def test_a_vetoed_step_leaves_gradients_as_they_are_in_each_mode(mode: str) -> None:
    """In all groups, whatever their policies do, and with a scale."""
    params = [with_gradient(*numbers) for numbers in ([3.0, 4.0], [5.0], [6.0, 7.0], [8.0])]
    policies = [SkipSpike(max_norm=4.0) & ClipNorm(1.0), ClipValue(1.0), AGC(), ZClip()]
    groups = [
        {"name": type(policy).__name__, "params": [(f"w{i}", param)], "policy": policy}
        for i, (param, policy) in enumerate(zip(params, policies, strict=True))
    ]
    for scale in (None, 1.0, 0.9):
        before = [param.grad.clone() for param in params]
        clipper = Clipper(groups, on_nonfinite=mode)
        state = str(clipper.state_dict())
        report = clipper.clip_(scale=scale)
        assert report.skipped
        assert report.finite
        assert not report.clipped
        assert {*map(float, report.coefficients.values())} == {1.0}
        assert report.to_dict()["skipped"] is True
        assert all(torch.equal(p.grad, was) for p, was in zip(params, before, strict=True))
        assert str(clipper.state_dict()) == state
        assert clipper.skipped == 1
    report = clipper.clip_(scale=0.5)  # a norm of 2.5 is accepted
    assert report.clipped
    assert not report.skipped
    assert not report.to_dict()["skipped"]
    assert str(clipper.state_dict()) != state


@pytest.mark.parametrize("vetoing", [(), (0,), (1,), (0, 1)])
def test_one_group_is_enough(vetoing: tuple[int, ...]) -> None:
    params = [with_gradient(3.0, 4.0), with_gradient(3.0, 4.0)]
    limits = [1.0 if i in vetoing else 10.0 for i in range(2)]
    groups = [
        {"params": [(f"w{i}", param)], "policy": SkipSpike(max_norm=limit), "name": f"g{i}"}
        for i, (param, limit) in enumerate(zip(params, limits, strict=True))
    ]
    clipper = Clipper(groups)
    assert bool(clipper.clip_().skipped) is bool(vetoing)
    found = clipper.state_dict()["groups"].values()
    counts = [group["SkipSpike"]["counts"].tolist() for group in found]
    assert counts == [[int(not vetoing), 0]] * 2


def test_a_report_without_a_veto() -> None:
    param = with_gradient(3.0, math.nan)
    for mode, skipped in (("propagate", False), ("skip", True), ("zero", False)):
        report = Clipper([param], on_nonfinite=mode).clip_()
        assert report.skipped.dtype is torch.bool
        assert bool(report.skipped) is skipped
        param.grad[0] = 3.0


@pytest.mark.parametrize("mode", MODES)
def test_another_level_of_norms_ends_in_an_error(mode: str) -> None:
    param = with_gradient(1.0)
    clipper = Clipper([param], SkipSpike(window=4), on_nonfinite=mode, max_consecutive_skips=3)
    for _ in range(3):  # those that are accepted between begin a new count
        for number in (1.0, 1.1, 0.9, 1.0, 50.0, 50.0, 50.0):
            param.grad = torch.tensor([number])
            assert bool(clipper.clip_().skipped) is (number == 50.0)
    state = str(clipper.state_dict())
    with pytest.raises(SkippedStepsError, match=r"4 steps in a row.*norm is 50\.0.*new Clipper"):
        clipper.clip_()
    assert str(clipper.state_dict()) == state


def test_vetoes_and_norms_that_are_not_finite_count_together() -> None:
    param = with_gradient(1.0)
    policy = SkipSpike(max_norm=5.0)
    clipper = Clipper([param], policy, on_nonfinite="skip", max_consecutive_skips=2)
    for number in (50.0, math.nan):
        param.grad = torch.tensor([number])
        assert clipper.clip_().skipped
    with pytest.raises(NonFiniteGradientError, match=r"after 2 steps.*or vetoed by a policy"):
        clipper.clip_()
    param.grad = torch.tensor([50.0])
    with pytest.raises(SkippedStepsError):
        clipper.clip_()


def test_the_state_goes_on_in_another_clipper_and_is_checked() -> None:
    def make() -> tuple[nn.Parameter, Clipper]:
        param = with_gradient(1.0)
        return param, Clipper([param], SkipSpike(window=4))

    (param, first), (other, second) = make(), make()
    for number in (1.0, 1.1, 0.9, 1.0, 1.05):
        param.grad = torch.tensor([number])
        first.clip_()
    second.load_state_dict(first.state_dict())
    other.grad = torch.tensor([9.0])
    assert second.clip_().skipped
    used = torch.tensor([1.0, math.inf, 1.0, 1.0])
    for field, wrong in (
        ("counts", torch.tensor([-1, 0])),
        ("values", torch.stack([used, torch.full_like(used, math.inf)])),
        ("values", torch.stack([torch.full_like(used, -1.0), torch.full_like(used, math.inf)])),
        ("values", torch.stack([torch.ones(4), used])),
    ):
        saved = first.state_dict()
        saved["groups"]["all"]["SkipSpike"][field] = wrong
        with pytest.raises(ValueError, match=r"all\.SkipSpike\.(values|counts)\[.*\] is "):
            second.load_state_dict(saved)
