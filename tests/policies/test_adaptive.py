"""AutoClip, ZClip, AdaGC, AdaGN, AGGC: their limits are those of reference and formulas."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from distclip import Clipper
from distclip.policies import AGGC, AdaGC, AdaGN, AutoClip, Policy, ZClip, raises
from tests.policies.steps import (
    CLOSE,
    F64,
    assert_clips_to,
    clipped_norms,
    context,
    norms_shape,
    spiky_norms,
)
from tests.support import reference
from tests.support.ranks import Ranks, mesh
from tests.test_api import recorded


@pytest.mark.parametrize("history", [1, 7, 1000])
@pytest.mark.parametrize("percentile", [0.0, 10.0, 50.0, 97.3, 100.0])
def test_autoclip_is_the_percentile_of_the_past(percentile: float, history: int) -> None:
    steps = spiky_norms(60, seed=history)
    expected = reference.autoclip(steps, percentile, history)
    assert (expected != steps) == (history > 1 and percentile < 100)
    clipped = clipped_norms(AutoClip(percentile, history), steps)
    torch.testing.assert_close(clipped, torch.tensor(expected, dtype=F64), **CLOSE)


ZCLIP_SETTINGS = [
    (2.5, 0.97, 25, 1.0),
    (2.5, 0.97, 25, math.inf),
    (1.0, 0.5, 3, 4.0),
    (0.0, 0.9, 2, math.inf),
    (2.0, 1.0, 9, 2.0),
]


@pytest.mark.parametrize(("z_thresh", "alpha", "warmup_steps", "max_norm"), ZCLIP_SETTINGS)
def test_zclip_pulls_spikes_back(
    z_thresh: float, alpha: float, warmup_steps: int, max_norm: float
) -> None:
    for seed in range(4):
        steps = spiky_norms(90, seed)
        policy = ZClip(z_thresh, alpha, warmup_steps, max_norm)
        expected = reference.zclip(steps, z_thresh, alpha, warmup_steps, max_norm)
        assert_clips_to(policy, steps, expected)


ADAGC_SETTINGS = [
    (1.05, 1.0, 0.98, 10),
    (1.05, math.inf, 0.98, 10),
    (2.0, 0.1, 0.5, 1),
    (0.9, 1.0, 0.0, 5),
    (1.0, 1.0, 1.0, 5),
]


@pytest.mark.parametrize(("ratio", "max_norm", "beta", "warmup_steps"), ADAGC_SETTINGS)
def test_adagc_clips_each_tensor_to_its_past(
    ratio: float, max_norm: float, beta: float, warmup_steps: int
) -> None:
    for seed in range(4):
        steps = [
            [norm if (t + i * i) % 5 else 0.0 for i, norm in enumerate(norms)]
            for t, norms in enumerate(spiky_norms(60, seed, (4,)))
        ]
        for t in range(20):
            steps[t][3] = 0.0  # no gradient before the warm-up ends
        expected = reference.adagc(steps, ratio, max_norm, beta, warmup_steps)
        assert_clips_to(AdaGC(ratio, max_norm, beta, warmup_steps), steps, expected)


@pytest.mark.parametrize(
    ("gamma1", "gamma2", "eps"), [(0.7, 0.9, 1e-8), (0.85, 0.99999, 1e-8), (0.5, 0.5, 0.05)]
)
def test_adagn_gives_each_tensor_a_norm_from_its_past(
    gamma1: float, gamma2: float, eps: float
) -> None:
    for seed in range(4):
        steps = [
            [norm if (t + i * i) % 5 else 0.0 for i, norm in enumerate(norms)]
            for t, norms in enumerate(spiky_norms(60, seed, (4,)))
        ]
        expected = reference.adagn(steps, gamma1, gamma2, eps)
        assert (expected > torch.tensor(steps, dtype=F64)).any()
        assert_clips_to(AdaGN(gamma1, gamma2, eps), steps, expected)


AGGC_SETTINGS = [
    AGGC(),
    AGGC(0.9, 1.5, 0.5, 0.0, math.inf),
    AGGC(0.0, 2.0, 0.8, 0.0, 1.0),
    AGGC(0.7, 0.0, 0.8, 0.5, 5.0),
    AGGC(0.95, 0.6, late_low=0.5, late_high=2.0, late_from=20, late_steps=30),
    AGGC(0.5, 2.0, 0.0, 0.2, 3.0, 0.9, 1.1, 0.0, 80.5),
]


@pytest.mark.parametrize("policy", AGGC_SETTINGS, ids=repr)
def test_aggc_keeps_a_norm_near_its_past(policy: AGGC) -> None:
    *settings, late_low, late_high, late_from, late_steps = dataclasses.astuple(policy)
    for seed in range(4):
        steps = [norm if t % 7 else 0.0 for t, norm in enumerate(spiky_norms(90, seed))]
        expected = reference.aggc(steps, *settings, (late_low, late_high, late_from, late_steps))
        differ = torch.tensor(expected, dtype=F64) - torch.tensor(steps, dtype=F64)
        assert (differ > 0).any() == (policy.low > 0)
        assert (differ < 0).any() == (policy.high > 0)
        found = clipped_norms(policy, steps)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), **CLOSE)


# By hand, from the formulas in the docstrings: policy, norms, norms after clipping.
BY_HAND: dict[str, tuple[Policy[Any], list[Any], list[Any]]] = {
    # the medians of [4], [4, 2], [4, 2, 9] and, with the oldest gone, [2, 9, 1]
    "AutoClip": (AutoClip(50.0, history=3), [4.0, 2.0, 9.0, 1.0], [4.0, 2.0, 4.0, 1.0]),
    # Mean 2, deviation 1; 7 lies 5 deviations above: 2 + 2.5**2 / 5 = 3.25. Then the mean is
    # 2.625 and the variance .5 + .5 * .625**2.
    "ZClip": (
        ZClip(2.5, 0.5, 2, math.inf),
        [1.0, 3.0, 7.0, 12.625],
        [1.0, 3.0, 3.25, 2.625 + 2.5**2 * (0.5 + 0.5 * 0.625**2) / 10],
    ),
    # Both scaled by 1/5 to 0.6 and 0.8; then limits of twice that; γ is .5 * .6 + .5 * 1.2 = .9
    # and .5 * .8 + .5 * .2 = .5.
    "AdaGC": (
        AdaGC(2.0, 1.0, 0.5, 1),
        [[3.0, 4.0], [3.0, 0.2], [3.0, 3.0]],
        [[0.6, 0.8], [1.2, 0.2], [1.8, 1.0]],
    ),
    # m is 4 and .5 * 4 + .5 * 8 = 6, corrected 8 / 1 and 6 / .75 = 8; v is 32 and 48, 64 / 1 and
    # 48 / .75 = 64; the last norm begins at once, because the second tensor had none before.
    "AdaGN": (
        AdaGN(0.5, 0.5, 8.0),
        [[8.0, 0.0], [8.0, 0.0], [8.0, 1.0]],
        [[0.5, 0.0], [0.5, 0.0], [0.5, 1 / 9]],
    ),
    # S is 0, 4, .5 * 4 + .5 * 6 = 5 and .5 * 5 + .5 * 3 = 4. Bounds are half of it and 1.5 times.
    # 8 lies above 6; 1 lies below 2.5, but three times 1 is more; .5 lies below 2, up to 3 * .5.
    "AGGC": (AGGC(0.5, 1.5, 0.5, 0.0, 3.0), [8.0, 8.0, 1.0, 0.5], [8.0, 6.0, 2.5, 1.5]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_numbers_by_hand(name: str) -> None:
    policy, steps, expected = BY_HAND[name]
    assert_clips_to(policy, steps, expected)


SCALE_FREE = [
    AutoClip(30.0, 9),
    ZClip(1.0, 0.8, 5, math.inf),
    AdaGC(1.05, math.inf, 0.9, 5),
    AGGC(),
]


@pytest.mark.parametrize("policy", SCALE_FREE, ids=repr)
def test_the_scale_of_the_loss_does_not_matter(policy: Policy[Any]) -> None:
    steps = torch.tensor(spiky_norms(50, seed=2, shape=norms_shape(policy)), dtype=F64)
    clipped = clipped_norms(policy, steps.tolist())
    assert (clipped < steps).any()
    for power in (-90, 60):
        scaled = clipped_norms(policy, (steps * 2.0**power).tolist())
        torch.testing.assert_close(scaled, clipped * 2.0**power, rtol=0, atol=0)


def test_a_tensor_without_a_gradient_for_a_while_still_learns_under_adagc() -> None:
    steps = [[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    assert (clipped_norms(AdaGC(warmup_steps=1), steps)[[1, 2, 4], 1] > 0.5).all()
    assert (clipped_norms(AdaGC(warmup_steps=3), steps)[[1, 2, 4], 1] > 0.5).all()


@pytest.mark.parametrize("policy", [AdaGN(), AGGC(), AGGC(max_up=math.inf)], ids=repr)
def test_a_norm_of_zero_has_a_limit_that_is_a_number(policy: Policy[Any]) -> None:
    """As the report shows it; before the first norm above 0, and after one."""
    state = policy.init(1, torch.device("cpu"))
    for step in (0.0, 2.0, 0.0):
        norm = torch.full(norms_shape(policy, 1), step, dtype=F64)
        limit, state = policy.limit(norm, state, context(norm))
        assert limit is not None
        assert limit >= 0


def test_zclip_pulls_a_higher_spike_back_further() -> None:
    calm = [1.0, 1.1, 0.9, 1.0, 1.1, 0.9]
    policy = ZClip(2.5, 0.9, 6, math.inf)
    low, high = (clipped_norms(policy, [*calm, spike])[-1] for spike in (1e3, 1e6))
    assert 1.0 < high < low < 1.3


# The numbers of the authors' own code, recorded in float64.
PEERS: dict[str, Callable[..., Policy[Any]]] = {
    "zclip": ZClip,
    "autoclip": AutoClip,
    "adagc": AdaGC,
    "adagn": AdaGN,
    "aggc": AGGC,
}


@pytest.mark.parametrize(
    "case", [c for kind in PEERS for c in recorded(kind)], ids=lambda c: f"{c['kind']}-{c['args']}"
)
def test_limits_are_those_of_the_authors_code(case: dict) -> None:
    (norms,), (expected,) = case["inputs"], case["outputs"]
    steps = torch.tensor(norms["data"], dtype=F64).reshape(norms["shape"])
    clipped = torch.tensor(expected["data"], dtype=F64).reshape(norms["shape"])
    assert (clipped < steps).any()
    args = {k: math.inf if v == "inf" else v for k, v in case["args"].items()}  # JSON has no inf
    policy = PEERS[case["kind"]](**args)
    assert (clipped > steps * (1 + 1e-9)).any() == raises(policy)
    # ZClip's and AutoClip's coefficients are divided by the norm + 1e-6.
    rtol = 1e-11 if raises(policy) else 4e-6
    torch.testing.assert_close(clipped_norms(policy, steps.tolist()), clipped, rtol=rtol, atol=0)


def test_the_defaults_are_those_of_the_authors_code() -> None:
    assert AdaGC() == AdaGC(ratio=1.04, max_norm=1.0, beta=0.99, warmup_steps=100)
    assert AdaGN() == AdaGN(gamma1=0.7, gamma2=0.9, eps=1e-8)
    bounds = {"low": 0.95, "high": 0.6, "late_low": 0.98, "late_high": 0.5}
    assert AGGC() == AGGC(
        **bounds, beta=0.95, max_down=0.9, max_up=1.1, late_from=math.inf, late_steps=1.0
    )
    assert ZClip() == ZClip(z_thresh=2.5, alpha=0.97, warmup_steps=25, max_norm=1.0)


WITH_ZEROS = [
    AutoClip(60.0, 5),
    AutoClip(60.0),
    ZClip(1.0, 0.8, 5, math.inf),
    ZClip(2.5, 0.97, 25, 1.0),
    ZClip(1.0, 0.8, 5, math.inf) & AutoClip(90.0),
    AGGC(0.8, 1.2, 0.7),
]


@pytest.mark.parametrize("zeros", ["before", "during the warm-up", "after it", "always between"])
@pytest.mark.parametrize("policy", WITH_ZEROS, ids=repr)
def test_a_norm_of_zero_is_no_statistic(policy: Policy[Any], zeros: str) -> None:
    """Parameters that are frozen for a while are clipped afterwards as if they had not been."""
    steps = spiky_norms(60, seed=4)
    at = {"before": [0], "during the warm-up": [3], "after it": [40], "always between": range(60)}
    count = 1 if zeros == "always between" else 100
    with_zeros: list[float] = []
    for index, step in enumerate(steps):
        with_zeros += [0.0] * count if index in at[zeros] else []
        with_zeros.append(step)
    expected = clipped_norms(policy, steps)
    assert (expected < torch.tensor(steps, dtype=F64)).any()
    found = clipped_norms(policy, with_zeros)
    assert torch.equal(found[torch.tensor(with_zeros) > 0], expected)
    assert (found[torch.tensor(with_zeros) == 0] == 0).all()


def test_adagc_after_a_warm_up_without_any_gradient_follows_the_first_norms() -> None:
    steps = [[0.0, 0.0]] * 20 + [[3.0, 4.0], [3.0, 0.2], [9.0, 9.0]]
    clipped = clipped_norms(AdaGC(2.0, 1.0, 0.5, 5), steps)[20:]
    # The first are scaled by 1/5, as in a warm-up. Then the limits are 2 * 0.6 and 2 * 0.8, and γ
    # is .5 * .6 + .5 * 1.2 = .9 and .5 * .8 + .5 * .2 = .5.
    expected = torch.tensor([[0.6, 0.8], [1.2, 0.2], [1.8, 1.0]], dtype=F64)
    torch.testing.assert_close(clipped, expected, **CLOSE)


def test_a_group_that_is_frozen_during_the_warm_up_trains_afterwards() -> None:
    for policy in (ZClip(), AutoClip(), AdaGC(), AdaGC(warmup_steps=3), AdaGN(), AGGC()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
        groups = [{"name": n, "params": model[i]} for n, i in (("body", 0), ("head", 2))]
        clipper = Clipper(groups, policy)
        model[0].requires_grad_(False)
        for step in range(40):
            if step == 30:
                model[0].requires_grad_(True)
            model.zero_grad()
            (model(torch.randn(16, 6)) - 3).square().mean().backward()
            report = clipper.clip_()
        assert report.norms["body"] > 0
        assert report.coefficients["body"] > 0.01
        assert model[0].weight.grad.abs().max() > 0


def thawed_on_two_by_two(policy: Policy[Any]) -> None:
    """HSDP: no rank has a gradient of the body while it is frozen."""
    on = mesh((2, 2), ("dp", "fsdp"))
    params = [
        nn.Parameter(distribute_tensor(torch.zeros(4), on, [Replicate(), Shard(0)]))
        for _ in range(2)
    ]
    groups = [{"name": n, "params": [p]} for n, p in zip(("body", "head"), params, strict=True)]
    clipper, expected = (
        Clipper(groups, policy),
        Clipper([("w", nn.Parameter(torch.zeros(4)))], policy),
    )
    for step, norm in enumerate([0.0] * 30 + spiky_norms(30, seed=5)):
        gradient = torch.full((4,), norm / 2)
        if norm:
            params[0].grad = distribute_tensor(gradient.clone(), on, [Replicate(), Shard(0)])
            held = expected.plan.params[0].param
            held.grad = gradient
            want = expected.clip_().coefficient
        params[1].grad = distribute_tensor(torch.ones(4), on, [Replicate(), Shard(0)])
        found = clipper.clip_().coefficients["body"]
        assert step < 30 or found == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("policy", [ZClip(1.0, 0.8, 5, math.inf), AutoClip(60.0)], ids=repr)
def test_a_group_that_thaws_on_four_ranks(four_ranks: Ranks, policy: Policy[Any]) -> None:
    four_ranks.run(thawed_on_two_by_two, policy)
