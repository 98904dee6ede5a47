"""A replayed policy says what it said while the run trained; thresholds clip what they say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import distclip
from distclip.monitoring.records import Run, read_run
from distclip.monitoring.replay import code_of, replay, round_up, series_of, threshold
from distclip.policies import AdaGC, AutoClip, ClipNorm, ClipTensorNorm, Policy, ZClip
from tests.monitoring.made_runs import DRAWN, noise, series, with_spikes, write_history

POLICIES: dict[str, Policy[Any]] = {
    "ClipNorm": ClipNorm(2.0),
    "only measures": ClipNorm(math.inf),
    "AutoClip": AutoClip(75.0, history=16),
    "ZClip": ZClip(1.5, 0.9, warmup_steps=6, max_norm=4.0),
    "ClipTensorNorm": ClipTensorNorm(1.0),
    "AdaGC": AdaGC(max_norm=3.0, beta=0.8, warmup_steps=5),
    "both": ClipNorm(3.0) & ZClip(2.0, warmup_steps=3, max_norm=None),
}
NAN_STEPS = (3, 17)
SAVED, CRASHED, END = 20, 27, 40


class Training:
    """A small model with spikes and NaN steps, which can be saved."""

    def __init__(self, policy: Policy[Any], dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
        self.clipper = distclip.Clipper(self.model, policy, on_nonfinite="skip", tensor_norms=True)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02)

    def step(self, step: int) -> distclip.Report:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 4, generator=generator).to(self.model[0].weight)
        y = 30.0 if step % 9 == 0 else math.nan if step in NAN_STEPS else 1.0
        self.optimizer.zero_grad()
        (self.model(x) - y * x[:, :2]).square().mean().backward()
        return self.clipper.step(self.optimizer)

    def load(self, other: dict[str, Any]) -> None:
        self.model.load_state_dict(other["model"])
        self.clipper.load_state_dict(other["clipper"])


def trained(policy: Policy[Any], dtype: torch.dtype, folder: Path) -> Run:
    """Crashes a few steps after a checkpoint, and goes on from it."""
    training = Training(policy, dtype)
    saved: dict[str, Any] = {}
    with distclip.History(folder) as history:
        for step in range(1, CRASHED + 1):
            history.append(training.step(step), step=step)
            if step == SAVED:
                model = {name: each.clone() for name, each in training.model.state_dict().items()}
                saved = {"model": model, "clipper": training.clipper.state_dict()}
    resumed = Training(policy, dtype)
    resumed.load(saved)
    with distclip.History(folder, after=SAVED) as history:
        for step in range(SAVED + 1, END + 1):
            history.append(resumed.step(step), step=step)
    return read_run(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_a_replay_is_what_the_policy_did(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    policy = POLICIES[name]
    run = trained(policy, dtype, tmp_path)
    assert run.steps.tolist() == [*range(1, END + 1)]
    assert run.num_replaced == CRASHED - SAVED
    assert run.steps[~run.finite].tolist() == [*NAN_STEPS]
    assert run.clipped[run.finite].any() == (name != "only measures")
    replayed = replay(policy, series_of(run)[0])
    # The file of a float32 model has norms and limits that are rounded to float32.
    digits = {"rtol": 0.0 if dtype is torch.float64 else 5e-7, "atol": 0.0}
    finite = run.finite
    np.testing.assert_allclose(replayed.limits, run.columns["limit"], **digits)
    recorded = run.columns["coefficient"][finite]
    np.testing.assert_allclose(replayed.coefficients[finite], recorded, **digits)
    assert np.isnan(replayed.coefficients[~finite]).all()


def test_the_norm_afterwards_is_that_of_the_clipped_gradients(tmp_path: Path) -> None:
    policy = POLICIES["AdaGC"]
    training = Training(policy, torch.float64)
    after: list[float] = []
    with distclip.History(tmp_path) as history:
        for step in range(4, 16):
            history.append(training.step(step), step=step)
            after.append(distclip.get_total_norm([p.grad for p in training.model.parameters()]))
    run = read_run(tmp_path)
    assert run.clipped.any()
    replayed = replay(policy, series_of(run)[0])
    np.testing.assert_allclose(replayed.after, after, rtol=1e-12)


def test_each_group_is_replayed_by_itself(tmp_path: Path) -> None:
    weights = [torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    policies = {"body": ZClip(warmup_steps=3, max_norm=None), "head": AutoClip(50.0)}
    groups = [
        {"name": name, "params": [weight], "policy": policies[name]}
        for name, weight in zip(policies, weights, strict=True)
    ]
    clipper = distclip.Clipper(groups)
    norms = noise(40, deviation=1.0).reshape(20, 2)
    norms[7, 0] = math.nan  # the other group forgets the step too
    with distclip.History(tmp_path) as history:
        for row in norms:
            for weight, norm in zip(weights, row, strict=True):
                weight.grad = torch.tensor([0.0, norm], dtype=torch.float64)
            history.append(clipper.clip_())
    run = read_run(tmp_path)
    found = series_of(run)
    assert [each.name for each in found] == [*policies]
    for each in found:
        replayed = replay(policies[each.name], each)
        recorded = run.groups[each.name]
        np.testing.assert_array_equal(replayed.limits, recorded["limit"])
        finite = each.finite
        assert (recorded["coefficient"][finite] < 1).any()
        np.testing.assert_array_equal(
            replayed.coefficients[finite], recorded["coefficient"][finite]
        )


def test_a_group_of_a_later_start_only_has_rows_there(tmp_path: Path) -> None:
    run = write_history(tmp_path, [1.0, 2.0, math.nan], groups={"a": [1, math.nan, math.nan]})
    (only,) = series_of(run)
    assert only.steps.tolist() == [1, 3]


@pytest.mark.parametrize("rows", [{}, {0: {"a": 1.0}}, {0: {"a": 1.0}, 1: {"b": 1.0}}])
def test_tensors_are_replayed_only_where_each_row_has_all(
    rows: dict[int, dict[str, float]], tmp_path: Path
) -> None:
    assert series_of(write_history(tmp_path, [1.0, 1.0], tensors=rows))[0].tensors is None
    all_rows = {0: {"a": 1.0}, 1: {"a": 2.0}}
    (found,) = series_of(write_history(tmp_path, [1.0, 2.0], tensors=all_rows))
    assert found.tensors is not None
    assert found.tensors.tolist() == [[1.0], [2.0]]


NORMS = st.lists(st.floats(1e-3, 1e3) | st.integers(1, 4).map(float), min_size=1, max_size=300)
STATEFUL = [AutoClip(60.0, history=7), ZClip(warmup_steps=4, max_norm=None)]


@DRAWN
@given(NORMS, st.sampled_from([1, 5, 10, 50]))
def test_a_threshold_clips_that_share(norms: list[float], percent: int) -> None:
    num = len(norms) * percent // 100
    limit = threshold(np.array(norms), percent)
    if num == 0:
        assert limit is None
        return
    assert limit is not None
    exceeding = sum(norm > limit for norm in norms)
    lowest = sorted(norms, reverse=True)[num]
    assert exceeding == sum(norm > lowest for norm in norms) <= num
    if len({*norms}) == len(norms):
        assert exceeding == num
    coefficients = replay(ClipNorm(limit), series(norms)).coefficients
    assert (coefficients < 1).sum() == exceeding
    assert eval(code_of(ClipNorm(limit)), {"distclip": distclip}) == ClipNorm(limit)


def test_a_threshold_has_as_few_digits_as_tell_the_norms_apart() -> None:
    norms = np.array([0.1] * 8 + [1.23456, 9.0])
    assert threshold(norms, 10) == 1.3
    norms[-1] = 1.2350
    assert threshold(norms, 10) == 1.2346
    assert threshold(np.ones(10), 10) == 1.0  # all are equal: none is above


@DRAWN
@given(NORMS, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_a_lower_limit_clips_more(norms: list[float], a: float, b: float) -> None:
    lower, higher = (replay(ClipNorm(each), series(norms)) for each in sorted([a, b]))
    assert (lower.coefficients <= higher.coefficients).all()
    assert (lower.after <= higher.after).all()


@DRAWN
@given(NORMS, st.integers(-60, 60), st.sampled_from(STATEFUL))
def test_limits_scale_with_the_norms(norms: list[float], k: int, policy: Policy[Any]) -> None:
    here = replay(policy, series(norms))
    scaled = replay(policy, series(np.array(norms) * 2.0**k))
    np.testing.assert_array_equal(scaled.limits, here.limits * 2.0**k)
    np.testing.assert_array_equal(scaled.coefficients, here.coefficients)


@DRAWN
@given(st.integers(-60, 60))
def test_limits_per_tensor_scale_with_the_norms(k: int) -> None:
    tensors = with_spikes(noise(60).reshape(20, 3), [9])
    policy = AdaGC(max_norm=math.inf, warmup_steps=4)
    here = replay(policy, series(np.linalg.norm(tensors, axis=1), tensors))
    larger = tensors * 2.0**k
    scaled = replay(policy, series(np.linalg.norm(larger, axis=1), larger))
    np.testing.assert_array_equal(scaled.limits, here.limits * 2.0**k)


@DRAWN
@given(NORMS, st.sampled_from(STATEFUL), st.data())
def test_a_step_that_is_not_finite_is_forgotten(
    norms: list[float], policy: Policy[Any], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(norms)))
    with_nan = replay(policy, series([*norms[:at], math.nan, *norms[at:]]))
    without = replay(policy, series(norms))
    np.testing.assert_array_equal(np.delete(with_nan.limits, at), without.limits)


@DRAWN
@given(st.floats(1e-30, 1e30), st.integers(1, 17))
def test_round_up(number: float, digits: int) -> None:
    rounded = round_up(number, digits)
    assert number <= rounded <= number * (1 + 10.0 ** (1 - digits)) * (1 + 1e-15)
    assert float(f"{rounded:.{digits - 1}e}") == rounded or rounded == number


WITH_CODE = [each for name, each in POLICIES.items() if name != "both"]


@pytest.mark.parametrize("policy", [*WITH_CODE, ZClip(), AdaGC(), AutoClip(90.0)])
def test_the_code_of_a_policy_makes_it(policy: Policy[Any]) -> None:
    assert eval(code_of(policy), {"distclip": distclip}) == policy
