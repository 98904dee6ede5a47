"""Each policy by itself: its limits against the reference, its state, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distclip import Clipper
from distclip.policies import (
    AGC,
    AdaGC,
    AutoClip,
    ClipBlockRMS,
    ClipNorm,
    ClipTensorNorm,
    ClipValue,
    EmptyState,
    Minimum,
    NormContext,
    Policy,
    Scope,
    ZClip,
)
from tests.support import reference
from tests.test_api import recorded, tensors

F64 = torch.float64
CLOSE = {"rtol": 1e-12, "atol": 0.0}  # float64 sums in another order

POLICIES: dict[str, Policy[Any]] = {
    "norm": ClipNorm(1.0),
    "norm, p = 1": ClipNorm(1.0, 1.0),
    "tensor norm": ClipTensorNorm(1.0),
    "block RMS": ClipBlockRMS(0.1),
    "value": ClipValue(0.5),
    "AGC": AGC(),
    "AutoClip": AutoClip(history=7),
    "ZClip": ZClip(warmup_steps=4),
    "AdaGC": AdaGC(warmup_steps=4),
    "both": ClipNorm(3.0) & AutoClip(50.0, history=5) & ZClip(warmup_steps=3),
    "both, tensors": ClipTensorNorm(2.0) & AdaGC(warmup_steps=3),
}


def leaves(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [leaf for part in state for leaf in leaves(part)]


def about(norms: Tensor, size: float = 12.0, weight: float = 0.3) -> NormContext:
    total = torch.linalg.vector_norm(norms)
    return NormContext(torch.full_like(norms, size), torch.full_like(norms, weight), total)


def shape_of(policy: Policy[Any], num_groups: int = 3) -> tuple[int, ...]:
    return (num_groups,) if policy.scope in (Scope.TENSOR, Scope.UNIT) else ()


def play(policy: Policy[Any], steps: Sequence[Any]) -> Tensor:
    """What is left of the norms of each step."""
    state, clipped = policy.init(torch.tensor(steps[0]).numel(), torch.device("cpu")), []
    for step in steps:
        norms = torch.tensor(step, dtype=F64)
        limit, state = policy.limit(norms, state, about(norms))
        clipped.append(norms if limit is None else torch.minimum(norms, limit))
    return torch.stack(clipped)


def wild(num_steps: int, seed: int, shape: tuple[int, ...] = ()) -> list[Any]:
    """Norms around 1, with spikes."""
    generator = torch.Generator().manual_seed(seed)
    norms = torch.randn(num_steps, *shape, generator=generator, dtype=F64).mul(0.4).exp()
    spikes = torch.rand(norms.shape, generator=generator) < 0.08
    return torch.where(spikes, norms * 20, norms).tolist()


def as_expected(policy: Policy[Any], steps: list[Any], expected: Any) -> None:
    expected = torch.as_tensor(expected, dtype=F64)
    assert (expected < torch.tensor(steps, dtype=F64)).any()
    torch.testing.assert_close(play(policy, steps), expected, **CLOSE)


@pytest.mark.parametrize("history", [1, 7, 1000])
@pytest.mark.parametrize("percentile", [0.0, 10.0, 50.0, 97.3, 100.0])
def test_autoclip_is_the_percentile_of_the_past(percentile: float, history: int) -> None:
    steps = wild(60, seed=history)
    expected = reference.autoclip(steps, percentile, history)
    assert (expected != steps) == (history > 1 and percentile < 100)
    torch.testing.assert_close(play(AutoClip(percentile, history), steps), torch.tensor(expected, dtype=F64), **CLOSE)


@pytest.mark.parametrize(
    ("z_thresh", "alpha", "warmup_steps", "max_norm"),
    [(2.5, 0.97, 25, 1.0), (2.5, 0.97, 25, math.inf), (1.0, 0.5, 3, 4.0), (0.0, 0.9, 2, math.inf), (2.0, 1.0, 9, 2.0)],
)
def test_zclip_pulls_spikes_back(z_thresh: float, alpha: float, warmup_steps: int, max_norm: float) -> None:
    for seed in range(4):
        steps = wild(90, seed)
        policy = ZClip(z_thresh, alpha, warmup_steps, max_norm)
        as_expected(policy, steps, reference.zclip(steps, z_thresh, alpha, warmup_steps, max_norm))


@pytest.mark.parametrize(
    ("ratio", "max_norm", "beta", "warmup_steps"),
    [(1.05, 1.0, 0.98, 10), (1.05, math.inf, 0.98, 10), (2.0, 0.1, 0.5, 1), (0.9, 1.0, 0.0, 5), (1.0, 1.0, 1.0, 5)],
)
def test_adagc_clips_each_tensor_to_its_past(ratio: float, max_norm: float, beta: float, warmup_steps: int) -> None:
    for seed in range(4):
        steps = wild(60, seed, (4,))
        steps = [[n if (t + i * i) % 5 else 0.0 for i, n in enumerate(norms)] for t, norms in enumerate(steps)]
        for t in range(20):
            steps[t][3] = 0.0  # no gradient before the warm-up ends
        expected = reference.adagc(steps, ratio, max_norm, beta, warmup_steps)
        as_expected(AdaGC(ratio, max_norm, beta, warmup_steps), steps, expected)


# By hand, from the formulas in the docstrings.
BY_HAND: dict[str, tuple[Policy[Any], list[Any], list[Any]]] = {
    # the medians of [4], [4, 2], [4, 2, 9] and, with the oldest gone, [2, 9, 1]
    "AutoClip": (AutoClip(50.0, history=3), [4.0, 2.0, 9.0, 1.0], [4.0, 2.0, 4.0, 1.0]),
    # mean 2, deviation 1; 7 lies 5 deviations above: 2 + 2.5**2 / 5 = 3.25; mean 2.625, variance .5 + .5 * .625**2
    "ZClip": (
        ZClip(2.5, 0.5, 2, math.inf),
        [1.0, 3.0, 7.0, 12.625],
        [1.0, 3.0, 3.25, 2.625 + 2.5**2 * (0.5 + 0.5 * 0.625**2) / 10],
    ),
    # both scaled by 1/5 to 0.6 and 0.8; then limits of twice that; γ .5 * .6 + .5 * 1.2 = .9 and .5 * .8 + .5 * .2 = .5
    "AdaGC": (AdaGC(2.0, 1.0, 0.5, 1), [[3.0, 4.0], [3.0, 0.2], [3.0, 3.0]], [[0.6, 0.8], [1.2, 0.2], [1.8, 1.0]]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_numbers_by_hand(name: str) -> None:
    policy, steps, expected = BY_HAND[name]
    as_expected(policy, steps, expected)


def unit_norms(tensor: Tensor, unit_dim: int) -> Tensor:
    return reference.units(tensor, unit_dim).norm(dim=1)


def case_name(case: dict) -> str:
    return f"{case['kind']}-{case['args']}"


@pytest.mark.parametrize("case", [*recorded("agc_torch_layout"), *recorded("agc_optax_layout")], ids=case_name)
def test_agc_as_timm_and_optax_recorded_it(case: dict) -> None:
    unit_dim = -1 if case["kind"] == "agc_optax_layout" else 0
    clip_factor, given_ = case["args"]["clipping"], tensors(case["inputs"])
    half = len(given_) // 2
    policy = AGC(clip_factor, case["args"]["eps"], unit_dim=unit_dim)
    for weight, grad, want in zip(given_[:half], given_[half:], tensors(case["outputs"]), strict=True):
        norms, weights = unit_norms(grad, unit_dim), unit_norms(weight, unit_dim)
        limit, _ = policy.limit(norms, EmptyState(), NormContext(norms, weights, norms.norm()))
        torch.testing.assert_close(torch.minimum(norms, limit), unit_norms(want, unit_dim), rtol=1e-6, atol=0)
        (expected,) = reference.agc([weight], [grad], clip_factor, case["args"]["eps"], unit_dim)
        torch.testing.assert_close(expected.float(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", recorded("clip_by_block_rms"), ids=lambda case: str(case["args"]))
def test_block_rms_as_optax_recorded_it(case: dict) -> None:
    threshold, grads, wanted = case["args"]["threshold"], tensors(case["inputs"]), tensors(case["outputs"])
    norms = torch.stack([g.double().norm() for g in grads])
    sizes = torch.tensor([float(g.numel()) for g in grads], dtype=F64)
    limit, _ = ClipBlockRMS(threshold).limit(norms, EmptyState(), NormContext(sizes, None, norms.norm()))
    left = torch.stack([want.double().norm() for want in wanted])
    torch.testing.assert_close(torch.minimum(norms, limit), left, rtol=1e-6, atol=0)
    for grad, want in zip(reference.clip_block_rms(grads, threshold), wanted, strict=True):
        torch.testing.assert_close(grad.float(), want, rtol=1e-6, atol=0)


def test_the_smaller_of_two_limits() -> None:
    norms = torch.tensor(8.0, dtype=F64)
    for policy, expected in (
        (ClipNorm(3.0) & ClipNorm(2.0), 2.0),
        (ClipNorm(2.0) & ClipNorm(3.0) & ClipNorm(5.0), 2.0),
        (ClipNorm(math.inf) & ClipNorm(3.0), 3.0),
        (ClipNorm(3.0) & ClipNorm(math.inf), 3.0),
    ):
        limit, _ = policy.limit(norms, policy.init(1, norms.device), about(norms))
        assert limit == expected
    assert (ClipNorm(math.inf) & ClipNorm(math.inf)).limit(norms, policy.init(1, norms.device), about(norms))[0] is None
    assert (AGC() & AGC(0.1)).needs_weights
    assert not (ClipNorm(1.0) & ZClip()).needs_weights
    steps = wild(40, seed=3)
    first, second = AutoClip(80.0), ZClip(0.3, 0.8, 5, math.inf)
    both, one, other = (play(p, steps) for p in (first & second, first, second))
    assert (one < other).any()
    assert (other < one).any()
    assert torch.equal(both, torch.minimum(one, other))


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_pure_and_its_state_keeps_its_form(name: str) -> None:
    policy = POLICIES[name]
    assert dataclasses.is_dataclass(policy)
    assert policy == dataclasses.replace(policy)  # type: ignore[type-var]
    assert hash(policy) == hash(dataclasses.replace(policy))  # type: ignore[type-var]
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.clip_factor = 1.0  # type: ignore[attr-defined]
    state = policy.init(3, torch.device("cpu"))
    for step in wild(12, 1, shape_of(policy)):
        norms = torch.tensor(step, dtype=F64)
        before = [leaf.clone() for leaf in leaves(state)]
        limit, after = policy.limit(norms, state, about(norms))
        again, _ = policy.limit(norms.clone(), state, about(norms))
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
    """A fake tensor has no values: `.item()`, `bool()` and an index of a tensor raise; so does another device."""
    policy = POLICIES[name]
    with FakeTensorMode():
        state = policy.init(3, torch.device("cuda"))
        norms = torch.ones(shape_of(policy), dtype=F64, device="cuda")
        for _ in range(2):
            limit, state = policy.limit(norms, state, about(norms))
            assert limit is not None
            assert {leaf.device.type for leaf in [limit, *leaves(state)]} == {"cuda"}


FINITE = st.floats(0, 1e38) | st.sampled_from([0.0, 1e-45, 1e-30, 1.0, 1e30])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(steps=st.lists(st.lists(FINITE, min_size=3, max_size=3), min_size=1, max_size=15))
def test_finite_norms_give_limits_that_are_numbers_and_never_negative(steps: list[list[float]]) -> None:
    for name, policy in POLICIES.items():
        shape = shape_of(policy)
        left = play(policy, [step if shape else step[0] for step in steps])
        assert (left >= 0).all(), name  # NaN would fail, too
        assert left.isfinite().all(), name


@pytest.mark.parametrize(
    "policy", [AutoClip(30.0, 9), ZClip(1.0, 0.8, 5, math.inf), AdaGC(1.05, math.inf, 0.9, 5)], ids=repr
)
def test_the_scale_of_the_loss_does_not_matter(policy: Policy[Any]) -> None:
    steps = torch.tensor(wild(50, seed=2, shape=shape_of(policy)), dtype=F64)
    clipped = play(policy, steps.tolist())
    assert (clipped < steps).any()
    for power in (-90, 60):
        torch.testing.assert_close(play(policy, (steps * 2.0**power).tolist()), clipped * 2.0**power, rtol=0, atol=0)


def test_infinity_measures_only() -> None:
    norms = torch.ones(3, dtype=F64)
    for policy in (ClipNorm(math.inf), ClipTensorNorm(math.inf), ClipBlockRMS(math.inf), ClipValue(math.inf)):
        assert policy.limit(norms, EmptyState(), about(norms))[0] is None


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
    limit, _ = AGC(0.01, 1e-3).limit(norms, EmptyState(), about(norms, weight=0.0))
    torch.testing.assert_close(limit, torch.full_like(norms, 1e-5))


def test_a_tensor_without_a_gradient_for_a_while_still_learns_under_adagc() -> None:
    steps = [[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    assert (play(AdaGC(warmup_steps=1), steps)[[1, 2, 4], 1] > 0.5).all()
    assert (play(AdaGC(warmup_steps=3), steps)[[1, 2, 4], 1] > 0.5).all()


def test_a_spike_is_measured_by_what_was_before_it() -> None:
    calm = [1.0, 1.1, 0.9, 1.0, 1.1, 0.9]
    once, twice = (play(ZClip(2.5, 0.9, 6, math.inf), [*calm, spike])[-1] for spike in (1e3, 1e6))
    assert 1.0 < twice < once < 1.3


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
    "two scopes": (lambda: ClipNorm(1.0) & ClipTensorNorm(1.0), r"scope is Scope\.MODEL and Scope\.TENSOR"),
    "two norms": (lambda: ClipNorm(1.0) & ClipNorm(1.0, 1.0), r"norm_type is 2\.0 and 1\.0"),
    "two units": (lambda: AGC() & AGC(unit_dim=-1), "unit_dim is 0 and -1"),
    "two excludes": (lambda: AGC(exclude=("head",)) & AGC(), r"exclude is \('head',\) and \(\)"),
    "two clamps": (lambda: ClipValue(1.0) & ClipValue(2.0), "the smaller clip_value"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_at_construction(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert len(str(caught.value).split()) > 20  # attempted, found, why, what to do


def test_the_edges_of_the_ranges_are_allowed() -> None:
    head = nn.Linear(2, 2)
    assert AGC(0.0, 0.0, exclude=["head", head]).exclude == ("head", head)  # type: ignore[arg-type]
    assert isinstance(ClipNorm(0.0) & AutoClip(0.0, 1) & AutoClip(100.0) & ZClip(0.0, 0.0, 1, math.inf), Minimum)
    assert isinstance(AdaGC(0.0, math.inf, 1.0, 1) & ClipTensorNorm(0.0), Minimum)
