"""Faults in the gradients of one rank: all ranks do the same, and what the oracle says."""

from __future__ import annotations

import dataclasses
import math
import random
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from distclip import AGC, AGGC, AdaGC, AdaGN, AutoClip, ClipTensorNorm, SkipSpike, ZClip
from tests.faults import oracle, play
from tests.faults.cases import (
    NUM_NUMBERS,
    PAIRS,
    PLAIN,
    POLICIES,
    ROWS,
    case_of,
    num_possible,
    numbered,
    sample,
    why_impossible,
)
from tests.faults.judge import odd_groups
from tests.faults.plain import Norms, plain
from tests.faults.records import Record
from tests.faults.run import findings, summary
from tests.policies.steps import spiky_norms
from tests.support import reference
from tests.support.ranks import RankError, Ranks

NUM_CASES, SEED = 300, 0
SHAPES = [torch.Size(shape) for shape in ((3, 4), (5,), (), (2, 3, 2))]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sample_of_the_matrix(four_on_cpus: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    """`make test-trust` plays 20,000."""
    found = list(findings(sample(NUM_CASES, SEED), four_on_cpus))
    four_on_cpus.run(play.forget)
    with capsys.disabled():
        print(f"\n{summary(NUM_CASES, found)}")
    assert not found, "\n".join(each.text for each in found)


def test_one_collective_too_many_is_found() -> None:
    records = [
        Record(collectives={"all": 3, name: 2 + (rank == 3)}) for rank, name in enumerate("aabb")
    ]
    assert odd_groups(records[:3]) == {}
    assert odd_groups(records) == {"b": [2, 3]}


def one_rank_cannot_play() -> None:
    if dist.get_rank() == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(play, "OTHERS_WAIT", timedelta(milliseconds=100))
            patch.delitem(POLICIES, "ClipValue")
            some = (PLAIN, "ClipValue")  # which takes no collective before it fails
            play.play(next(case for case in sample(1000, 0) if case[1:3] == some))


def test_what_one_rank_raises_is_said(four_on_cpus: Ranks) -> None:
    """The others wait for it, and its next cases would not be theirs."""
    with pytest.raises(RankError, match=r"--- rank 1 ---(.|\n)*KeyError: 'ClipValue'"):
        four_on_cpus.run(one_rank_cannot_play)


def test_cases_have_numbers() -> None:
    drawn = random.Random(1)
    for number in (0, NUM_NUMBERS - 1, *(drawn.randrange(NUM_NUMBERS) for _ in range(100))):
        case = case_of(number)
        assert case.number == number
        assert numbered(case._replace(number=0)) == case


def test_the_sample_has_every_row() -> None:
    some = list(sample(NUM_CASES, SEED))
    assert some == list(sample(NUM_CASES, SEED))
    assert some != list(sample(NUM_CASES, SEED + 1))
    assert len({case.number for case in some}) == NUM_CASES < num_possible() < NUM_NUMBERS
    assert not any(map(why_impossible, some))
    for name, row in ROWS.items():
        assert {getattr(case, name) for case in some} == set(row), name
    assert len({(case.layout, case.policy) for case in some}) == NUM_CASES
    some = list(sample(len(PAIRS), SEED))
    assert {(case.layout, case.policy) for case in some} == set(PAIRS)


def draw(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).double() for shape in SHAPES]


@pytest.mark.parametrize("name", POLICIES)
def test_the_oracle_is_the_reference(name: str) -> None:
    """In three steps; the factors of the oracle give what the reference writes."""
    policy, past = POLICIES[name], oracle.no_past()
    groups = oracle.groups_of(policy, SHAPES)
    for step in range(3):
        weights, grads = draw(10 + step), [10 * step * g + g for g in draw(step)]
        verdict = oracle.judge(policy, grads, weights, past)
        assert verdict.finite
        assert not verdict.vetoed
        flat = torch.cat([g.flatten() for g in grads]) * verdict.factors[groups]
        if verdict.bound is not None:
            flat = flat.clamp(-verdict.bound, verdict.bound)
        right = by_reference(policy, grads, weights, past)
        if right is not None:
            torch.testing.assert_close(flat, torch.cat([r.flatten() for r in right]))
        oracle.remember(verdict, grads, past)
    assert len(past.totals) == 3
    if _scales(policy):
        assert verdict.bound is not None or (verdict.factors != 1).any()  # it does clip


@pytest.mark.parametrize("policy", [AdaGN(), AGGC(), AGGC(0.7, 1.3, 0.5, 0.1, 3.0, 1.0, 1.1, 5, 9)])
def test_the_oracle_is_that_of_the_state_machine(policy: Any) -> None:
    """Two definitions that know nothing of each other."""
    second, norms = (
        plain(policy),
        [norm if t % 7 else 0.0 for t, norm in enumerate(spiky_norms(60, 0))],
    )
    if isinstance(policy, AdaGN):
        first = reference.adagn([[n] for n in norms], policy.gamma1, policy.gamma2, policy.eps)
        first = first.flatten().tolist()
    else:
        *settings, low, high, begin, steps = dataclasses.astuple(policy)
        first = reference.aggc(norms, *settings, (low, high, begin, steps))
    for norm, right in zip(norms, first, strict=True):
        seen = Norms(["w"], [norm], [1], [0.0], norm)
        (found,) = second.limits(seen) or []
        assert found == pytest.approx(right, rel=1e-12) or norm == 0
        second.count(seen)


def _scales(policy: Any) -> bool:
    return not isinstance(policy, SkipSpike)


def by_reference(policy, grads, weights, past) -> list[torch.Tensor] | None:
    """None where the reference has norms alone."""
    kind = type(policy).__name__
    if isinstance(policy, AGC):
        norm_type = policy.norm_type
        return reference.agc(weights, grads, policy.clip_factor, policy.eps, 0, norm_type)
    if isinstance(policy, AdaGC | AdaGN | AGGC | AutoClip | ZClip) or kind in (
        "SkipSpike",
        "Minimum",
    ):
        return None
    if isinstance(policy, ClipTensorNorm):
        return reference.clip_tensor_norm(grads, policy.max_norm, policy.norm_type)
    if kind == "ClipBlockRMS":
        return reference.clip_block_rms(grads, policy.threshold)
    if kind == "ClipValue":
        return reference.clip_value(grads, policy.clip_value)
    return reference.clip_norm(grads, policy.max_norm, policy.norm_type)


def test_the_oracle_at_what_is_not_finite() -> None:
    grads, weights = draw(0), draw(1)
    for value in (math.nan, math.inf):
        grads[1][2] = value
        for name, policy in POLICIES.items():
            with np.errstate(invalid="ignore"):
                verdict = oracle.judge(policy, grads, weights, oracle.no_past())
            assert not verdict.finite, name
            assert not verdict.vetoed
            of_the_element = verdict.factors[oracle.groups_of(policy, SHAPES)[12 + 2]].item()
            if math.isnan(value) and _scales(policy) and verdict.bound is None:
                assert math.isnan(of_the_element), name
