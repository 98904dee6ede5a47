"""What a run leaves for people: metrics.jsonl, the tables, the pictures."""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from launch import compare, report
from launch.ranks import UserError
from tests.launch.runs import Row, rows_of


def row(step: int, loss: float = 2.0, norm: float = 4.0) -> Row:
    measured = {"total_norm": norm, "limit": 1.0, "coefficient": 1 / norm, "clipped": norm > 1}
    other = {"finite": math.isfinite(norm), "lr": 0.1, "seconds": 0.5, "tokens": 8}
    return {"step": step, "loss": loss, **measured, **other}


def write(out: Path, rows: list[Row], done: int = 0) -> report.Log:
    log = report.Log(out / "metrics.jsonl", Console(), done, steps=10)
    with log:
        for each in rows:
            log.add(each)
    return log


def test_a_log_goes_on_after_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, [row(step) for step in range(1, 6)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut off by a kill
    assert [each["step"] for each in report.read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    log = write(tmp_path, [row(4, norm=0.5)], done=3)
    assert log.rows == rows_of(tmp_path) == [row(1), row(2), row(3), row(4, norm=0.5)]
    assert log.num_clipped == 3


DAMAGED_LINES = [
    '{"step": 2, "lo',
    "",
    "\0" * 40,
    "null",
    "[2]",
    "{}",
    '{"step": "2"}',
    "\x85{",
    json.dumps({**row(2), "loss": "?"}),
    json.dumps({**row(2), "seconds": None}),
    json.dumps({name: value for name, value in row(2).items() if name != "limit"}),
    "[" * 100_000,
]


@pytest.mark.parametrize("damaged", DAMAGED_LINES, ids=lambda line: line[:20])
def test_a_damaged_line_loses_no_later_one(tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, [row(step) for step in range(1, 6)])
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], damaged.encode("latin-1"), *lines[2:]]))
    assert report.read(path) == [row(1), row(3), row(4), row(5)]
    log = write(tmp_path, [row(5, norm=0.5)], done=4)
    assert log.rows == rows_of(tmp_path) == [row(1), row(3), row(4), row(5, norm=0.5)]
    assert report.summary(log.rows, "title").row_count == 5


def test_a_full_disk_is_known_after_the_row(tmp_path: Path) -> None:
    log = report.Log(tmp_path / "metrics.jsonl", Console(), 0, steps=10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with log:
        log.add(row(1))
        log.check()
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
        try:
            log.add(row(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: File too large"):
        log.check()


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_log_that_was_taken_away(tmp_path: Path, how: str) -> None:
    log = report.Log(tmp_path / "metrics.jsonl", Console(), 0, steps=10)
    with log:
        log.add(row(1))
        log.check()
        if how == "removed":
            shutil.rmtree(tmp_path)
        else:
            write(tmp_path, [])
        log.add(row(2))
    with pytest.raises(UserError, match="now belongs to a later start of this run, or was removed"):
        log.check()


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    write(tmp_path, [row(1, loss=math.nan, norm=math.inf)])
    (read,) = rows_of(tmp_path)
    assert read["loss"] is None
    assert read["total_norm"] is None
    assert read["finite"] is False


def test_a_log_file_gets_about_ten_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = report.Log(tmp_path / "metrics.jsonl", Console(), 0, steps=100)
    with log:
        for step in range(1, 101):
            log.add(row(step))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "step 100 of 100  loss 2  norm 4  limit 1  clipped 100 of 100"


@pytest.mark.parametrize("norm", [3.0, math.nan])
def test_a_run_is_drawn_whatever_its_norms_are(tmp_path: Path, norm: float) -> None:
    rows = write(tmp_path, [row(1, norm=norm), row(2, loss=math.nan, norm=math.nan)]).rows
    report.draw_run(rows, "title", tmp_path / "report.png")
    assert [path.name for path in tmp_path.glob("*.png")] == ["report.png"]
    assert report.summary(rows, "title").row_count == 5


def test_compare_draws_what_runs_have_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policies = ("none", "clip-norm --policy.max-norm 0.5")
    for name, loss in {"none": math.nan, "clip-norm_max-norm_0.5": 1.5}.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name, [row(1), row(2, loss=loss)])
    words = ["compare.py", "--draw-only", "--out", str(tmp_path), "--policies", *policies]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("COLUMNS", "120")
    compare.main()
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "not clipped" in printed
    assert "clip-norm (max-norm 0.5)" in printed
    monkeypatch.setattr(sys, "argv", [*words, "zclip"])
    with pytest.raises(SystemExit, match=r"compare.py: error: .*zclip.* cannot be read"):
        compare.main()
