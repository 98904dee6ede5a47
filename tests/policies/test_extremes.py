"""Norms that are infinite, NaN, or too large for the square of their deviation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distclip import Clipper
from distclip.policies import AGC, AGGC, AdaGN, AutoClip, ClipTensorNorm, ZClip
from tests.policies.steps import spiky_norms
from tests.support import reference

F32, F64 = torch.float32, torch.float64


def run(policy: Any, norms: list[float], dtype: torch.dtype = F64) -> tuple[Clipper, list[float]]:
    """A Clipper of one number after these steps, and what it left of each."""
    param, left = nn.Parameter(torch.zeros(2, dtype=dtype)), []
    clipper = Clipper([("w", param)], policy)
    for norm in norms:
        param.grad = torch.tensor([norm, 0.0], dtype=dtype)
        clipper.clip_()
        left.append(param.grad[0].item())
    return clipper, left


@pytest.mark.parametrize("norm", [1e20, 1e30])
def test_zclip_of_float32_norms_whose_squares_float32_lacks(norm: float) -> None:
    norms = [norm * each for each in spiky_norms(60, seed=1)]
    expected = reference.zclip(norms, 2.0, 0.9, 10, math.inf)
    assert min(a / b for a, b in zip(expected, norms, strict=True)) < 0.9
    _, left = run(ZClip(2.0, 0.9, 10, None), norms, F32)
    assert left == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("norm", [1e153, 1e160, 1e300])
def test_zclip_where_float64_holds_no_variance(norm: float) -> None:
    """Spikes are pulled back to about the mean, and what is remembered can be loaded."""
    steps = [norm * (1 + 0.1 * (step % 3)) for step in range(30)]
    clipper, left = run(ZClip(2.0, 0.9, 10, None), [*steps, norm * 100])
    assert norm <= left[-1] <= 2 * norm
    saved = clipper.state_dict()
    clipper.load_state_dict(saved)
    (state,) = saved["groups"]["all"].values()
    assert norm <= state["mean"] <= 1.2 * norm
    assert 0 < state["var"] < math.inf


def test_a_single_norm_without_a_square_does_not_end_zclip() -> None:
    """A spike of 1e200 after norms around 1 is pulled back like any other."""
    norms = spiky_norms(40, seed=2)
    _, left = run(ZClip(2.0, 0.9, 10, None), [*norms, 1e200, *norms])
    expected = reference.zclip([*norms, 1e100, *norms], 2.0, 0.9, 10, math.inf)
    assert left == pytest.approx(expected, rel=1e-12)
    assert left[40] < 10


def test_a_z_thresh_without_a_square() -> None:
    _, left = run(ZClip(1e200, 0.9, 2, None), [1.0, 2.0, 50.0])
    assert left == [1.0, 2.0, 50.0]


@pytest.mark.parametrize("percentile", [0.0, 10.0, 50.0, 100.0])
@pytest.mark.parametrize("num_norms", [0, 1, 4])
def test_autoclip_leaves_an_infinite_norm_out_of_its_percentile(
    percentile: float, num_norms: int
) -> None:
    """With "propagate" finite elements become 0, as in torch; without a past all stay."""
    norms = spiky_norms(4, seed=3)[:num_norms]
    for value in (math.inf, -math.inf, math.nan):
        clipper, _ = run(AutoClip(percentile, history=4), norms)
        before = str(clipper.state_dict())
        (param,) = clipper.plan.params
        param.param.grad = torch.tensor([value, 3.0], dtype=F64)
        report = clipper.clip_()
        limit = np.percentile(norms, percentile) if norms else math.inf
        assert report.limit.item() == pytest.approx(limit)
        if math.isnan(value):
            assert param.param.grad.isnan().all()
        elif norms:
            assert param.param.grad.isnan().tolist() == [True, False]
            assert param.param.grad[1] == 0
        else:
            assert param.param.grad.tolist() == [value, 3.0]
        assert str(clipper.state_dict()) == before


def test_aggc_and_adagn_at_infinity() -> None:
    """As they say."""
    for policy, left in ((AGGC(), math.inf), (AGGC(0.5, 2.0, 0.5, max_down=0.0), math.nan)):
        _, found = run(policy, [4.0, math.inf])
        assert found[1] == pytest.approx(left, nan_ok=True)
    clipper, _ = run(AGGC(0.5, 2.0, 0.5, max_down=0.0), [4.0])
    (param,) = clipper.plan.params
    param.param.grad = torch.tensor([math.inf, 3.0], dtype=F64)
    assert clipper.clip_().limit == 4.0  # `high` times the average, which is 2
    assert param.param.grad[1] == 0
    _, found = run(AdaGN(), [4.0, math.inf, math.nan, 4.0])
    assert [math.isnan(each) for each in found] == [False, True, True, False]
    assert found[3] == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_frozen_weights_have_no_limit_under_agc(scale: float) -> None:
    """They are not read: a limit of clip_factor * eps would be of no weight."""
    base, bias = nn.Parameter(torch.full((3, 2), 5.0)), nn.Parameter(torch.full((2,), 7.0))
    clipper = Clipper([("base", base), ("bias", bias)], AGC(0.1 * scale, eps=1e-3))

    def limit() -> float:
        bias.grad = torch.full((2,), 30.0)
        return clipper.clip_().limit.item()

    of_base, of_bias = (0.1 * scale * math.hypot(size, size) for size in (5.0, 7.0))
    assert limit() == pytest.approx(of_base)
    base.requires_grad_(False)
    assert limit() == pytest.approx(of_bias)
    base.grad = torch.full((3, 2), 30.0)  # accumulated before
    assert limit() == pytest.approx(of_base)
    assert base.grad.norm(dim=1).tolist() == pytest.approx([of_base] * 3, rel=1e-5)
    base.grad = None
    assert limit() == pytest.approx(of_bias)
    base.requires_grad_(True)
    assert limit() == pytest.approx(of_base)


def test_where_all_is_frozen_nothing_has_a_limit() -> None:
    weight = nn.Parameter(torch.ones(3, 2), requires_grad=False)
    for policy in (AGC(), AGC(clip_factor=0.0)):
        report = Clipper([("w", weight)], policy).clip_()
        assert (report.limit, report.coefficient, report.total_norm) == (math.inf, 1.0, 0.0)
    assert Clipper([("w", weight)], ClipTensorNorm(2.0)).clip_().limit == 2.0
