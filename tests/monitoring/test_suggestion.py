"""Which policy a run's norms ask for, and what is said about what they cannot tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import distclip
from distclip.monitoring.records import Floats, HistoryError, Run, read_run
from distclip.monitoring.spikes import find_spikes, window_of
from distclip.monitoring.suggestion import Suggestion, suggest
from distclip.monitoring.suggestion.outcomes import (
    NUM_FIRST,
    WINDOW,
    facts_of,
    outcome,
    policies_for,
)
from distclip.monitoring.suggestion.replay import code_of, series_of
from distclip.policies import AutoClip, ClipNorm, ZClip
from tests.monitoring.made_runs import DRAWN, noise, series, with_spikes, write_history

SPIKES = (150, 333, 334, 480)
WARMUP = 1 + 20 * np.exp(-np.arange(600) / 10)


def suggestions(run: Run) -> list[Suggestion]:
    facts = [facts_of(each) for each in series_of(run)]
    return [suggest(run, each, policies_for(each)) for each in facts]


def suggestion(
    folder: Path, norms: Sequence[float] | Floats, limit: float = math.inf
) -> Suggestion:
    return suggestions(write_history(folder, [*norms], limit))[0]


def policy_of(found: Suggestion) -> object:
    assert found.recommendation.code is not None
    return eval(found.recommendation.code, {"distclip": distclip})


def test_spikes_are_far_above_the_norms_around_them() -> None:
    norms = with_spikes(noise(600) * np.linspace(10, 1, 600), SPIKES)
    assert np.flatnonzero(find_spikes(norms).found).tolist() == [*SPIKES]
    assert not find_spikes(noise(600, deviation=0.4)).found.any()
    assert not find_spikes(np.repeat([1.0, 9.0], 300)).found.any()  # a new level


def test_a_burst_is_spikes_and_a_level_that_stays_is_none() -> None:
    half = window_of(600) // 2
    assert find_spikes(with_spikes(noise(600), range(300, 300 + half))).found.sum() == half
    assert not find_spikes(with_spikes(noise(600), range(300, 600))).found.any()


def test_a_spike_is_at_least_three_times_the_usual_norm() -> None:
    quiet = with_spikes(np.ones(300), [150], factor=2.9)
    assert not find_spikes(quiet).found.any()
    assert find_spikes(with_spikes(np.ones(300), [150], factor=3.1)).found.any()
    assert not find_spikes(with_spikes(noise(300, deviation=0.7), [150], factor=10.0)).found.any()


@pytest.mark.parametrize("num", [1, 2, 10, 11, 15, 21])
def test_few_norms_have_no_spike_in_the_first_steps(num: int) -> None:
    assert not find_spikes(with_spikes(np.ones(num), [min(num, 10) - 1])).found.any()


@DRAWN
@given(st.integers(-60, 60), st.integers(1, 200))
def test_spikes_do_not_depend_on_the_scale(k: int, num: int) -> None:
    norms = with_spikes(noise(num), [num // 2])
    found = find_spikes(norms).found
    assert (find_spikes(norms * 2.0**k).found == found).all()


def test_steady_norms_with_spikes_ask_for_a_constant_limit(tmp_path: Path) -> None:
    norms = with_spikes(noise(600) * WARMUP, SPIKES)
    found = suggestion(tmp_path, norms)
    assert found.recommendation.kind == "constant"
    policy = policy_of(found)
    assert isinstance(policy, ClipNorm)
    ordinary = np.delete(norms, SPIKES)[60:]
    assert policy.max_norm == float(f"{policy.max_norm:.2g}")
    assert 0.98 < (ordinary <= policy.max_norm).mean() <= 1
    assert policy.max_norm < 1.6  # not above the warm-up's norms
    (outcome,) = [each for each in found.outcomes if each.code == found.recommendation.code]
    assert outcome.caught == found.spikes == [step + 1 for step in SPIKES]


def test_a_level_that_drifts_asks_for_a_limit_that_follows(tmp_path: Path) -> None:
    drift = np.linspace(3, 0.5, 600)
    found = suggestion(tmp_path, with_spikes(noise(600) * drift, SPIKES, 5.0))
    assert found.recommendation.kind == "adaptive"
    assert policy_of(found) == ZClip(max_norm=None)
    best = next(each for each in found.outcomes if each.code == found.recommendation.code)
    assert len(best.caught) == len(SPIKES)
    constant = found.outcomes[0]
    assert constant.code.startswith("distclip.ClipNorm")
    assert len(constant.caught) < len(SPIKES)


def test_autoclip_is_recommended_where_it_catches_more(tmp_path: Path) -> None:
    """ZClip's mean and deviation take hundreds of steps to forget huge norms of its warm-up."""
    norms = with_spikes(noise(600) * np.linspace(3, 0.5, 600), SPIKES)
    norms[:25] *= np.linspace(1e6, 1e3, 25)
    found = suggestion(tmp_path, norms)
    caught = {each.code: len(each.caught) for each in found.outcomes}
    assert caught[code_of(AutoClip(90.0))] > caught[code_of(ZClip(max_norm=None))]
    assert policy_of(found) == AutoClip(90.0)


def test_zclip_that_would_lag_behind_is_said(tmp_path: Path) -> None:
    """Its mean follows clipped norms only, and where these jump it clips every step for long."""
    level = np.append(np.ones(40), np.geomspace(400, 3, 560))  # AutoClip remembers the highest
    found = suggestion(tmp_path, with_spikes(noise(600, 0.05) * level, [500, 550], 5.0))
    assert policy_of(found) == ZClip(max_norm=None)
    assert "the level rose faster" in found.recommendation.reason
    steady = suggestion(tmp_path, with_spikes(noise(600) * np.linspace(3, 1, 600), SPIKES))
    assert "the level rose faster" not in steady.recommendation.reason


def test_no_spike_is_nothing_to_clip(tmp_path: Path) -> None:
    for norms in (noise(600) * WARMUP, noise(600) * np.linspace(5, 1, 600)):
        found = suggestion(tmp_path, norms)
        assert found.recommendation.kind == "nothing to clip"
        assert policy_of(found) == ClipNorm(math.inf)


@pytest.mark.parametrize("spikes", [(), SPIKES])
def test_a_run_that_was_clipped_hard_keeps_its_limit(tmp_path: Path, spikes: list[int]) -> None:
    found = suggestion(tmp_path, with_spikes(noise(600), spikes), limit=0.5)
    assert found.recommendation.kind == "keep the limit"
    assert policy_of(found) == ClipNorm(0.5)
    assert suggestion(tmp_path, noise(600), limit=1.2).recommendation.kind == "nothing to clip"


@pytest.mark.parametrize("growth", [np.linspace(0, 6, 600), 9 * np.linspace(0, 1, 600) ** 9])
def test_norms_that_grow_to_the_end_have_a_cause(tmp_path: Path, growth: Floats) -> None:
    found = suggestion(tmp_path, noise(600) * np.exp(growth))
    assert found.recommendation.kind == "fix the cause first"
    assert found.recommendation.code is None
    assert "at the end" in found.recommendation.reason


def test_norms_that_rise_while_the_learning_rate_falls_are_healthy(tmp_path: Path) -> None:
    rising = np.exp(np.linspace(0, math.log(20), 600))
    assert suggestion(tmp_path, noise(600) * rising).recommendation.kind == "nothing to clip"
    spiky = with_spikes(noise(600) * rising, SPIKES)
    assert suggestion(tmp_path, spiky).recommendation.kind == "adaptive"


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_limit_that_left_nothing_is_not_kept(tmp_path: Path, limit: float) -> None:
    found = suggestion(tmp_path, noise(200), limit=limit)
    assert found.recommendation.kind == "fix the cause first"
    assert found.recommendation.code is None
    assert "The limit was 0 or below" in found.recommendation.reason


def test_a_peak_that_is_over_is_no_growth(tmp_path: Path) -> None:
    peak = np.concatenate([np.ones(200), np.geomspace(1, 5000, 200), np.geomspace(5000, 500, 200)])
    assert suggestion(tmp_path, noise(600) * peak).recommendation.kind != "fix the cause first"


@pytest.mark.parametrize("rows", [range(580, 600), range(597, 600), range(100, 600, 50)])
def test_nan_has_a_cause(tmp_path: Path, rows: range) -> None:
    norms = with_spikes(noise(600), SPIKES)
    norms[[*rows]] = math.nan
    found = suggestion(tmp_path, norms)
    assert found.recommendation.kind == "fix the cause first"
    assert "NaN or infinite" in found.recommendation.reason
    assert f"before {rows[0] + 1}." in found.recommendation.reason


def test_what_a_grad_scaler_skips_is_no_cause(tmp_path: Path) -> None:
    norms = with_spikes(noise(600), SPIKES)
    norms[[*range(8), 400, 598, 599]] = math.inf
    found = suggestion(tmp_path, norms)
    assert found.recommendation.kind == "constant"
    assert any("11 steps had a norm that is NaN" in note for note in found.notes)


def test_fewer_than_a_hundred_steps_are_too_few(tmp_path: Path) -> None:
    found = suggestion(tmp_path, noise(99))
    assert found.recommendation.kind == "too few steps"
    assert policy_of(found) == ClipNorm(math.inf)
    assert suggestion(tmp_path, noise(100)).recommendation.kind == "nothing to clip"


def test_first_steps_are_told_apart() -> None:
    norms = np.where(np.arange(2000) < NUM_FIRST, 50.0, noise(2000))
    facts = facts_of(series(norms))
    assert facts.num_first == NUM_FIRST
    found = outcome(policies_for(facts)[0], facts)
    assert found.clipped_later == 0.01
    assert found.clipped == (NUM_FIRST + 19) / 2000
    assert found.smallest_coefficient < 0.03


def test_zeros_are_no_steps(tmp_path: Path) -> None:
    norms = noise(300)
    norms[::3] = 0.0
    found = suggestion(tmp_path, norms)
    assert found.num_steps == 200
    assert any("100 steps had a norm of 0" in note for note in found.notes)
    facts = facts_of(series(norms))
    assert [outcome(policies_for(facts)[0], facts).clipped_later] == [1 / 180]  # of 30 first


@pytest.mark.parametrize("norms", [[0.0] * 5, [math.nan] * 5, [math.inf, 0.0]])
def test_no_norm_at_all_is_an_error(norms: list[float]) -> None:
    with pytest.raises(HistoryError, match=r"no norm is finite and above 0 in . steps"):
        facts_of(series(norms))


def test_one_step_is_enough_to_be_replayed(tmp_path: Path) -> None:
    found = suggestion(tmp_path, [2.0])
    assert [each.code for each in found.outcomes[:2]] == [
        "distclip.AutoClip()",
        "distclip.AutoClip(90.0)",
    ]
    assert suggestion(tmp_path, [0.0] * 500 + [1.0]).num_steps == 1


def notes(run: Run) -> str:
    return " ".join(note for each in suggestions(run) for note in each.notes)


def test_notes_say_only_what_applies(tmp_path: Path) -> None:
    plain = notes(write_history(tmp_path, [*noise(200)]))
    assert plain.count(".") < 12
    assert "figures are for the norms of this run" in plain
    assert "The norm of every tensor was recorded in 0 of 200 steps" in plain
    for other in (
        "clipped 1",
        "lacks",
        "groups",
        "had a norm",
        "AutoClip was",
        "could not be read",
    ):
        assert other not in plain


def test_notes_on_the_run_that_was(tmp_path: Path) -> None:
    assert "clipped 19% of its steps itself" in notes(
        write_history(tmp_path, [*noise(200)], limit=1.15)
    )
    assert f"latest {WINDOW:,} norms" in notes(write_history(tmp_path, [*noise(WINDOW + 1)]))
    path = tmp_path / "history.jsonl"
    write_history(tmp_path, [*noise(200)])
    path.write_bytes(path.read_bytes() + b'{"step": 201, "tot')
    assert "1 line of the file could not be read" in notes(read_run(path))


def test_every_tenth_step_has_no_moving_averages(tmp_path: Path) -> None:
    norms = noise(200)
    tensors = {i: {"a": norm} for i, norm in enumerate(norms)}
    run = write_history(tmp_path, [*norms], every=10, tensors=tensors)
    (found,) = suggestions(run)
    assert not [each for each in found.outcomes if "ZClip" in each.code or "AdaGC" in each.code]
    assert any(each.code.startswith("distclip.ClipTensorNorm") for each in found.outcomes)
    assert "lacks 90% of the steps: ZClip and AdaGC" in notes(run)


def test_tensor_norms_in_each_step_are_replayed(tmp_path: Path) -> None:
    tensors = with_spikes(noise(600).reshape(200, 3), [150])
    rows = {i: dict(zip("abc", row, strict=True)) for i, row in enumerate(tensors)}
    run = write_history(tmp_path, [*np.linalg.norm(tensors, axis=1)], tensors=rows)
    (found,) = suggestions(run)
    codes = [each.code for each in found.outcomes]
    assert "distclip.AdaGC()" in codes
    limits = [float(code[24:-1]) for code in codes if "ClipTensorNorm" in code]
    largest = tensors[20:].max(axis=1)
    assert [(largest > limit).sum() for limit in limits] == [1, 9, 18]
    assert "ClipTensorNorm" not in notes(run)
    assert "2-norm" not in notes(run)
    rows_of_another = {i: {name: 3 * x for name, x in row.items()} for i, row in rows.items()}
    other = write_history(tmp_path, [*np.linalg.norm(tensors, axis=1)], tensors=rows_of_another)
    assert "is not the 2-norm of all tensors" in notes(other)


def test_each_group_has_a_suggestion(tmp_path: Path) -> None:
    body, head = with_spikes(noise(600), SPIKES), noise(600, seed=1)
    total = np.hypot(body, head)
    run = write_history(tmp_path, [*total], groups={"body": body, "head": head})
    found = suggestions(run)
    kinds = {each.group: each.recommendation.kind for each in found}
    assert kinds == {"body": "constant", "head": "nothing to clip"}
    assert all("2 parameter groups" in " ".join(each.notes) for each in found)
