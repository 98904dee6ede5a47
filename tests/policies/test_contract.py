"""What every policy keeps to: it is pure, never waits for the device, and checks its settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distclip.policies import (
    AGC,
    AGGC,
    AdaGC,
    AdaGN,
    AutoClip,
    ClipBlockRMS,
    ClipNorm,
    ClipTensorNorm,
    ClipValue,
    ZClip,
)
from tests.policies.steps import F64, POLICIES, clipped_norms, context, norms_shape, spiky_norms


def leaves(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [t for part in state for t in leaves(part)]


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_frozen(name: str) -> None:
    policy = POLICIES[name]
    assert dataclasses.is_dataclass(policy)
    assert policy == dataclasses.replace(policy)  # type: ignore[type-var]
    assert hash(policy) == hash(dataclasses.replace(policy))  # type: ignore[type-var]
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.clip_factor = 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_pure_and_its_state_keeps_its_form(name: str) -> None:
    policy = POLICIES[name]
    state = policy.init(3, torch.device("cpu"))
    for step in spiky_norms(12, 1, norms_shape(policy)):
        norms = torch.tensor(step, dtype=F64)
        before = [leaf.clone() for leaf in leaves(state)]
        limit, after = policy.limit(norms, state, context(norms))
        again, _ = policy.limit(norms.clone(), state, context(norms))
        assert limit is not None
        assert (limit.shape, limit.dtype) == (norms.shape, torch.float64)
        assert torch.equal(limit, again)
        assert all(torch.equal(leaf, was) for leaf, was in zip(leaves(state), before, strict=True))
        assert type(after) is type(state)
        assert hasattr(type(after), "_fields")
        for new, old in zip(leaves(after), before, strict=True):
            assert (new.shape, new.dtype) == (old.shape, old.dtype)
            assert new.dtype in (torch.float64, torch.int64)
        state = after


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_never_waits_for_the_device(name: str) -> None:
    """A fake tensor has no values: `.item()`, `bool()` and a tensor as an index raise, as does
    another device."""
    policy = POLICIES[name]
    with FakeTensorMode():
        state = policy.init(3, torch.device("cuda"))
        norms = torch.ones(norms_shape(policy), dtype=F64, device="cuda")
        for _ in range(2):
            limit, state = policy.limit(norms, state, context(norms))
            assert limit is not None
            assert limit.ndim == 0 or limit.is_cuda  # a scalar on the CPU is a constant
            assert all(leaf.is_cuda for leaf in leaves(state))


FINITE = st.floats(0, 1e38) | st.sampled_from([0.0, 1e-45, 1e-30, 1.0, 1e30])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(steps=st.lists(st.lists(FINITE, min_size=3, max_size=3), min_size=1, max_size=15))
def test_finite_norms_give_limits_that_are_numbers_and_never_negative(
    steps: list[list[float]],
) -> None:
    for name, policy in POLICIES.items():
        shape = norms_shape(policy)
        clipped = clipped_norms(policy, [step if shape else step[0] for step in steps])
        assert (clipped >= 0).all(), name  # NaN would fail, too
        assert clipped.isfinite().all(), name


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "ClipTensorNorm < 0": (lambda: ClipTensorNorm(-1.0), r"max_norm=-1\.0.*0 or above"),
    "ClipTensorNorm NaN": (lambda: ClipTensorNorm(math.nan), "max_norm=nan"),
    "ClipTensorNorm p": (lambda: ClipTensorNorm(1.0, 0.0), r"norm_type=0\.0.*above 0"),
    "ClipBlockRMS < 0": (lambda: ClipBlockRMS(-0.1), r"threshold=-0\.1"),
    "ClipBlockRMS NaN": (lambda: ClipBlockRMS(math.nan), "threshold=nan"),
    "ClipValue < 0": (lambda: ClipValue(-0.1), r"clip_value=-0\.1"),
    "ClipValue NaN": (lambda: ClipValue(math.nan), "clip_value=nan"),
    "AGC factor < 0": (lambda: AGC(-0.01), r"clip_factor=-0\.01.*finite number, 0 or above"),
    "AGC factor inf": (lambda: AGC(math.inf), "clip_factor=inf"),
    "AGC factor NaN": (lambda: AGC(math.nan), "clip_factor=nan"),
    "AGC eps < 0": (lambda: AGC(eps=-1e-3), r"eps=-0\.001"),
    "AGC eps NaN": (lambda: AGC(eps=math.nan), "eps=nan"),
    "AGC p": (lambda: AGC(norm_type=-1.0), r"norm_type=-1\.0"),
    "AGC unit_dim": (lambda: AGC(unit_dim=1), r"unit_dim=1.*0 or -1"),
    "AGC exclude text": (lambda: AGC(exclude="head"), r"'head'.*tuple of names"),
    "AGC exclude number": (lambda: AGC(exclude=(3,)), r"\(3,\).*tuple of names"),
    "AutoClip < 0": (lambda: AutoClip(-0.1), r"percentile=-0\.1.*0\.\.100"),
    "AutoClip > 100": (lambda: AutoClip(100.5), r"percentile=100\.5.*0\.\.100"),
    "AutoClip NaN": (lambda: AutoClip(math.nan), "percentile=nan"),
    "AutoClip history 0": (lambda: AutoClip(history=0), "history=0.*1 or above"),
    "AutoClip history NaN": (lambda: AutoClip(history=math.nan), "history=nan"),
    "AutoClip history 2.5": (lambda: AutoClip(history=2.5), r"history=2\.5.*whole number"),
    "ZClip z_thresh < 0": (lambda: ZClip(-1.0), r"z_thresh=-1\.0"),
    "ZClip z_thresh NaN": (lambda: ZClip(math.nan), "z_thresh=nan"),
    "ZClip alpha > 1": (lambda: ZClip(alpha=1.1), r"alpha=1\.1.*0\.\.1"),
    "ZClip alpha < 0": (lambda: ZClip(alpha=-0.1), r"alpha=-0\.1.*0\.\.1"),
    "ZClip alpha NaN": (lambda: ZClip(alpha=math.nan), "alpha=nan"),
    "ZClip warm-up 0": (lambda: ZClip(warmup_steps=0), "warmup_steps=0.*1 or above"),
    "ZClip max_norm < 0": (lambda: ZClip(max_norm=-1.0), r"max_norm=-1\.0"),
    "ZClip max_norm NaN": (lambda: ZClip(max_norm=math.nan), "max_norm=nan"),
    "AdaGC ratio < 0": (lambda: AdaGC(-1.05), r"ratio=-1\.05"),
    "AdaGC ratio NaN": (lambda: AdaGC(math.nan), "ratio=nan"),
    "AdaGC max_norm < 0": (lambda: AdaGC(max_norm=-1.0), r"max_norm=-1\.0"),
    "AdaGC max_norm NaN": (lambda: AdaGC(max_norm=math.nan), "max_norm=nan"),
    "AdaGC beta > 1": (lambda: AdaGC(beta=1.5), r"beta=1\.5.*0\.\.1"),
    "AdaGC beta < 0": (lambda: AdaGC(beta=-0.5), r"beta=-0\.5.*0\.\.1"),
    "AdaGC beta NaN": (lambda: AdaGC(beta=math.nan), "beta=nan"),
    "AdaGC warm-up 0": (lambda: AdaGC(warmup_steps=0), "warmup_steps=0.*1 or above"),
    "AdaGC warm-up NaN": (lambda: AdaGC(warmup_steps=math.nan), "warmup_steps=nan"),
    "AdaGN gamma1 1": (lambda: AdaGN(gamma1=1.0), r"gamma1=1\.0.*below 1"),
    "AdaGN gamma1 < 0": (lambda: AdaGN(gamma1=-0.1), r"gamma1=-0\.1"),
    "AdaGN gamma2 1": (lambda: AdaGN(gamma2=1.0), r"gamma2=1\.0.*below 1"),
    "AdaGN gamma2 NaN": (lambda: AdaGN(gamma2=math.nan), "gamma2=nan"),
    "AdaGN eps < 0": (lambda: AdaGN(eps=-1e-8), "eps=-1e-08"),
    "AdaGN eps inf": (lambda: AdaGN(eps=math.inf), "eps=inf"),
    "AGGC low < 0": (lambda: AGGC(-0.1), r"low=-0\.1"),
    "AGGC high NaN": (lambda: AGGC(high=math.nan), "high=nan"),
    "AGGC high inf": (lambda: AGGC(high=math.inf), "high=inf"),
    "AGGC late low < 0": (lambda: AGGC(late_low=-1.0), r"late_low=-1\.0"),
    "AGGC late high inf": (lambda: AGGC(late_high=math.inf), "late_high=inf"),
    "AGGC beta 1": (lambda: AGGC(beta=1.0), r"beta=1\.0.*below 1"),
    "AGGC max_down > 1": (lambda: AGGC(max_down=1.1), r"max_down=1\.1"),
    "AGGC max_up < 1": (lambda: AGGC(max_up=0.9), r"max_up=0\.9.*1 or above"),
    "AGGC max_up NaN": (lambda: AGGC(max_up=math.nan), "max_up=nan"),
    "AGGC late_from < 0": (lambda: AGGC(late_from=-1.0), r"late_from=-1\.0"),
    "AGGC late_steps 0": (lambda: AGGC(late_steps=0.0), r"late_steps=0\.0.*above 0"),
    "AGGC late_steps inf": (lambda: AGGC(late_steps=math.inf), "late_steps=inf"),
}


@pytest.mark.parametrize("name", BAD)
def test_numbers_out_of_range_are_refused_at_construction(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert len(str(caught.value).split()) > 20  # attempted, found, why, what to do


@pytest.mark.parametrize("value", [None, "1.0"])
def test_what_is_no_number_is_refused_at_construction(value: Any) -> None:
    for call in (
        lambda: ClipNorm(value),
        lambda: ClipNorm(1.0, value),
        lambda: ClipValue(value),
        lambda: AGC(value),
        lambda: AutoClip(value),
    ):
        with pytest.raises(TypeError, match=f"={value!r}: it is a {type(value).__name__}.*number"):
            call()


def test_the_edges_of_the_ranges_are_allowed() -> None:
    head = nn.Linear(2, 2)
    assert AGC(0.0, 0.0, exclude=["head", head]).exclude == ("head", head)  # type: ignore[arg-type]
    for make, settings_ in (
        (ClipNorm, (0.0, math.inf)),
        (AutoClip, (0.0, 1)),
        (AutoClip, (100.0, 1)),
        (ZClip, (0.0, 0.0, 1, math.inf)),
        (AdaGC, (0.0, math.inf, 1.0, 1)),
        (AdaGN, (0.0, 0.0, 0.0)),
        (AGGC, (0.0, 0.0, 0.0, 0.0, math.inf, 0.0, 0.0, 0.0, 1e-9)),
    ):
        assert dataclasses.astuple(make(*settings_)) == settings_
