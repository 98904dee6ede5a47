"""`benchmarks.clip`, `.sharded`: what is timed is checked, what is written was measured."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from benchmarks import clip, report, sharded
from benchmarks.baselines import CLIPPER, FOLLOWING, FUNCTION, ON_RANKS, OVERLAP, TORCH
from benchmarks.goals import CLIP, SHARDED, AtMost, Goal
from benchmarks.timing import STATES, Baseline, Row
from tests.conftest import pool
from tests.support.ranks import RankError, Ranks

ROOT = Path(__file__).parents[2]
LIMIT = 240  # seconds of a command; about ten on two idle cores, and five times as long under load

pytestmark = pytest.mark.timeout(2 * LIMIT)
Line = dict[str, str]


# The commands -------------------------------------------------------------------------------------


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def written(name: str, out: Path, shown: str) -> tuple[list[Line], str]:
    """The lines of the CSV and the dated result, of which the terminal has shown the same."""
    stem = out / f"{name}-{date.today().isoformat()}"
    with stem.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    picture = imread(stem.with_suffix(".png"))
    assert min(picture.shape[:2]) > 500
    assert picture[..., :3].std() > 0.05  # not blank
    result = stem.with_suffix(".md").read_text()
    in_terminal = [re.split(r"\s{2,}", line) for line in shown.splitlines()]
    for cells in table_rows(result):
        assert [cell for cell in cells if cell] in in_terminal, cells
    return lines, result


def table_rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [row for row in rows if row[0] != "---" and "goal" not in row and "note" not in row]


def check_lines(lines: list[Line], result: str, cases: dict[str, Sequence[Baseline]]) -> None:
    """Each baseline in each case and state, with its numbers in the result; they agree."""
    assert {(line["case"], line["state"], line["baseline"]) for line in lines} == {
        (case, state, baseline.name)
        for case, baselines in cases.items()
        for state in STATES
        for baseline in baselines
    }
    rows = table_rows(result)
    median = {(line["case"], line["state"], line["baseline"]): line["ms_p50"] for line in lines}
    for line in lines:
        if not line["ms_p50"]:
            assert line["baseline"] == "Megatron-core"
            assert "CUDA" in line["note"]
            continue
        assert float(line["ms_p20"]) <= float(line["ms_p50"]) <= float(line["ms_p80"])
        of_torch = float(median[line["case"], line["state"], TORCH]) / float(line["ms_p50"])
        assert float(line["times_torch_p50"]) == pytest.approx(of_torch, rel=1e-4)
        p20, p50, p80 = (f"{float(line[f'ms_{q}']):.3g}" for q in ("p20", "p50", "p80"))
        cells = [line["baseline"], f"{p50} ({p20} to {p80})"]
        assert any(row[:2] == cells for row in rows), line
    for line in lines:
        if line["baseline"] in (CLIPPER, FUNCTION, FOLLOWING, OVERLAP):
            assert float(line["norm_error"]) < 1.2e-7
            assert float(line["times_torch_p50"]) > 0


def check_goals(lines: list[Line], result: str, goals: Sequence[Goal | AtMost]) -> None:
    """Every goal is there, with a ratio out of the CSV and a verdict that follows from it."""
    rows = {(row[0], row[1], row[2]): row[3:] for row in table_rows(result) if len(row) == 5}
    assert set(rows) == {(goal.case, goal.state, goal.text) for goal in goals}
    ms = {(line["case"], line["state"], line["baseline"]): line["ms_p50"] for line in lines}
    for goal in goals:
        found, verdict = rows[goal.case, goal.state, goal.text]
        value = ours = float(ms[goal.case, goal.state, goal.baseline])
        if isinstance(goal, AtMost):
            reached = value <= goal.most
        else:
            theirs = float(ms[goal.case, goal.state, goal.than])
            value = ours / theirs if goal.within else theirs / ours
            reached = value <= goal.within if goal.within else value >= goal.times
        assert float(found.partition(" ")[0]) == pytest.approx(value, rel=6e-3)
        assert verdict == ("reached" if reached else "not reached")


def check_facts(result: str) -> None:
    cores = f"{os.cpu_count()} cores"
    for fact in ("machine: ", cores, "GiB of memory", f"torch {torch.__version__}", "load: "):
        assert fact in result
    assert date.today().isoformat() in result


def test_clip_leaves_a_table_a_csv_a_picture_and_a_result(tmp_path: Path) -> None:
    """In a process of its own, where peers are imported."""
    done = python("-m", "benchmarks.clip", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines, result = written("clip", tmp_path, done.stdout)
    check_lines(lines, result, {case.name: case.baselines for case in clip.cases(quick=True)})
    check_goals(lines, result, CLIP)
    check_facts(result)
    assert {line["rounds"] for line in lines if line["ms_p50"]} == {"3"}


def test_sharded_leaves_a_table_a_csv_a_picture_and_a_result(
    four_on_cpus: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the ranks of all other tests, and on two more."""
    assert sharded.main(["--quick", "--out", str(tmp_path)], pool) == 0
    lines, result = written("sharded", tmp_path, capsys.readouterr().out)
    check_lines(lines, result, {case.name: ON_RANKS for case in sharded.CASES})
    check_goals(lines, result, SHARDED)
    check_facts(result)


def test_a_case_that_is_not_there_ends_with_one_line() -> None:
    with pytest.raises(SystemExit, match="no such case among plain, float32") as raised:
        clip.main(["--quick", "--only", "int8"])
    assert "\n" not in str(raised.value)


def end_at_once(*given: Any) -> None:
    os._exit(3)


def test_a_rank_that_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "measure_case", end_at_once)
    with pytest.raises(RankError, match="the process ended"):
        sharded.main(["--quick", "--only", "2 ranks"], pool)


def test_gpt2_has_its_published_size() -> None:
    sizes = [torch.Size(shape).numel() for shape in clip.GPT2]
    assert (sum(sizes), len(sizes)) == (124_439_808, 148)


@pytest.mark.parametrize(("note", "code"), [("", 0), ("WRONG: off", 1)])
def test_the_exit_code_tells_whether_distclip_is_right(
    tmp_path: Path, note: str, code: int
) -> None:
    rows = [
        Row("case", "clipping", TORCH, [1.0]),
        Row("case", "clipping", CLIPPER, [] if note else [1.0], note=note),
        Row("case", "clipping", "peer", note="does not run: no GPU"),
    ]
    run = report.Benchmark("clip", "Title", out=tmp_path)
    assert run.publish(rows, [Goal("case", "clipping", 1.0)], "work") == code


def test_a_high_load_is_said_beside_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = os.cpu_count() or 1
    loads = {load: report.Benchmark("clip", "Title", load=load * cores) for load in (0.4, 0.6)}
    assert "too high" not in loads[0.4].facts("work")["load"]
    assert "too high for these numbers to count" in loads[0.6].facts("work")["load"]
