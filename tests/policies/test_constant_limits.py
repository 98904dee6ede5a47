"""ClipNorm, ClipTensorNorm, ClipBlockRMS, ClipValue and AGC: limits without a memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from distclip import Clipper
from distclip.policies import (
    AGC,
    ClipBlockRMS,
    ClipNorm,
    ClipTensorNorm,
    ClipValue,
    EmptyState,
    NormContext,
)
from tests.policies.steps import F64, context
from tests.support import reference
from tests.test_api import recorded, tensors


def unit_norms(tensor: Tensor, unit_dim: int) -> Tensor:
    return reference.units(tensor, unit_dim).norm(dim=1)


def case_name(case: dict) -> str:
    return f"{case['kind']}-{case['args']}"


AGC_CASES = [*recorded("agc_torch_layout"), *recorded("agc_optax_layout")]


@pytest.mark.parametrize("case", AGC_CASES, ids=case_name)
def test_agc_as_timm_and_optax_recorded_it(case: dict) -> None:
    unit_dim = -1 if case["kind"] == "agc_optax_layout" else 0
    clip_factor, eps = case["args"]["clipping"], case["args"]["eps"]
    inputs, outputs = tensors(case["inputs"]), tensors(case["outputs"])
    half = len(inputs) // 2
    policy = AGC(clip_factor, eps, unit_dim=unit_dim)
    for weight, grad, want in zip(inputs[:half], inputs[half:], outputs, strict=True):
        norms, weights = unit_norms(grad, unit_dim), unit_norms(weight, unit_dim)
        limit, _ = policy.limit(norms, EmptyState(), NormContext(norms, weights, norms.norm()))
        clipped, wanted = torch.minimum(norms, limit), unit_norms(want, unit_dim)
        torch.testing.assert_close(clipped, wanted, rtol=1e-6, atol=0)
        (expected,) = reference.agc([weight], [grad], clip_factor, eps, unit_dim)
        torch.testing.assert_close(expected.float(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", recorded("clip_by_block_rms"), ids=lambda case: str(case["args"]))
def test_block_rms_as_optax_recorded_it(case: dict) -> None:
    threshold = case["args"]["threshold"]
    grads, wanted = tensors(case["inputs"]), tensors(case["outputs"])
    norms = torch.stack([g.double().norm() for g in grads])
    sizes = torch.tensor([float(g.numel()) for g in grads], dtype=F64)
    policy = ClipBlockRMS(threshold)
    limit, _ = policy.limit(norms, EmptyState(), NormContext(sizes, None, norms.norm()))
    expected = torch.stack([want.double().norm() for want in wanted])
    torch.testing.assert_close(torch.minimum(norms, limit), expected, rtol=1e-6, atol=0)
    for grad, want in zip(reference.clip_block_rms(grads, threshold), wanted, strict=True):
        torch.testing.assert_close(grad.float(), want, rtol=1e-6, atol=0)


def test_infinity_measures_only() -> None:
    norms = torch.ones(3, dtype=F64)
    for make in (ClipNorm, ClipTensorNorm, ClipBlockRMS, ClipValue):
        assert make(math.inf).limit(norms, EmptyState(), context(norms))[0] is None


def test_a_limit_of_zero_and_gradients_of_zero() -> None:
    """0 / 0 is no number, and no reason to clip."""
    for policy in (ClipNorm(0.0), ClipTensorNorm(0.0), ClipBlockRMS(0.0)):
        param = nn.Parameter(torch.ones(3))
        param.grad = torch.zeros(3)
        report = Clipper([param], policy).clip_()
        assert (report.coefficient, report.clipped) == (1, False)
        assert torch.equal(param.grad, torch.zeros(3))


def test_an_infinite_norm_without_a_limit_is_left_alone() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for param, value in zip(params, (math.inf, 100.0), strict=True):
        param.grad = torch.tensor([value, 1.0, -value])
    Clipper([("free", params[0]), ("bound", params[1])], AGC(exclude=("free",))).clip_()
    assert params[0].grad.tolist() == [math.inf, 1.0, -math.inf]


def test_zero_initialised_weights_still_learn() -> None:
    norms = torch.ones(3, dtype=F64)
    limit, _ = AGC(0.01, 1e-3).limit(norms, EmptyState(), context(norms, weight=0.0))
    torch.testing.assert_close(limit, torch.full_like(norms, 1e-5))
