"""AutoClip, ZClip and AdaGC: their limits are those of the reference and of the formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from distclip.policies import AdaGC, AutoClip, Policy, ZClip
from tests.policies.steps import (
    CLOSE,
    F64,
    assert_clips_to,
    clipped_norms,
    norms_shape,
    spiky_norms,
)
from tests.support import reference


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
}


@pytest.mark.parametrize("name", BY_HAND)
def test_numbers_by_hand(name: str) -> None:
    policy, steps, expected = BY_HAND[name]
    assert_clips_to(policy, steps, expected)


SCALE_FREE = [AutoClip(30.0, 9), ZClip(1.0, 0.8, 5, math.inf), AdaGC(1.05, math.inf, 0.9, 5)]


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


def test_zclip_pulls_a_higher_spike_back_further() -> None:
    calm = [1.0, 1.1, 0.9, 1.0, 1.1, 0.9]
    policy = ZClip(2.5, 0.9, 6, math.inf)
    low, high = (clipped_norms(policy, [*calm, spike])[-1] for spike in (1e3, 1e6))
    assert 1.0 < high < low < 1.3
