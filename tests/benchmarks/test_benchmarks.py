"""`benchmarks.clip`, `.sharded` and `.gpu`: what is timed is checked, and what is written is what was measured."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from benchmarks import gpu, sharded_ranks, show
from benchmarks.clip import GPT2, AfterBackward, Case, gradients
from benchmarks.clip import cases as clip_cases
from benchmarks.goals import CLIP, SHARDED, AtMost, Goal, Judged, Under
from benchmarks.models import LLAMA_1B
from benchmarks.rivals import (
    CLIPPER,
    COPY,
    FUNCTION,
    IN_ONE_PROCESS,
    MEASURING,
    ON_RANKS,
    OVERLAP,
    TORCH,
    torch_clip,
)
from benchmarks.sharded import CASES, QUICK
from benchmarks.timing import (
    STATES,
    Gradients,
    Rival,
    Row,
    Together,
    in_turn,
    measure,
    ratio,
    worst_element,
)

ROOT = Path(__file__).parents[2]
FACTOR = STATES["clipping"]
LIMIT = 240  # seconds of a command; about ten on two idle cores, and five times as long beside other jobs

pytestmark = pytest.mark.timeout(2 * LIMIT)
Line = dict[str, str]


# The commands -------------------------------------------------------------------------------------


def command(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", f"benchmarks.{name}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    return subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )


def quick(name: str, out: Path) -> tuple[list[Line], str]:
    """The lines of the CSV and the dated result, of which the terminal has shown the same."""
    done = command(name, "--quick", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    stem = out / f"{name}-{date.today().isoformat()}"
    with stem.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    picture = imread(stem.with_suffix(".png"))
    assert min(picture.shape[:2]) > 500
    assert picture[..., :3].std() > 0.05  # not blank
    result = stem.with_suffix(".md").read_text()
    shown = [[cell.strip() for cell in line.split("│")] for line in done.stdout.splitlines()]
    for cells in filter(lambda cells: "does not run" not in cells[-1], table_rows(result)):
        assert any(cells == row[1:-1] for row in shown), cells
    return lines, result


def table_rows(markdown: str) -> list[list[str]]:
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in markdown.splitlines()
        if line[:1] == "|"
    ]
    return [row for row in rows if row[0] != "---" and "goal" not in row and "note" not in row]


def check_lines(lines: list[Line], result: str, cases: dict[str, Sequence[Rival]]) -> None:
    """Each rival in each case and state, with its numbers in the result; and they agree with each other."""
    assert {(line["case"], line["state"], line["rival"]) for line in lines} == {
        (case, state, rival.name)
        for case, rivals in cases.items()
        for state in STATES
        for rival in rivals
    }
    rows = table_rows(result)
    median = {(line["case"], line["state"], line["rival"]): line["ms_p50"] for line in lines}
    for line in lines:
        if not line["ms_p50"]:
            assert line["rival"] == "Megatron-core"
            assert "CUDA" in line["note"]
            continue
        assert float(line["ms_p20"]) <= float(line["ms_p50"]) <= float(line["ms_p80"])
        of_torch = float(median[line["case"], line["state"], TORCH]) / float(line["ms_p50"])
        assert float(line["times_torch_p50"]) == pytest.approx(of_torch, rel=1e-4)
        written = [
            f"{float(line['ms_p50']):.3g} ({float(line['ms_p20']):.3g} to {float(line['ms_p80']):.3g})"
        ]
        assert any(row[0] == line["rival"] and row[1:2] == written for row in rows), line
    for line in lines:
        if line["rival"] in (CLIPPER, FUNCTION, OVERLAP):
            assert float(line["norm_error"]) < 1.2e-7
            assert float(line["times_torch_p50"]) > 0


def check_goals(lines: list[Line], result: str, goals: Sequence[Goal | Under]) -> None:
    """Every goal is there, with a ratio out of the CSV and a verdict that follows from it."""
    rows = {(row[0], row[1], row[2]): row[3:] for row in table_rows(result) if len(row) == 5}
    assert set(rows) == {(goal.case, goal.state, goal.text) for goal in goals}
    ms = {(line["case"], line["state"], line["rival"]): line["ms_p50"] for line in lines}
    for goal in goals:
        found, verdict = rows[goal.case, goal.state, goal.text]
        if isinstance(goal, Under):
            taken = float(ms[goal.case, goal.state, goal.rival])
            assert float(found.partition(" ")[0]) == pytest.approx(taken, rel=6e-3)
            assert verdict == ("reached" if taken < goal.ms else "not reached")
            continue
        ours, theirs = (float(ms[goal.case, goal.state, name]) for name in (CLIPPER, goal.than))
        value = ours / theirs if goal.within else theirs / ours
        assert float(found.partition(" ")[0]) == pytest.approx(value, rel=6e-3)
        reached = value <= goal.within if goal.within else value >= goal.times
        assert verdict == ("reached" if reached else "not reached")


def check_facts(result: str) -> None:
    for fact in (
        r"machine: ",
        f"{os.cpu_count()} cores",
        "GiB of memory",
        f"torch {torch.__version__}",
        "load: ",
    ):
        assert fact in result
    assert date.today().isoformat() in result


def test_clip_leaves_a_table_a_csv_a_picture_and_a_result(tmp_path: Path) -> None:
    lines, result = quick("clip", tmp_path)
    check_lines(lines, result, {case.name: case.rivals for case in clip_cases(quick=True)})
    check_goals(lines, result, CLIP)
    check_facts(result)
    assert {line["rounds"] for line in lines if line["ms_p50"]} == {"3"}


def test_gradients_after_backward_are_made_anew() -> None:
    made = gradients([(10,), (2, 3)], torch.float32)
    work = AfterBackward(made.params, made.values, made.norm)
    for clipping in (False, True):
        before = [param.grad for param in work.params]
        work.prepare(clipping)
        assert all(param.grad is not was for param, was in zip(work.params, before, strict=True))
        assert work.errors(work.norm, 2 * work.norm) == (0, 0)
        torch._foreach_mul_([param.grad for param in work.params], 0.5)
        assert work.errors(work.norm, 2 * work.norm) == (0, 0.5)


def test_sharded_leaves_a_table_a_csv_a_picture_and_a_result(tmp_path: Path) -> None:
    lines, result = quick("sharded", tmp_path)
    check_lines(lines, result, {case.name: ON_RANKS for case in CASES})
    check_goals(lines, result, SHARDED)
    check_facts(result)


def test_a_case_that_is_not_there_ends_with_one_line() -> None:
    done = command("clip", "--only", "int8")
    assert done.returncode == 1
    assert "no such case among plain, float32" in done.stderr
    assert done.stderr.count("\n") == 1


def end_at_once(*given: Any) -> None:
    os._exit(3)


def test_a_rank_that_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_ranks, "rank_main", end_at_once)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(RuntimeError, match=r"ranks \[.*\] of 2 ended without an answer"):
        sharded_ranks.measure_on(2, CASES[:1], QUICK, 1)


def test_gpt2_has_its_published_size() -> None:
    assert (sum(torch.Size(shape).numel() for shape in GPT2), len(GPT2)) == (124_439_808, 148)


# What is timed is right ---------------------------------------------------------------------------


def scaled(
    work: Gradients, limit: float, wrong: Callable[[list[Tensor], Tensor], Any]
) -> Callable[[], Any]:
    """torch's clip with something wrong after it."""
    return lambda: wrong(work.values, torch_clip(work, limit)())


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


WRONG = [norm_too_large, one_tensor_forgotten, one_element_off, nan_norm, one_nan_left]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("state", STATES)
def test_a_rival_that_is_wrong_has_no_speed(wrong: Callable[..., Any], state: str) -> None:
    work = gradients([(30, 20), (7,)], torch.float32)
    rivals = [Rival(TORCH, torch_clip), Rival("wrong", partial(scaled, wrong=wrong))]
    good, bad = measure("case", state, STATES[state], work, rivals, rounds=2)
    assert (len(good.seconds), good.note) == (2, "")
    assert not bad.seconds
    assert bad.note.startswith("WRONG: ")
    assert show.record(bad, [good, bad])["times_torch_p50"] == ""


def test_distclip_is_held_to_one_ulp_and_others_are_not() -> None:
    """A norm that is off by 1e-6 is a right answer of torch's, and a wrong one of distclip's."""
    work = gradients([(30, 20), (7,)], torch.float32)
    strict = next(rival.tolerance for rival in IN_ONE_PROCESS if rival.name == CLIPPER)

    def off(work: Gradients, limit: float) -> Callable[[], Any]:
        return lambda: work.norm * (1 + 1e-6)

    rivals = [Rival("others", off), Rival(CLIPPER, off, strict)]
    theirs, ours = measure("case", "not clipping", 10.0, work, rivals, rounds=1)
    assert theirs.seconds
    assert not ours.seconds


def test_a_rival_that_is_right_only_once_has_no_speed() -> None:
    """One that remembers the coefficient of its first call."""
    work = gradients([(30, 20)], torch.float32)

    def start(work: Gradients, limit: float) -> Callable[[], Any]:
        calls: list[int] = []

        def run() -> Tensor | float:
            calls.append(0)
            return torch_clip(work, limit)() if len(calls) == 1 else work.norm

        return run

    (row,) = measure("case", "clipping", FACTOR, work, [Rival("once", start)], rounds=2)
    assert not row.seconds
    assert row.note.startswith("WRONG: ")


def test_a_rival_that_cannot_run_is_a_row_that_says_why() -> None:
    def start(work: Gradients, limit: float) -> Callable[[], Any]:
        raise ImportError("No module named 'peer'")

    work = gradients([(3,)], torch.float32)
    (row,) = measure(
        "case", "clipping", FACTOR, work, [Rival("peer", start, needs="a GPU")], rounds=1
    )
    assert row.note == "does not run: needs a GPU (ImportError: No module named 'peer')"


def test_what_is_wrong_on_another_rank_is_wrong() -> None:
    work = gradients([(30, 20)], torch.float32)
    for theirs in (("", 0.5, 0.0), ("", 0.0, math.nan), ("RuntimeError: there", 0.0, 0.0)):
        together = Together(gather=lambda mine, theirs=theirs: [mine, theirs])
        (row,) = measure("case", "clipping", FACTOR, work, [Rival(TORCH, torch_clip)], 1, together)
        assert row.note
        assert not row.seconds


def test_the_error_of_an_element() -> None:
    was = torch.tensor([1.0, -2.0, 0.0])
    assert worst_element(was * 0.25, was, 0.25) == 0
    assert worst_element(torch.tensor([0.25, -0.51, 0.0]), was, 0.25) == pytest.approx(
        0.02, rel=1e-5
    )
    assert worst_element(torch.tensor([0.25, -0.5, 1.0]), was, 0.25) > 1e30
    assert math.isnan(worst_element(torch.tensor([0.25, math.nan, 0.0]), was, 0.25))
    assert worst_element(was, was, 1.0) == 0


# What is timed, and how it is counted -------------------------------------------------------------


def test_every_round_clips_the_same_gradients() -> None:
    work = gradients([(30, 20), (7,)], torch.float32)
    norms: list[float] = []

    def start(work: Gradients, limit: float) -> Callable[[], Any]:
        def run() -> Tensor:
            norms.append(torch.cat([v.flatten() for v in work.values]).double().norm().item())
            return torch_clip(work, limit)()

        return run

    measure(
        "case", "clipping", FACTOR, work, [Rival("first", start), Rival("second", start)], rounds=3
    )
    assert len(norms) == 2 * (3 + 2 + 2)  # two rounds to warm up; checked before and after
    assert norms == pytest.approx([work.norm] * len(norms), rel=1e-12)


def test_all_run_in_every_round_in_changing_order_and_the_slowest_rank_counts() -> None:
    called: list[str] = []
    runs = {name: partial(called.append, name) for name in "abc"}
    ticks = iter(range(1000))

    def clock(run: Callable[[], Any]) -> float:
        run()
        return float(next(ticks))

    other = {name: [500.0] * 19 + [-1.0] for name in runs}
    together = Together(gather=lambda mine: [mine, other], barrier=lambda: called.append("|"))
    taken = in_turn(runs, 20, lambda: called.append("p"), together, clock)
    turns = "".join(called).split("p|")[1:]
    rounds = ["".join(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert len(rounds) == 22
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert len(set(rounds)) > 3
    assert all(seconds[:-1] == [500.0] * 19 and 60 < seconds[-1] < 66 for seconds in taken.values())


def test_the_ratio_is_that_of_the_medians_between_quantiles_of_the_rounds() -> None:
    torch_row = Row("case", "clipping", TORCH, [2.0, 4.0, 6.0])
    ours = Row("case", "clipping", CLIPPER, [1.0, 1.0, 2.0])
    found = ratio(torch_row, ours)
    assert found is not None
    assert (found.p50, found.p20, found.p80) == pytest.approx((4.0, 2.4, 3.6))
    assert ratio(torch_row, Row("case", "clipping", CLIPPER)) is None


@pytest.mark.parametrize(
    ("goal", "found", "verdict"),
    [
        (Goal("case", "clipping", 4.0), "4 (2.4 to 3.6)", "reached"),
        (Goal("case", "clipping", 4.1), "4 (2.4 to 3.6)", "not reached"),
        (Goal("case", "clipping", within=0.25), "0.25 (0.283 to 0.433)", "reached"),
        (Goal("case", "clipping", within=0.24), "0.25 (0.283 to 0.433)", "not reached"),
        (Goal("case", "clipping", 2.0, work=0.5), "2 (1.2 to 1.8)", "reached"),
        (Goal("case", "not clipping", 1.0), "-", "not measured"),
        (Under("case", "clipping", CLIPPER, 1001.0), "1e+03 (1e+03 to 1.6e+03) ms", "reached"),
        (Under("case", "clipping", CLIPPER, 1000.0), "1e+03 (1e+03 to 1.6e+03) ms", "not reached"),
        (Under("case", "not clipping", CLIPPER, 1.0), "-", "not measured"),
        (AtMost("case", "clipping", CLIPPER, "syncs", 0), "0", "reached"),
        (AtMost("case", "clipping", CLIPPER, "launches", 4), "5", "not reached"),
        (AtMost("case", "clipping", TORCH, "launches", 4), "-", "not measured"),
    ],
)
def test_goals(goal: Judged, found: str, verdict: str) -> None:
    rows = [
        Row("case", "clipping", TORCH, [2.0, 4.0, 6.0]),
        Row("case", "clipping", CLIPPER, [1.0, 1.0, 2.0], launches=5, syncs=0),
    ]
    assert goal.judged(rows)[3:] == [found, verdict]


@pytest.mark.parametrize(("note", "code"), [("", 0), ("WRONG: off", 1)])
def test_the_exit_code_tells_whether_distclip_is_right(
    tmp_path: Path, note: str, code: int
) -> None:
    rows = [
        Row("case", "clipping", TORCH, [1.0]),
        Row("case", "clipping", CLIPPER, [] if note else [1.0], note=note),
        Row("case", "clipping", "peer", note="does not run: no GPU"),
    ]
    goals = [Goal("case", "clipping", 1.0)]
    assert (
        show.publish("clip", "Title", rows, goals, show.Options(out=tmp_path), show.Began(), "work")
        == code
    )


# One CUDA device ----------------------------------------------------------------------------------


def test_without_a_device_there_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = command("gpu")
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        == "benchmarks.gpu: torch sees no CUDA device on this machine, so nothing was measured"
    )
    assert done.stdout == ""


def test_the_work_of_the_device_runs_on_a_cpu(tmp_path: Path) -> None:
    case = Case("small, bf16", [(30, 7), (5,)], torch.bfloat16)
    counted: list[str] = []

    def count(run: Callable[[], Any], prepare: Callable[[], Any]) -> dict[str, int]:
        prepare()
        counted.append(repr(run()))
        return {"launches": 3, "syncs": 1}

    rows = gpu.rows_of(case, 2, "cpu", lambda run: run() is None or 1.0, count)
    timed = {(row.state, row.rival) for row in rows if row.seconds}
    assert {(state, name) for state in (*STATES, gpu.STEP) for name in (TORCH, CLIPPER)} <= timed
    assert {("not clipping", MEASURING), ("not clipping", COPY)} <= timed
    assert len(counted) == len(timed)
    judged = [goal.judged(rows) for goal in gpu.goals_of(case.name)]
    assert [line[2:] for line in judged if "syncs" in line[2]] == [
        ["at most 0 syncs", "1", "not reached"]
    ] * 3
    assert [line[2:] for line in judged if "launches" in line[2]] == [
        ["at most 4 launches", "3", "reached"]
    ] * 2
    assert "not measured" not in {line[4] for line in judged}
    options = show.Options(rounds=2, out=tmp_path)
    assert (
        show.publish(
            "gpu", "One device", rows, gpu.goals_of(case.name), options, show.Began(), "a CPU"
        )
        == 0
    )
    assert "3 launches, 1 syncs" in next(tmp_path.glob("*.md")).read_text()


def test_a_step_of_the_benchmark_clips_and_steps() -> None:
    work = gradients([(30, 20), (7,)], torch.float32)
    optimizer = torch.optim.AdamW(work.params, lr=1e-2, fused=True)
    for rival in gpu.stepping(optimizer):
        before = [p.detach().clone() for p in work.params]
        (row,) = measure("case", gpu.STEP, FACTOR, work, [rival], rounds=1)
        assert row.seconds, row.note
        assert all(not torch.equal(p, was) for p, was in zip(work.params, before, strict=True))


def test_launches_and_syncs_are_counted() -> None:
    events = [
        ("cudaLaunchKernel", 7),
        ("cuLaunchKernelEx", 2),
        ("cudaMemcpyAsync", 5),
        ("aten::mul_", 9),
    ]
    assert gpu.num_launches(events) == 9
    messages = [
        "called a synchronizing CUDA operation (Triggered internally at ...)",
        "something is deprecated",
    ]
    assert gpu.num_syncs(messages) == 1


def test_a_model_that_does_not_fit_is_said_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("Llama", gpu.shapes_of(LLAMA_1B), torch.bfloat16)
    needed = gpu.needed_bytes(case.shapes)
    assert needed == 12 * 1_235_814_400 + 8 * 128_256 * 2048
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (needed - 1, 0))
    rows = gpu.rows_if_it_fits(case, 1)
    assert {row.note for row in rows} == {"does not fit: needs 15.8 GiB, 15.8 GiB are free"}
    assert not any(row.seconds for row in rows)
