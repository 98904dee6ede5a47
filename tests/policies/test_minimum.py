"""`a & b`: the smaller of two limits for the same norms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distclip.policies import (
    AGC,
    AGGC,
    AdaGC,
    AdaGN,
    AutoClip,
    ClipNorm,
    ClipTensorNorm,
    ClipValue,
    Minimum,
    Policy,
    SkipSpike,
    ZClip,
    raises,
)
from tests.policies.steps import F64, clipped_norms, context, spiky_norms


def limit_of_8(policy: Policy) -> Tensor | None:
    norm = torch.tensor(8.0, dtype=F64)
    limit, _ = policy.limit(norm, policy.init(1, norm.device), context(norm))
    return limit


def test_the_smaller_limit_is_taken() -> None:
    assert limit_of_8(ClipNorm(3.0) & ClipNorm(2.0)) == 2.0
    assert limit_of_8(ClipNorm(2.0) & ClipNorm(3.0) & ClipNorm(5.0)) == 2.0


def test_a_policy_that_only_measures_leaves_the_other_limit() -> None:
    assert limit_of_8(ClipNorm(math.inf) & ClipNorm(3.0)) == 3.0
    assert limit_of_8(ClipNorm(3.0) & ClipNorm(math.inf)) == 3.0
    assert limit_of_8(ClipNorm(math.inf) & ClipNorm(math.inf)) is None


def test_the_members_are_those_of_both() -> None:
    assert (AGC() & AGC(0.1)).needs_weights
    assert not (ClipNorm(1.0) & ZClip()).needs_weights
    policy = AGC(exclude=("head",), unit_dim=-1) & AGC(0.1, exclude=("head",), unit_dim=-1)
    assert (policy.exclude, policy.unit_dim, policy.scope) == (("head",), -1, AGC().scope)


def test_each_keeps_its_own_statistics() -> None:
    steps = spiky_norms(40, seed=3)
    first, second = AutoClip(80.0), ZClip(0.3, 0.8, 5, math.inf)
    both, one, other = (clipped_norms(p, steps) for p in (first & second, first, second))
    assert (one < other).any()
    assert (other < one).any()
    assert torch.equal(both, torch.minimum(one, other))


MISMATCHES: dict[str, tuple[Callable[[], object], str]] = {
    "scopes": (
        lambda: ClipNorm(1.0) & ClipTensorNorm(1.0),
        r"scope is Scope\.MODEL and Scope\.TENSOR",
    ),
    "norms": (lambda: ClipNorm(1.0) & ClipNorm(1.0, 1.0), r"norm_type is 2\.0 and 1\.0"),
    "units": (lambda: AGC() & AGC(unit_dim=-1), "unit_dim is 0 and -1"),
    "excludes": (lambda: AGC(exclude=("head",)) & AGC(), r"exclude is \('head',\) and \(\)"),
    "clamps": (lambda: ClipValue(1.0) & ClipValue(2.0), "the smaller clip_value"),
    "raises": (
        lambda: ClipTensorNorm(1.0) & AdaGN(),
        r": AdaGN\([^)]*\) says .*raises them.*is neither",
    ),
    "raises first": (lambda: AGGC() & ClipNorm(1.0), r": AGGC\([^)]*\) says .*raises them"),
    "both raise": (lambda: AdaGN() & AdaGN(), r": AdaGN\([^)]*\) says .*raises them"),
    "raises in a chain": (
        lambda: SkipSpike() & ClipNorm(1.0) & AGGC(),
        r": AGGC\([^)]*\) says .*raises them",
    ),
    "raises in a pair": (
        lambda: SkipSpike() & AGGC() & ClipNorm(1.0),
        r": Minimum\([^:]*AGGC\([^)]*\)\) says",
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_limits_for_different_norms_are_refused(name: str) -> None:
    call, message = MISMATCHES[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert len(str(caught.value).split()) > 20  # attempted, found, why, what to do


@pytest.mark.parametrize("other", [None, 2.0, ClipNorm])
def test_only_policies_combine(other: object) -> None:
    with pytest.raises(TypeError, match=r"cannot clip with the policy .*distclip\.PolicyBase"):
        ClipNorm(1.0) & other  # type: ignore[operator]


def test_policies_of_one_scope_combine() -> None:
    zclip = ZClip(0.0, 0.0, 1, math.inf)
    assert isinstance(ClipNorm(0.0) & AutoClip(0.0, 1) & AutoClip(100.0) & zclip, Minimum)
    assert isinstance(AdaGC(0.0, math.inf, 1.0, 1) & ClipTensorNorm(0.0), Minimum)


def test_what_only_leaves_out_steps_combines_with_a_policy_that_raises() -> None:
    for policy in (SkipSpike() & AGGC(), AGGC() & SkipSpike(), SkipSpike() & SkipSpike() & AGGC()):
        assert raises(policy)
        steps = spiky_norms(40, seed=3)
        raised = clipped_norms(policy, steps)
        assert (raised > torch.tensor(steps, dtype=F64)).any()
        assert torch.equal(raised, clipped_norms(AGGC(), steps))
    assert not raises(SkipSpike() & ClipNorm(1.0))
