"""What a run leaves for people: history.jsonl, progress, the tables, the pictures."""

from __future__ import annotations

import math
import os
import resource
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from rich.console import Console

import distclip
from distclip.monitoring.picture import draw
from distclip.monitoring.records import read_run
from launch import compare, report
from launch.ranks import UserError
from launch.train import check_written, open_history
from tests.support.rows import rows_of


def clipped(norm: float) -> distclip.Report:
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.tensor([norm])
    return distclip.Clipper([weight], distclip.ClipNorm(1.0)).clip_()


def append(history: distclip.History, step: int, loss: float = 2.0, norm: float = 4.0) -> None:
    history.append(clipped(norm), step, loss=loss, lr=0.1, seconds=0.5, tokens=8)


def write(out: Path, losses: Iterable[float], norm: float = 4.0, done: int = 0) -> None:
    with open_history(out, done) as history:
        for step, loss in enumerate(losses, start=done + 1):
            append(history, step, loss, norm)


def test_a_run_goes_on_after_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, [2.0] * 5)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut off by a kill
    write(tmp_path, [1.0], done=3)
    assert [(row["step"], row["loss"]) for row in rows_of(tmp_path)] == [
        *((1, 2.0), (2, 2.0), (3, 2.0), (4, 1.0))
    ]
    write(tmp_path, [], done=2)  # killed before its first step
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]
    write(tmp_path, [3.0])  # not resumed
    assert [(row["step"], row["loss"]) for row in rows_of(tmp_path)] == [(1, 3.0)]


def test_a_full_disk_is_known_after_the_row(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_history(tmp_path, 0) as history:
        append(history, 1)
        check_written(history)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
        try:
            append(history, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        with pytest.raises(UserError, match=r"history\.jsonl cannot be written: File too large"):
            check_written(history)


def test_rows_are_on_the_disk_before_their_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut takes what was written and not synced, and a checkpoint would be without rows."""
    synced: list[tuple[str, int]] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((name_of(file), size_of(file))))
    with open_history(tmp_path, 0) as history:
        append(history, 1)
        check_written(history)
        assert synced[-1] == (history.path.name, history.path.stat().st_size)


def name_of(descriptor: int) -> str:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name


def size_of(descriptor: int) -> int:
    return os.fstat(descriptor).st_size


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_history_that_was_taken_away(tmp_path: Path, how: str) -> None:
    with open_history(tmp_path, 0) as history:
        append(history, 1)
        check_written(history)
        if how == "removed":
            shutil.rmtree(tmp_path)
        else:
            write(tmp_path, [])
        append(history, 2)
        with pytest.raises(UserError, match="removed, or belongs to a later start of this run"):
            check_written(history)


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match=r"history\.jsonl: it was not written by distclip"):
        open_history(tmp_path, 0)
    assert (tmp_path / "history.jsonl").read_text() == "mine\n"


def test_a_log_file_gets_about_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress, figures = report.StepProgress(Console(), 0, 100), clipped(4.0)
    with progress:
        for step in range(1, 101):
            progress.show(step, 2.0, figures)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "step 100 of 100  loss 2  norm 4  limit 1  clipped 100 of 100"


@pytest.mark.parametrize("norm", [3.0, math.nan])
def test_a_run_is_drawn_whatever_its_norms_are(tmp_path: Path, norm: float) -> None:
    write(tmp_path, [2.0], norm=norm)
    write(tmp_path, [math.nan], norm=math.nan, done=1)
    run = read_run(tmp_path)
    assert len(run.steps) == 2
    draw([run], tmp_path / "report.png", "title")
    assert [path.name for path in tmp_path.glob("*.png")] == ["report.png"]
    assert report.summary(run, "title").row_count == 5


def test_a_history_of_another_training_has_a_table(tmp_path: Path) -> None:
    with distclip.History(tmp_path) as history:
        history.append(clipped(4.0))
    assert report.summary(read_run(tmp_path), "title").row_count == 5


def test_compare_draws_what_runs_have_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policies = ("none", "clip-norm --policy.max-norm 0.5")
    for name, loss in {"none": math.nan, "clip-norm_max-norm_0.5": 1.5}.items():
        write(tmp_path / name, [2.0, loss])
    words = ["compare.py", "--draw-only", "--out", str(tmp_path), "--policies", *policies]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("COLUMNS", "120")
    compare.main()
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "not clipped" in printed
    assert "clip-norm (max-norm 0.5)" in printed
    monkeypatch.setattr(sys, "argv", [*words, "zclip"])
    with pytest.raises(SystemExit, match=r"compare.py: error: .*zclip does not exist"):
        compare.main()
