"""The method of the benchmarks: only right answers are timed, all in turn, ratios of one run."""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import report, timing
from benchmarks.baselines import CLIPPER, IN_ONE_PROCESS, TORCH, torch_clip
from benchmarks.goals import AtMost, Goal
from benchmarks.gradients import (
    AfterBackward,
    Gradients,
    float64_norm,
    random_gradients,
    worst_element,
)
from benchmarks.timing import STATES, Baseline, Row, in_turn, measure, ratio
from tests.support import reference

CLIPPING = STATES["clipping"]
Wrong = Callable[[list[Tensor], Tensor], Any]


@pytest.fixture
def work() -> Gradients:
    return random_gradients([(30, 20), (7,)], torch.float32)


# What is timed is right ---------------------------------------------------------------------------


def norm_too_large(values: list[Tensor], norm: Tensor) -> Tensor:
    return norm * 1.02


def one_tensor_forgotten(values: list[Tensor], norm: Tensor) -> Tensor:
    values[-1].mul_(3)
    return norm


def one_element_off(values: list[Tensor], norm: Tensor) -> Tensor:
    values[0].view(-1)[5] *= 1.05
    return norm


def nan_norm(values: list[Tensor], norm: Tensor) -> Tensor:
    return norm * math.nan


def one_nan_left(values: list[Tensor], norm: Tensor) -> Tensor:
    values[0].view(-1)[5] = math.nan
    return norm


def torch_and(wrong: Wrong, work: Gradients, limit: float) -> Callable[[], Any]:
    """torch's clip with something wrong after it."""
    clip = torch_clip(work, limit)
    return lambda: wrong(work.values, clip())


WRONG = [norm_too_large, one_tensor_forgotten, one_element_off, nan_norm, one_nan_left]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("state", STATES)
def test_a_baseline_that_is_wrong_has_no_speed(work: Gradients, wrong: Wrong, state: str) -> None:
    both = [Baseline(TORCH, torch_clip), Baseline("wrong", partial(torch_and, wrong))]
    good, bad = measure("case", state, work, both, STATES[state], rounds=2)
    assert (len(good.seconds), good.note) == (2, "")
    assert not bad.seconds
    assert bad.note.startswith("WRONG: ")
    assert report.record(bad, [good, bad])["times_torch_p50"] == ""


def test_distclip_is_held_to_one_ulp_and_others_are_not(work: Gradients) -> None:
    """A norm that is off by 1e-6 is a right answer of torch's, and a wrong one of distclip's."""
    strict = {b.tolerance for b in IN_ONE_PROCESS if b.name.startswith("distclip")}
    assert strict == {1.2e-7}

    def off(work: Gradients, limit: float) -> Callable[[], Any]:
        return lambda: work.norm * (1 + 1e-6)

    both = [Baseline("others", off), Baseline(CLIPPER, off, strict.pop())]
    theirs, ours = measure("case", "not clipping", work, both, 10.0, rounds=1)
    assert theirs.seconds
    assert not ours.seconds


def test_a_baseline_that_is_right_only_once_has_no_speed(work: Gradients) -> None:
    """One that remembers the coefficient of its first call."""

    def start(work: Gradients, limit: float) -> Callable[[], Any]:
        first = iter([torch_clip(work, limit)])

        def run() -> Tensor | float:
            clip = next(first, None)
            return work.norm if clip is None else clip()

        return run

    (row,) = measure("case", "clipping", work, [Baseline("once", start)], CLIPPING, rounds=2)
    assert not row.seconds
    assert row.note.startswith("WRONG: ")


def test_a_baseline_that_cannot_run_is_a_row_that_says_why(work: Gradients) -> None:
    def start(work: Gradients, limit: float) -> Callable[[], Any]:
        raise ImportError("No module named 'peer'")

    peer = Baseline("peer", start, needs="a GPU")
    (row,) = measure("case", "clipping", work, [peer], CLIPPING, rounds=1)
    assert row.note == "does not run: needs a GPU (ImportError: No module named 'peer')"


@pytest.mark.parametrize(
    "theirs", [("", 0.5, 0.0), ("", 0.0, math.nan), ("RuntimeError: there", 0.0, 0.0)]
)
def test_what_is_wrong_on_another_rank_is_wrong(
    work: Gradients, monkeypatch: pytest.MonkeyPatch, theirs: tuple[str, float, float]
) -> None:
    monkeypatch.setattr(timing, "gather", lambda mine: [mine, theirs] if mine else [mine])
    (row,) = measure("case", "clipping", work, [Baseline(TORCH, torch_clip)], CLIPPING, 1)
    assert row.note
    assert not row.seconds


def test_the_error_of_an_element() -> None:
    was = torch.tensor([1.0, -2.0, 0.0])
    assert worst_element(was * 0.25, was, 0.25) == 0
    off = worst_element(torch.tensor([0.25, -0.51, 0.0]), was, 0.25)
    assert off == pytest.approx(0.02, rel=1e-5)
    assert worst_element(torch.tensor([0.25, -0.5, 1.0]), was, 0.25) > 1e30
    assert math.isnan(worst_element(torch.tensor([0.25, math.nan, 0.0]), was, 0.25))
    assert worst_element(was, was, 1.0) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_the_oracles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gradients.CHUNK", 64)
    values = random_gradients([(30, 20), (7,), ()], dtype).values
    right = reference.total_norm(values).item()
    assert float64_norm(values) == pytest.approx(right, rel=1e-13)


# What is timed, and how it is counted -------------------------------------------------------------


def test_every_round_clips_the_same_gradients(work: Gradients) -> None:
    norms: list[float] = []

    def start(work: Gradients, limit: float) -> Callable[[], Any]:
        clip = torch_clip(work, limit)

        def run() -> Tensor:
            norms.append(float64_norm(work.values))
            return clip()

        return run

    both = [Baseline("first", start), Baseline("second", start)]
    measure("case", "clipping", work, both, CLIPPING, rounds=3)
    assert len(norms) == 2 * (3 + 2 + 2)  # two rounds to warm up; checked before and after
    assert norms == pytest.approx([work.norm] * len(norms), rel=1e-12)


def test_gradients_after_backward_are_made_anew() -> None:
    made = random_gradients([(10,), (2, 3)], torch.float32)
    work = AfterBackward(made.params, made.values, made.norm)
    for clipping in (False, True):
        before = [param.grad for param in work.params]
        work.prepare(clipping)
        assert all(p.grad is not was for p, was in zip(work.params, before, strict=True))
        assert work.errors(work.norm, 2 * work.norm) == (0, 0)
        torch._foreach_mul_([param.grad for param in work.params], 0.5)
        assert work.errors(work.norm, 2 * work.norm) == (0, 0.5)


def test_all_run_in_every_round_in_changing_order_and_the_slowest_rank_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []
    other = {name: [500.0] * 21 + [-1.0] for name in "abc"}
    monkeypatch.setattr(timing, "gather", lambda mine: [mine, other])
    clock = partial(next, iter(map(float, range(0, 10_000, 1))))
    prepare = partial(called.append, "|")
    timers = {name: timeit.Timer(partial(called.append, name), prepare, clock) for name in "abc"}
    taken = in_turn(timers, 20)
    turns = "".join(called).split("|")[1:]
    rounds = ["".join(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert len(rounds) == 22
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert len(set(rounds)) > 3
    assert taken == {name: [500.0] * 19 + [1.0] for name in "abc"}


def test_the_ratio_is_that_of_the_medians_between_quantiles_of_the_rounds() -> None:
    theirs = Row("case", "clipping", TORCH, [2.0, 4.0, 6.0])
    ours = Row("case", "clipping", CLIPPER, [1.0, 1.0, 2.0])
    found = ratio(theirs, ours)
    assert found is not None
    assert (found.p50, found.p20, found.p80) == pytest.approx((4.0, 2.4, 3.6))
    assert ratio(theirs, Row("case", "clipping", CLIPPER)) is None


@pytest.mark.parametrize(
    ("goal", "found", "verdict"),
    [
        (Goal("case", "clipping", 4.0), "4 (2.4 to 3.6)", "reached"),
        (Goal("case", "clipping", 4.1), "4 (2.4 to 3.6)", "not reached"),
        (Goal("case", "clipping", within=0.25), "0.25 (0.283 to 0.433)", "reached"),
        (Goal("case", "clipping", within=0.24), "0.25 (0.283 to 0.433)", "not reached"),
        (Goal("case", "not clipping", 1.0), "-", "not measured"),
        (AtMost("case", "clipping", CLIPPER, 1000), "1e+03 (1e+03 to 1.6e+03) ms", "reached"),
        (
            AtMost("case", "clipping", CLIPPER, 999),
            "1e+03 (1e+03 to 1.6e+03) ms",
            "not reached",
        ),
        (AtMost("case", "not clipping", CLIPPER, 1.0), "-", "not measured"),
    ],
)
def test_goals(goal: Goal | AtMost, found: str, verdict: str) -> None:
    rows = [
        Row("case", "clipping", TORCH, [2.0, 4.0, 6.0]),
        Row("case", "clipping", CLIPPER, [1.0, 1.0, 2.0]),
    ]
    assert goal.judge(rows)[3:] == [found, verdict]
