"""`load_state_dict` on damaged and hostile states: all of it is loaded, or nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distclip import ClipNorm, Clipper
from distclip.policies import AdaGC, AutoClip, ClipTensorNorm, SkipSpike, ZClip
from tests.faults.hostile import KEYS, STATES, changed, drawn, tried

POLICIES = {
    "body": ZClip(warmup_steps=3) & AutoClip(50.0, history=4),
    "head": AdaGC(warmup_steps=2) & ClipTensorNorm(2.0),
    "tail": SkipSpike(4.0, window=4) & ClipNorm(3.0),
    "rest": ClipNorm(0.5),
}


def made(num_steps: int) -> Clipper:
    groups = [
        {"name": name, "params": [(f"{name}.w", parameter(2)), (f"{name}.b", parameter(1))]}
        | {"policy": policy}
        for name, policy in POLICIES.items()
    ]
    clipper = Clipper(groups)
    for step in range(num_steps):
        take_step(clipper, 1.0 + step % 3)
    return clipper


def parameter(size: int) -> nn.Parameter:
    return nn.Parameter(torch.full((size,), 0.5))


def take_step(clipper: Clipper, size: float) -> Any:
    for param in clipper.plan.params:
        param.param.grad = torch.full_like(param.param, size)
    return clipper.clip_()


@functools.cache  # a Clipper takes longer to make than to load
def held() -> tuple[Clipper, Clipper]:
    return made(5), made(1)


@functools.cache
def real(num_steps: int) -> dict[str, Any]:
    return made(num_steps).state_dict()


@st.composite
def states(draw: st.DrawFn) -> Any:
    return draw(changed(real(draw(st.sampled_from([0, 2, 5, 7]))), STATES, KEYS))


@given(states())
@drawn(200)
def test_a_state_is_loaded_whole_or_not_at_all(saved: Any) -> None:
    clipper, other = held()
    clipper.load_state_dict(real(5))
    before = str(clipper.state_dict())
    _, error = tried(lambda: clipper.load_state_dict(saved), ValueError, TypeError)
    if error is not None:
        assert isinstance(error, ValueError) == isinstance(saved, Mapping)
        assert str(error).startswith("cannot load the state of a Clipper: ")
        assert "Nothing was loaded" in str(error)
        assert len(str(error)) < 1500
        assert str(clipper.state_dict()) == before
        return
    loaded = clipper.state_dict()
    other.load_state_dict(loaded)
    assert str(other.state_dict()) == str(loaded)
    for _ in range(2):
        report = take_step(clipper, 2.0)
        assert all(limit >= 0 for limit in report.limits.values())
        other.load_state_dict(clipper.state_dict())  # what a step leaves can be loaded


@pytest.mark.parametrize("num_steps", [0, 1, 5, 9])
def test_what_steps_leave_is_loaded(num_steps: int) -> None:
    """The reference of the test above: without a change every state is taken."""
    saved, other = made(num_steps).state_dict(), made(3)
    other.load_state_dict(saved)
    assert str(other.state_dict()) == str(saved)
    assert not math.isnan(take_step(other, 1.0).total_norm)
