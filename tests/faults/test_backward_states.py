"""`BackwardClipper.load_state_dict` on damaged and hostile states: all is loaded, or nothing."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from distclip import AGC, ClipNorm, Clipper, ZClip
from distclip.training.step_in_backward import BackwardClipper
from tests.faults.hostile import KEYS, STATES, changed, drawn, tried

POLICIES = {"body": ClipNorm(1.0), "head": ZClip(warmup_steps=2), "tail": AGC(0.1)}


def made(num_steps: int) -> tuple[BackwardClipper, list[nn.Parameter]]:
    params = [nn.Parameter(torch.full((2, 2), 0.5)) for _ in POLICIES]
    groups = [
        {"name": name, "params": [(f"{name}.w", param)], "policy": policy}
        for (name, policy), param in zip(POLICIES.items(), params, strict=True)
    ]
    optimizers = {param: SGD([param], lr=0.1) for param in params}

    def hook(param: torch.Tensor) -> None:
        optimizers[param].step()
        param.grad = None

    for param in params:
        param.register_post_accumulate_grad_hook(hook)
    attached = Clipper(groups).attach_in_backward(optimizers.values())
    for step in range(num_steps):
        take_step(attached, params, 1.0 + step % 3)
    return attached, params


def take_step(attached: BackwardClipper, params: list[nn.Parameter], size: float) -> Any:
    sum(size * param.sum() for param in params).backward()
    return attached.end_step()


@functools.cache
def held() -> tuple[BackwardClipper, list[nn.Parameter], BackwardClipper]:
    return *made(4), made(0)[0]


@functools.cache
def real(num_steps: int) -> dict[str, Any]:
    return made(num_steps)[0].state_dict()


@st.composite
def states(draw: st.DrawFn) -> Any:
    return draw(changed(real(draw(st.sampled_from([0, 1, 4]))), STATES, KEYS))


@given(states())
@drawn(150)
def test_a_state_is_loaded_whole_or_not_at_all(saved: Any) -> None:
    attached, params, other = held()
    attached.load_state_dict(real(4))
    before = str(attached.state_dict())
    _, error = tried(lambda: attached.load_state_dict(saved), ValueError, TypeError)
    if error is not None:
        assert isinstance(error, ValueError) == isinstance(saved, Mapping)
        assert str(error).startswith("cannot load the state of a BackwardClipper: ")
        assert "Nothing was loaded" in str(error)
        assert len(str(error)) < 1500
        assert str(attached.state_dict()) == before
        return
    loaded = attached.state_dict()
    assert all(0 <= each <= 1 for each in loaded["coefficients"].values())
    other.load_state_dict(loaded)
    assert str(other.state_dict()) == str(loaded)
    report = take_step(attached, params, 2.0)
    assert all(0 <= each <= 1 for each in report.coefficients.values())
    other.load_state_dict(attached.state_dict())  # what a step leaves can be loaded


def test_what_steps_leave_is_loaded() -> None:
    for num_steps in (0, 1, 5):
        other, _ = made(2)
        other.load_state_dict(real(num_steps))
        assert str(other.state_dict()) == str(real(num_steps))
        as_json = {k: {n: float(x) for n, x in v.items()} for k, v in real(num_steps).items()}
        other.load_state_dict(as_json)
        assert str(other.state_dict()) == str(real(num_steps))
