"""`History` on files that no `History` wrote: it refuses them, or its rows can be read."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distclip import ClipNorm, Clipper, History
from distclip.monitoring.lines import FILE_NAME
from distclip.monitoring.records import HistoryError, read_run
from tests.faults.hostile import FLOATS, INTS, JSONS, drawn, tried
from tests.faults.test_readers import HEADER, LINES, WHOLE, histories

# Starts as other versions, other programs and a kill leave them.
HEADERS = [
    {**HEADER, "history": 2},
    {**HEADER, "history": 10**40},
    {**HEADER, "history": True},
    {**HEADER, "after": 10**40},
    {**HEADER, "after": 10**17},
    {"step": 10**40, "x": 1},
]
OTHER_FORMAT = re.compile(rb'\{"history": (?!1[,}])\d')
AFTER = st.one_of(st.none(), st.integers(0, 20), INTS, FLOATS, st.booleans(), JSONS)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Histories that were damaged, and whole ones with a strange line in them."""
    if draw(st.booleans()):
        return draw(histories())
    at = draw(st.one_of(st.just(len(LINES)), st.integers(0, len(LINES))))
    strange = json.dumps(draw(st.sampled_from(HEADERS))).encode() + b"\n"
    lines = WHOLE.splitlines(keepends=True)
    return b"".join([*lines[:at], strange, *lines[at:]])


def report() -> Any:
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([3.0, 4.0])
    return Clipper([param], ClipNorm(2.5)).clip_()


REPORT = report()


@given(data=files(), after=AFTER, first=st.one_of(st.none(), st.integers(0, 30), INTS))
@drawn(150)
def test_a_start_on_any_file_is_refused_or_read(data: bytes, after: Any, first: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE_NAME
        path.write_bytes(data)
        before, unreadable = tried(lambda: read_run(path), HistoryError)
        history, error = tried(lambda: History(folder, after=after), ValueError)
        if history is None:
            assert str(error).startswith(("cannot append to ", "cannot write a history with "))
            assert "\n" not in str(error)
            assert os.listdir(folder) == [FILE_NAME]
            assert path.read_bytes() == data
            return
        with history:
            _, error = tried(lambda: history.append(REPORT, first), ValueError)
            if error is not None:
                assert str(error).startswith("cannot write a history with step=")
                history.append(REPORT)
            history.append(REPORT)
        if unreadable is not None and "reads format" in str(unreadable):
            assert not any(map(OTHER_FORMAT.match, data.split(b"\n")[:-1]))
            return  # a line that no version writes
        run = read_run(path)
    kept = [] if before is None else before.steps.tolist()
    last = history._last_step
    if error is None and first is not None:
        assert last == first + 1
    elif after is not None:
        assert last == after + 2
    assert run.steps.tolist()[-2:] == [last - 1, last]
    assert set(run.steps[:-2].tolist()) <= {step for step in kept if step < last - 1}
    if after is not None:
        assert not any(after < step < last - 1 for step in run.steps)
    assert run.columns["total_norm"][-1] == 5.0
    assert run.columns["coefficient"][-1] == 0.5


@pytest.mark.parametrize("at", [0, 3])
def test_a_later_format_is_refused(tmp_path: Path, at: int) -> None:
    """Its rows would be lost: readers refuse the file."""
    lines = WHOLE.splitlines(keepends=True)
    lines.insert(at, b'{"history": 2, "distclip": "9.0"}\n')
    (tmp_path / FILE_NAME).write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=r"cannot append to .* format 2, of which distclip"):
        History(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == b"".join(lines)


def test_a_step_of_too_many_digits_is_none(tmp_path: Path) -> None:
    """Readers leave out such a line, and would leave out those that count on from it."""
    line = b'{"step": ' + b"9" * 40 + b', "x": 1}\n{"history": 1, "after": ' + b"9" * 40 + b"}\n"
    (tmp_path / FILE_NAME).write_bytes(WHOLE + line)
    with History(tmp_path) as history:
        history.append(REPORT)
    assert read_run(tmp_path).steps.tolist() == [*range(1, 16)]


@pytest.mark.timeout(60)
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE_NAME)
    with pytest.raises(ValueError, match="it is no file"):
        History(tmp_path)


@pytest.mark.parametrize("step", [10**18, -1, True, 1.0, "3"])
def test_steps_that_no_reader_takes_are_refused(tmp_path: Path, step: Any) -> None:
    with History(tmp_path) as history:
        with pytest.raises(ValueError, match=r"step=.*whole numbers from 0, of at most 18"):
            history.append(REPORT, step=step)
        with pytest.raises(ValueError, match=r"after=.*whole numbers from 0, of at most 18"):
            History(tmp_path, after=step)
        history.append(REPORT, step=10**18 - 1)
    assert len(read_run(tmp_path).steps) == 1
