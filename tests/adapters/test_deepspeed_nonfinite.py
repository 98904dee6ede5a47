"""Loss scales, overflow, and gradients that are not finite, on DeepSpeed engines."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distclip
from distclip.adapters.deepspeed import attach
from tests.support import engines, reference
from tests.support.engines import Applied, config, engine, norm_of
from tests.support.ranks import Ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)


def left_by(policy: Any, step: Applied) -> list[Tensor]:
    grads, weights = list(step.grads.values()), list(step.weights.values())
    if isinstance(policy, distclip.ClipValue):
        return reference.clip_value(grads, 0.05)
    if isinstance(policy, distclip.AGC):
        return reference.agc(weights, grads, 0.1)
    return reference.clip_norm(grads, policy.max_norm)


def the_scale_grows(stage: int) -> None:
    """The scale doubles before the engine divides by it: by itself that halves the update."""
    scaling = {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 8,
        "loss_scale_window": 1,
        "hysteresis": 1,
    }
    for policy in (
        distclip.ClipNorm(1e9),
        distclip.ClipNorm(1.0),
        distclip.ClipValue(0.05),
        distclip.AGC(0.1),
    ):
        with engine(config(stage, fp16=scaling)) as made:
            handle = attach(made, policy)
            growths = []
            for index in range(3):
                scale = made.optimizer.loss_scale
                step = Applied(made, index, "fp16", scale=scale)
                growths.append(made.optimizer.loss_scale / scale)
                engines.check_applied(step.update, left_by(policy, step))
                norm = norm_of(step.grads, policy.norm_type)
                assert handle.report.total_norm.item() == pytest.approx(norm, rel=2e-7)
            assert 2.0 in growths


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_step_on_which_the_loss_scale_grows(two_engine_ranks: Ranks, stage: int) -> None:
    engines.skip_without_fp16()
    two_engine_ranks.run(the_scale_grows, stage)


def overflow(stage: int) -> None:
    scaling = {"enabled": True, "loss_scale": 0, "initial_scale_power": 20, "hysteresis": 1}
    with engine(config(stage, fp16=scaling)) as made:
        handle = attach(made, distclip.AutoClip(50.0))
        start = str(handle.state_dict())
        skipped = 0
        while True:
            weights = engines.masters(made)
            scale = made.optimizer.loss_scale
            engines.train_step(made, 0, "fp16")
            if not made.optimizer.overflow:
                break
            skipped += 1
            assert made.optimizer.loss_scale == scale / 2
            assert not handle.report.finite
            assert str(handle.state_dict()) == start
            assert unchanged(made, weights)
        assert skipped >= 2
        assert handle.report.finite
        assert str(handle.state_dict()) != start


def unchanged(made: Any, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(weights[n], after) for n, after in engines.masters(made).items())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_overflow_is_the_engines_and_leaves_the_state_alone(
    two_engine_ranks: Ranks, stage: int
) -> None:
    engines.skip_without_fp16()
    two_engine_ranks.run(overflow, stage)


def poisoned_step(made: Any, dtype: str) -> None:
    """A step in which a NaN comes from the batch of rank 1."""
    inputs, targets = engines.batch(0, dist.get_rank())
    targets[0, 0] = math.nan if dist.get_rank() == 1 else 0.0
    made.backward(engines.loss_of(made, inputs, targets, engines.DTYPES[dtype]))
    made.step()


def a_nan(made: Any, dtype: str, mode: Any) -> None:
    handle = attach(made, distclip.AutoClip(), on_nonfinite=mode)
    engines.train_step(made, 1, dtype)
    before, state = engines.masters(made), str(handle.state_dict())
    if mode == "raise":
        with pytest.raises(distclip.NonFiniteGradientError, match=r"the worst gradient"):
            poisoned_step(made, dtype)
    else:
        poisoned_step(made, dtype)
        names = sorted(n for n, _ in made.module.named_parameters())
        assert sorted(handle.report.nonfinite_parameters()) == names
    assert str(handle.state_dict()) == state
    assert unchanged(made, before)
    if mode != "raise":
        engines.train_step(made, 2, dtype)
        assert handle.report.finite
        assert not unchanged(made, before)
    handle.detach()


def a_veto(made: Any, dtype: str) -> None:
    handle = attach(made, distclip.SkipSpike(max_norm=0.0) & distclip.AutoClip())
    before, state = engines.masters(made), str(handle.state_dict())
    engines.train_step(made, 1, dtype)
    assert handle.report.skipped
    assert unchanged(made, before)
    assert str(handle.state_dict()) == state
    handle.detach()


def every_mode(stage: int, dtype: str, checks: bool) -> None:
    for offload in (False, True) if stage else (False,):
        settings = config(stage, dtype, offload=offload)
        if not checks:
            settings["bf16"]["check_grad_overflow"] = False
        with engine(settings) as made:
            a_veto(made, dtype)
            for mode in ("skip", "zero", "raise"):  # a raise leaves the engine inside its step
                a_nan(made, dtype, mode)


@pytest.mark.parametrize(
    ("stage", "dtype", "checks"),
    [
        (0, "fp32", True),
        (0, "bf16", True),
        (1, "fp32", True),
        (1, "bf16", False),  # DeepSpeed itself would apply a NaN
        (2, "bf16", False),
        (2, "bf16", True),
        (3, "bf16", True),
    ],
)
def test_a_nan_on_one_rank(two_engine_ranks: Ranks, stage: int, dtype: str, checks: bool) -> None:
    two_engine_ranks.run(every_mode, stage, dtype, checks)
