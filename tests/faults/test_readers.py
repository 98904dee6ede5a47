"""Every reader on damaged and hostile input: an error of its own, and nothing is half read."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distclip import cli
from distclip.cli import report
from distclip.monitoring.lines import FILE_NAME
from distclip.monitoring.records import HistoryError, read_run
from tests.faults.hostile import JSONS, TEXTS, changed, damaged, drawn, text_of, tried

HEADER = {"history": 1, "distclip": "0.1.0", "started": "2026-01-01T00:00:00+00:00", "after": 0}


def row(step: int) -> dict[str, Any]:
    """All that a row may have."""
    norm = 0.5 + step % 7 + (40.0 if step % 11 == 0 else 0.0)
    figures = {"total_norm": norm, "limit": 4.0, "coefficient": min(1.0, 4.0 / norm)}
    flags = {"clipped": norm > 4.0, "finite": True, "skipped": False}
    group = {"norm": norm, "limit": 4.0, "coefficient": figures["coefficient"]}
    return {
        **({"step": step} | figures | flags | {"loss": 2.0 / step, "lr": 0.1, "note": "a"}),
        "groups": {"body": group, "head": dict(group)},
        "tensor_norms": {"layers.0.w": norm * 0.8, "layers.1.w": norm * 0.6},
        "norm_type": 2.0,
        "nonfinite_parameters": {"layers.0.w": [0, 3]},
    }


LINES = [HEADER, *map(row, range(1, 15))]
WHOLE = b"".join(json.dumps(line).encode() + b"\n" for line in LINES)


@st.composite
def histories(draw: st.DrawFn) -> bytes:
    """Lines of a history, of which some were changed; or a file whose bytes were."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(WHOLE))
    texts = [json.dumps(line) for line in LINES]
    for index in draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=5)):
        text = text_of(draw(changed(LINES[index], JSONS)))
        if draw(st.booleans()) and text.endswith("}") and len(text) > 2:  # a key twice
            name = draw(st.one_of(st.sampled_from(sorted(row(1))), TEXTS))
            text = f"{text[:-1]}, {json.dumps(name)}: {text_of(draw(JSONS))}}}"
        texts[index] = text
    return b"".join(text.encode("utf-8", "surrogatepass") + b"\n" for text in texts)


@given(histories())
@drawn(150)
def test_a_history_is_read_or_refused(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE_NAME
        path.write_bytes(data)
        run, error = tried(lambda: read_run(path), HistoryError)
    if run is None:
        assert str(error).startswith(str(path))
        assert "\n" not in str(error)
        return
    steps = run.steps.tolist()
    assert steps == sorted(set(steps))
    assert len(steps) + run.num_broken + run.num_replaced <= data.count(b"\n") + 1
    assert {len(column) for column in run.columns.values()} == {len(steps)}
    assert all(len(c) == len(steps) for group in run.groups.values() for c in group.values())
    assert run.tensors.norms.shape == (len(run.tensors.rows), len(run.tensors.names))


@pytest.fixture
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and pages take a second each; another test has them."""
    monkeypatch.setattr(report, "_draw", lambda runs, path: None)
    monkeypatch.setattr(report, "_write_page", lambda runs, summaries, path: None)


def check_command(capsys: pytest.CaptureFixture[str], name: str, data: bytes, *words: str) -> None:
    """The command says what it has found, or one line that says what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE_NAME).write_bytes(data)
        code = cli.main([name, folder, *words])
    printed = capsys.readouterr()
    assert all(char.isprintable() or char == "\n" for char in printed.err)
    if code == 2:
        assert printed.out == ""
        lines = [line for line in printed.err.splitlines() if f"{name}: error: " in line]
        assert len(lines) == 1
        return
    assert code == 0
    if "--json" in words:
        json.loads(printed.out, parse_constant=pytest.fail)
    else:
        assert all(char.isprintable() or char == "\n" for char in printed.out)


@pytest.mark.usefixtures("no_files")
@given(data=histories(), words=st.sampled_from([(), ("--json",)]))
@drawn(60)
def test_report_says_one_line_or_all(
    capsys: pytest.CaptureFixture[str], data: bytes, words: tuple[str, ...]
) -> None:
    check_command(capsys, "report", data, *words)


@given(data=histories(), words=st.sampled_from([(), ("--json",)]))
@drawn(40)
def test_suggest_says_one_line_or_all(
    capsys: pytest.CaptureFixture[str], data: bytes, words: tuple[str, ...]
) -> None:
    check_command(capsys, "suggest", data, *words)


@given(data=histories())
@drawn(5)
def test_hostile_names_and_numbers_are_drawn(
    capsys: pytest.CaptureFixture[str], data: bytes
) -> None:
    check_command(capsys, "report", data, "--json")
