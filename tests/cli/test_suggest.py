"""`distclip suggest`: its table, its JSON, and one line for what it cannot use."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import distclip
from distclip.cli import main
from distclip.policies import ClipNorm
from tests.monitoring.made_runs import noise, with_spikes, write_history

SPIKES = (150, 333)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "a run"
    write_history(folder, [*with_spikes(noise(500), SPIKES)])
    return folder


def test_json_is_one_object_and_nothing_else(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suggest", str(run), "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    (found,) = result["suggestions"]
    assert result["run"] == "a run"
    assert found["spikes"] == [step + 1 for step in SPIKES]
    code = found["recommendation"]["code"]
    policy = eval(code, {"distclip": distclip})
    assert isinstance(policy, ClipNorm)
    (own,) = [each for each in found["outcomes"] if each["code"] == code]
    norms = with_spikes(noise(500), SPIKES)
    assert own["clipped"] == (norms > policy.max_norm).mean()
    assert own["caught"] == found["spikes"]
    coefficients = np.minimum(1, policy.max_norm / norms)
    assert own["mean_coefficient"] == pytest.approx(coefficients.mean(), rel=1e-12)
    assert own["smallest_coefficient"] == pytest.approx(coefficients.min(), rel=1e-12)
    assert "replaying" in printed.err


def test_the_table_has_every_policy(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["suggest", str(run), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["suggestions"]
    assert main(["suggest", str(run / "history.jsonl")]) == 0
    shown = capsys.readouterr().out
    rows = {line.split("  ")[0].strip(): line for line in shown.splitlines()}
    for each in found["outcomes"]:
        row = rows[each["code"].removeprefix("distclip.")]
        assert f"{each['clipped_later']:.2%}" in row
        assert row.rstrip().endswith(f"{len(each['caught'])}/2")
    assert f"Constant: {found['recommendation']['code']}" in shown
    text = " ".join(shown.split())
    for sentence in (found["recommendation"]["reason"], *found["notes"]):
        assert sentence in text
    assert "500 steps; spikes in 151, 334" in text


def test_names_of_groups_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "[red]\x1b[31m<script>"
    write_history(tmp_path, [1.0, 2.0], groups={name: [1.0, 2.0], "b": [1.0, 1.0]})
    assert main(["suggest", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "group [red]" in shown
    assert "<script>" in shown
    assert "\x1b" not in shown


def test_a_narrow_terminal_has_every_figure(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["suggest", str(run)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if " ZClip()" in line]
    assert [len(row.split()) for row in rows] == [6]
    assert rows[0].rstrip().endswith("2/2")


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_figures_that_json_lacks_are_strings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_history(tmp_path, [*(1.7e308 * np.linspace(0.9, 1, 20))])
    assert main(["suggest", str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["suggestions"]
    assert found["usual_norm"] == "Infinity"


def test_wrong_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zeros, nans, empty, foreign = (tmp_path / each for each in ("zeros", "nans", "empty", "other"))
    write_history(zeros, [0.0] * 20)
    write_history(nans, [math.nan] * 20)
    empty.mkdir()
    foreign.write_text("a,b\n1,2\n")
    group = tmp_path / "group"
    write_history(group, [1.0] * 3, groups={"body": [1.0] * 3, "head": [0.0] * 3})
    expected = {
        zeros: "no norm is finite and above 0 in 20 steps",
        nans: "no norm is finite and above 0 in 20 steps",
        group: "no norm of the group 'head' is finite and above 0",
        empty: "has no history.jsonl",
        foreign: "is no history",
        tmp_path / "nowhere": "does not exist",
    }
    for path, message in expected.items():
        assert main(["suggest", str(path)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith("distclip suggest: error: ")
        assert message in line, line


def test_without_a_run_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suggest"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("distclip suggest: error: ")
    assert "RUN" in line


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["suggest", "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("RUN", "history.jsonl", "--json", "recommends one with its reason"):
        assert text in shown


def test_a_file_by_another_name_is_a_run_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run / "copy.jsonl"
    other.write_bytes((run / "history.jsonl").read_bytes())
    assert main(["suggest", str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "copy"
