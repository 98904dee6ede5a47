"""What a Clipper keeps between calls can be written, whichever mode each call was made in."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip import AGC, AGGC, AdaGC, AdaGN, AutoClip, ClipNorm, Clipper, ClipValue, Policy, ZClip
from distclip.nonfinite import SkipCounter

POLICIES: dict[str, Policy[Any]] = {
    "norm": ClipNorm(1.0),
    "value": ClipValue(0.1),
    "AGC": AGC(),
    "AutoClip": AutoClip(history=3),
    "ZClip": ZClip(warmup_steps=2),
    "AdaGC": AdaGC(warmup_steps=2),
    "AdaGN": AdaGN(),
    "AGGC": AGGC(),
    "minimum": ClipNorm(1.0) & ZClip(warmup_steps=2),
}


def context(inside: bool) -> AbstractContextManager[Any]:
    return torch.inference_mode() if inside else nullcontext()


def backward(model: nn.Module, value: float) -> None:
    model.zero_grad()
    model(torch.full((1, 3), value)).sum().backward()


def tensors_in(saved: Any) -> list[Tensor]:
    if isinstance(saved, dict):
        return [tensor for value in saved.values() for tensor in tensors_in(value)]
    return [saved] if isinstance(saved, Tensor) else []


def run(policy: Policy[Any], mode: Any, overlap: bool, inside: list[bool]) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    with context(inside[0]):
        clipper = Clipper(model, policy, on_nonfinite=mode, overlap=overlap)
    found: list[Any] = []
    for step, now in enumerate(inside[1:]):
        backward(model, math.nan if step in (1, 2) else 5.0 + step)
        with context(now):
            clipper.clip_()
            saved = clipper.state_dict()
        for tensor in tensors_in(saved):
            tensor.add_(0)  # as torch.distributed.checkpoint writes into them
        with context(not now):
            clipper.load_state_dict(saved)
        found.append([grad.tolist() for grad in (model.weight.grad, model.bias.grad)])
    return [str(found), str(clipper.state_dict()), str(clipper.skipped)]


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("mode", ["propagate", "skip", "zero"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_clipper_in_and_out_of_inference_mode(name: str, mode: str, overlap: bool) -> None:
    policy = POLICIES[name]
    expected = run(policy, mode, overlap, [False] * 6)
    for inside in ([True] * 3 + [False] * 3, [False, True] * 3, [True, False] * 3):
        assert run(policy, mode, overlap, inside) == expected


def test_the_counter_counts_on() -> None:
    for inside in ((True, False), (False, True)):
        param = nn.Parameter(torch.zeros(2))
        clipper = Clipper([param], on_nonfinite="skip", max_consecutive_skips=2)
        for now in inside:
            param.grad = torch.tensor([math.nan, 1.0])
            with context(now):
                clipper.clip_()
        assert clipper.skipped == 2
        param.grad = torch.tensor([math.nan, 1.0])
        with pytest.raises(distclip.NonFiniteGradientError, match="2 steps in a row"):
            clipper.clip_()


def test_the_functions_keep_plans_for_both() -> None:
    for inside in (True, False, True):
        params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
        for param in params:
            param.grad = torch.tensor([3.0, 4.0])
        with context(inside):
            assert distclip.clip_grad_norm_(params, 1.0).item() == pytest.approx(math.sqrt(75))


def test_gradients_that_were_made_in_inference_mode() -> None:
    param = nn.Parameter(torch.zeros(2))
    clipper = Clipper([param], ZClip())
    for _ in range(2):
        with torch.inference_mode():
            param.grad = torch.tensor([3.0, 4.0])
            assert clipper.clip_().clipped
            torch.testing.assert_close(param.grad, torch.tensor([0.6, 0.8]))


def test_a_counter_alone() -> None:
    counter = SkipCounter(1)
    for inside in (True, False, True):
        with context(inside):
            too_many = counter.count_(torch.tensor(False))
    assert too_many
    assert counter.total == 3
