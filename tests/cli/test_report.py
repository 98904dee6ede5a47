"""`distclip report`: files, words, one JSON object, and one line for what a user can put right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from distclip import cli
from distclip.cli import report
from tests.monitoring.runs import make_run

PNG, HTML = b"\x89PNG", b"<!DOCTYPE html>"


@pytest.fixture
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what takes a second and is not what the test is about."""
    monkeypatch.setattr(report, "_draw", lambda runs, path: path.write_bytes(PNG))
    monkeypatch.setattr(report, "_write_page", lambda runs, summaries, path: path.write_bytes(HTML))


def a_run(folder: Path, **values: Any) -> Path:
    make_run(folder, {"layers.0.w": [0.5] * 20 + [4.0] * 20}, loss=[1.0] * 40, **values)
    return folder


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line, without what comes before it in every line."""
    assert cli.main(["report", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if not line.startswith("report: ")]
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("distclip report: error: ")
    return lines[0].removeprefix("distclip report: error: ")


def test_one_run_is_drawn_into_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = a_run(tmp_path / "run-1", tensor_norms=1)
    assert cli.main(["report", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "Clipped in 20 of 40 steps (50%)" in out
    assert out.splitlines()[0].strip() == "run-1"
    assert (folder / "report.png").read_bytes().startswith(PNG)
    assert (folder / "report.html").read_bytes().lstrip()[:15].lower() == HTML.lower()
    assert {each.name for each in folder.iterdir()} == {
        *("history.jsonl", "report.png", "report.html")
    }
    assert all(name in "".join(out.split()) for name in ("report.png", "report.html"))


@pytest.mark.usefixtures("no_files")
def test_several_runs_go_to_the_current_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [str(a_run(tmp_path / name)) for name in ("one", "two")]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["report", *runs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in found["runs"]] == ["one", "two"]
    assert Path(found["picture"]) == tmp_path / "here" / "report.png"
    assert (tmp_path / "here" / "report.html").exists()
    assert not (tmp_path / "one" / "report.png").exists()


@pytest.mark.usefixtures("no_files")
def test_json_has_the_summaries_and_the_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", {"w": [1.0, math.nan, 2.0]}, loss=[1.0, math.nan, math.nan])
    out = tmp_path / "new" / "folder"
    words = ["report", str(tmp_path / "run" / "history.jsonl"), "--out", str(out), "--json"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    (run,) = found["runs"]
    assert run["file"] == str(tmp_path / "run" / "history.jsonl")
    assert run["figures"]["nonfinite_steps"] == 1
    kinds = {each["kind"]: each for each in run["findings"]}
    assert kinds["nonfinite"]["steps"] == [2]
    assert found["picture"] == str(out / "report.png")
    assert (out / "report.png").exists()


@pytest.mark.usefixtures("no_files")
def test_a_broken_line_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_run(tmp_path / "run")
    path = folder / "history.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:9], b"\x00\xff{]\n", *lines[9:], b'{"step": 41, "tot']))
    assert cli.main(["report", str(folder)]) == 0
    assert "2 lines of the file were broken" in capsys.readouterr().out


@pytest.mark.usefixtures("no_files")
@pytest.mark.parametrize("name", ["[red]x", "[b]y[", "[bold", ":smile:", "\\[x]"])
def test_markup_in_a_name_is_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    a_run(tmp_path / "other").joinpath("history.jsonl").rename(folder / "history.jsonl")
    a_run(tmp_path / "b")
    words = [str(folder), str(tmp_path / "b"), "--out", str(tmp_path / "out")]
    assert cli.main(["report", *words]) == 0
    assert capsys.readouterr().out.count(name) >= 2


@pytest.mark.usefixtures("no_files")
def test_what_a_terminal_obeys_is_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"red\x1b[31m.w": [2], "right\u202e.w": [2]}
    run = make_run(tmp_path / "a\x1b[2J", {"w": [math.nan]}, nonfinite_parameters={0: names})
    assert cli.main(["report", str(tmp_path / "c\x1b[2J")]) == 2
    assert cli.main(["report", str(run.path), "--out", str(tmp_path / "b\x1b[2J")]) == 0
    printed = capsys.readouterr()
    assert r"red\x1b[31m.w and right\u202e.w" in " ".join(printed.out.split())
    assert not {"\x1b", "\u202e"} & {*printed.out, *printed.err}


@pytest.mark.usefixtures("no_files")
@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["a/run", "b/run"], ["a/run", "b/run"]),
        (["a/run", "b/run", "b/other"], ["a/run", "b/run", "other"]),
        (["run", "run/run"], ["run", "run/run"]),
        (["x/a/run", "x/b/run"], ["a/run", "b/run"]),
    ],
)
def test_runs_named_alike_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folders: list[str], names: list[str]
) -> None:
    paths = [str(a_run(tmp_path / folder)) for folder in folders]
    assert cli.main(["report", *paths, "--json", "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in found["runs"]] == names


BAD: dict[str, tuple[bytes | None, str]] = {
    "does not exist": (None, "does not exist"),
    "empty": (b"", "is empty"),
    "only a header": (b'{"history": 1, "distclip": "0.1.0"}\n', "has no step yet"),
    "truncated": (b'{"history": 1, "distclip": "0.1', "is no history"),
    "foreign": (b"epoch,loss\n1,2\n", "is no history"),
    "binary": (bytes(range(256)) * 10, "is no history"),
    "of another format": (b'{"history": 7, "distclip": "9.0"}\n', "format 7"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    content, text = BAD[name]
    path = tmp_path / "history.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert text in error_of(capsys, str(path))
    assert not (tmp_path / "report.png").exists()


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "run-1")
    error = error_of(capsys, str(tmp_path))
    assert "has no history.jsonl" in error
    assert "run-1" in error


def test_no_run_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert "RUN" in error_of(capsys)


@pytest.mark.parametrize("again", ["run", "run/history.jsonl", "./run", "link"])
def test_a_run_given_twice(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    again: str,
) -> None:
    a_run(tmp_path / "run")
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    assert "given twice" in error_of(capsys, "run", again)


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert "cannot be made" in error_of(capsys, str(run), "--out", str(tmp_path / "file"))
    assert "cannot be made" in error_of(capsys, str(run), "--out", str(tmp_path / "file" / "out"))
    (tmp_path / "out" / "report.png").mkdir(parents=True)
    assert "cannot be written" in error_of(capsys, str(run), "--out", str(tmp_path / "out"))


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".report.tmp.png").symlink_to("/dev/full")
    assert "No space left" in error_of(capsys, str(run), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out" / "report.png").exists()


def test_the_first_bad_run_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run")
    assert "nowhere" in error_of(capsys, str(run), str(tmp_path / "nowhere"))
    assert not (run / "report.png").exists()


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["report", "--help"])
    assert end.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(word in out for word in ("RUN", "--out FOLDER", "--json", "history.jsonl"))
