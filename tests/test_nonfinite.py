"""What a norm that is not finite leads to: on every rank the same, and only what was asked for."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from tests.support.layouts import LAYOUTS, UNSHARDED, lay_out, random_wholes
from tests.support.ranks import Ranks, mesh
from tests.support.wrapped import local

RULES = ["propagate", "raise", "skip", "zero"]


def parameters(*grads: list[float]) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.zeros(len(grad))) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = torch.tensor(grad)
    return params


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_each_rule(value: float) -> None:
    for rule in RULES:
        params = parameters([3.0, 4.0], [0.0, 12.0])
        clipper = distclip.Clipper(params, distclip.ClipNorm(1.0), on_nonfinite=rule)
        report = clipper.clip_()
        assert report.clipped  # it does clip
        assert report.finite
        assert report.nonfinite_parameters() == {}
        params[1].grad[0] = value
        before = [p.grad.clone() for p in params]
        if rule == "raise":
            with pytest.raises(
                distclip.NonFiniteGradientError, match=r"'#1', whose norm on rank 0 is (nan|inf)"
            ):
                clipper.clip_()
        else:
            report = clipper.clip_()
            assert not report.finite
            assert report.nonfinite_parameters() == {"#1": [0]}
        after = [p.grad for p in params]
        if rule in ("raise", "skip"):
            torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
        elif rule == "zero":
            assert report.coefficient == 0
            assert all(torch.equal(g, torch.zeros(2)) for g in after)
        else:  # as torch.nn.utils.clip_grad_norm_
            control = parameters(*[g.tolist() for g in before])
            nn.utils.clip_grad_norm_(control, 1.0)
            torch.testing.assert_close(after, [p.grad for p in control], equal_nan=True)
        assert clipper.skipped == (rule in ("skip", "zero"))


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"on_nonfinite='ignore'.*\"skip\""):
        distclip.Clipper(parameters([1.0]), on_nonfinite="ignore")
    with pytest.raises(ValueError, match=r"max_consecutive_skips=-1"):
        distclip.Clipper(parameters([1.0]), on_nonfinite="skip", max_consecutive_skips=-1)


@pytest.mark.parametrize("rule", ["skip", "zero"])
def test_a_run_that_skips_for_ever_raises(rule: str) -> None:
    params = parameters([3.0, 4.0])
    clipper = distclip.Clipper(
        params, distclip.ClipNorm(1.0), on_nonfinite=rule, max_consecutive_skips=2
    )
    assert clipper.skipped == 0
    for value in (math.nan, math.nan, 5.0, math.inf, math.nan):  # the finite one begins anew
        params[0].grad = torch.tensor([value, 0.0])
        assert clipper.clip_().finite == math.isfinite(value)
    assert clipper.skipped == 4
    params[0].grad = torch.tensor([math.nan, 2.0])
    with pytest.raises(
        distclip.NonFiniteGradientError, match=r"after 2 steps in a row .* '#0', .* nan"
    ):
        clipper.clip_()
    assert clipper.skipped == 5
    assert params[0].grad[1] == 2
    assert distclip.Clipper(params, on_nonfinite="skip", max_consecutive_skips=0).skipped == 0


def test_finite_gradients_whose_norm_no_float32_holds() -> None:
    params = parameters([3e38, 3e38])
    report = distclip.Clipper(params, on_nonfinite="skip").clip_()
    assert not report.finite
    assert report.nonfinite_parameters() == {}
    with pytest.raises(
        distclip.NonFiniteGradientError, match=r"the largest, and finite .*by rank: none"
    ):
        distclip.Clipper(params, on_nonfinite="raise").clip_()


def with_a_value_on(rank: int, value: float, params: list[nn.Parameter]) -> list[Tensor]:
    """This rank's gradients, clones; the last that is not empty has `value` on `rank` alone."""
    if dist.get_rank() == rank:
        [local(p.grad) for p in params if local(p.grad).numel()][-1].view(-1)[0] = value
    return [local(p.grad).clone() for p in params]


def clip_infinity(clipper: distclip.Clipper, params: list[nn.Parameter], num_steps: int) -> None:
    """On an accelerator, what is counted is read four steps later."""
    for _ in range(num_steps):
        with_a_value_on(2, math.inf, params)
        clipper.clip_()


def all_ranks_do_the_same(layout: str, device: str) -> None:
    placed = LAYOUTS[layout]
    wholes = random_wholes(placed, seed=1)
    for rule, norm_type in zip(RULES, (2.0, 1.0, 8.0, math.inf), strict=True):
        params = lay_out(wholes, placed, device)
        policy = distclip.ClipNorm(0.1, norm_type)
        clipper = distclip.Clipper(params, policy, on_nonfinite=rule, max_consecutive_skips=1)
        assert clipper.clip_().clipped  # it does clip
        before = with_a_value_on(1, math.nan, params)
        if rule == "raise":
            with pytest.raises(
                distclip.NonFiniteGradientError, match=r"rank 1 is nan \(.*by rank: 1: 1\)"
            ):
                clipper.clip_()
        else:
            report = clipper.clip_()
            assert not report.finite
            nonfinite_parameters = report.nonfinite_parameters()
            assert [ranks for ranks in nonfinite_parameters.values()] == [[1]]
        after = [local(p.grad) for p in params]
        for now, was in zip(after, before, strict=True):
            if rule == "propagate":
                assert now.isnan().all()
            elif rule == "zero":
                assert not now.any()
            else:
                torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)
        if rule in ("skip", "zero"):
            assert clipper.skipped == 1
            with pytest.raises(distclip.NonFiniteGradientError, match=r"after 1 steps in a row"):
                clip_infinity(clipper, params, 1 if device == "cpu" else 5)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in UNSHARDED])
def test_a_nan_on_one_rank(four_ranks: Ranks, layout: str) -> None:
    four_ranks.run(all_ranks_do_the_same, layout, four_ranks.device)


def all_stages_skip(fused: bool) -> None:
    """A pipeline of plain tensors: each rank has its own stage, and only rank 3 sees the NaN."""
    for way in ("step", "attach"):
        param = nn.Parameter(torch.ones(4))
        optimizer = torch.optim.AdamW([param], lr=0.1, fused=fused, foreach=not fused)
        options = {"mesh": mesh((4,), ("pp",)), "on_nonfinite": "skip"}
        clipper = distclip.Clipper(
            [(f"stage{dist.get_rank()}", param)], distclip.ClipNorm(1.0), **options
        )
        attached = clipper.attach(optimizer) if way == "attach" else None
        for step in range(3):
            param.grad = torch.full((4,), math.nan if step == 1 and dist.get_rank() == 3 else 2.0)
            before = param.detach().clone()
            report = (
                clipper.step(optimizer)
                if attached is None
                else (optimizer.step(), attached.report)[1]
            )
            assert report.clipped == (step != 1)
            assert torch.equal(before, param) == (step == 1)
            assert report.nonfinite_parameters() == ({"stage3": [3]} if step == 1 else {})
            assert param.grad is not None
        assert optimizer.state[param]["step"] == 2


@pytest.mark.parametrize("fused", [True, False])
def test_a_pipeline_skips_together(four_ranks: Ranks, fused: bool) -> None:
    four_ranks.run(all_stages_skip, fused)
