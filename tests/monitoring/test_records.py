"""What is read of a history.jsonl: of damaged, foreign and newer files too."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distclip.monitoring.lines import FORMAT, line_of
from distclip.monitoring.records import HistoryError, Run, read_run

HEADER = line_of({"history": FORMAT, "distclip": "0.1.0", "started": "2026-11-26"})


def row(step: int, norm: float = 2.0, **more: Any) -> bytes:
    figures = {"total_norm": norm, "limit": 1.0, "coefficient": 1 / norm if norm else 1.0}
    flags = {"clipped": norm > 1, "finite": math.isfinite(norm)}
    return line_of({"step": step, **figures, **flags, **more})


def read(folder: Path, *lines: bytes) -> Run:
    (folder / "history.jsonl").write_bytes(b"".join(lines))
    return read_run(folder)


def refusal(path: Path) -> str:
    with pytest.raises(HistoryError) as caught:
        read_run(path)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_columns(tmp_path: Path) -> None:
    rows = [row(1, 2.0, loss=3.0), row(2, math.nan, lr=0.1, note="x"), row(3, math.inf, loss=True)]
    run = read(tmp_path, HEADER, *rows)
    assert run.name == tmp_path.name
    assert run.path == tmp_path / "history.jsonl"
    assert run.steps.tolist() == [1, 2, 3]
    np.testing.assert_equal(run.columns["total_norm"], [2.0, math.nan, math.inf])
    np.testing.assert_equal(run.columns["loss"], [3.0, math.nan, 1.0])
    np.testing.assert_equal(run.columns["lr"], [math.nan, 0.1, math.nan])
    assert run.clipped.tolist() == [True, False, True]
    assert run.finite.tolist() == [True, False, False]
    assert "note" not in run.columns
    assert "step" not in run.columns
    assert (run.num_broken, run.num_replaced, run.versions) == (0, 0, ("0.1.0",))


def test_groups_tensors_and_who_was_not_finite(tmp_path: Path) -> None:
    group = {"norm": 1.0, "limit": math.inf, "coefficient": 1.0}
    run = read(
        tmp_path,
        HEADER,
        row(1, tensor_norms={"a": 1.0, "b": 2.0}),
        row(2, groups={"experts": group}),
        row(3, tensor_norms={"b": 3.0, "c": math.nan}, nonfinite_parameters={"c": [2]}),
    )
    assert run.tensors.names == ("a", "b", "c")
    assert run.tensors.rows.tolist() == [0, 2]
    nan = math.nan
    np.testing.assert_equal(run.tensors.norms, [[1.0, 2.0, nan], [nan, 3.0, nan]])
    np.testing.assert_equal(run.groups["experts"]["limit"], [nan, math.inf, nan])
    assert run.nonfinite == {2: {"c": [2]}}


def test_where_steps_go_back_the_later_rows_hold(tmp_path: Path) -> None:
    first = [row(step, 1.0) for step in range(1, 6)]
    run = read(tmp_path, HEADER, *first, HEADER, row(4, 9.0), row(5, 9.0), row(5, 8.0))
    assert run.steps.tolist() == [1, 2, 3, 4, 5]
    assert run.columns["total_norm"].tolist() == [1.0, 1.0, 1.0, 9.0, 8.0]
    assert run.num_replaced == 3
    anew = line_of({"history": FORMAT, "distclip": "0.2.0", "after": 2})
    run = read(tmp_path, HEADER, *first, anew)
    assert run.steps.tolist() == [1, 2]
    assert run.versions == ("0.1.0", "0.2.0")


DAMAGED = {
    "cut": row(2)[:-20] + b"\n",
    "zeros": bytes(40) + b"\n",
    "null": b"null\n",
    "a list": b"[2]\n",
    "nothing in it": b"{}\n",
    "no UTF-8": b'{"step": 2, "\x85": 1}\n',
    "nested": b"[" * 100_000 + b"\n",
    "a step that is text": row(2).replace(b'"step": 2', b'"step": "2"'),
    "a step that is a flag": row(2).replace(b'"step": 2', b'"step": true'),
    "a step below 0": row(2).replace(b'"step": 2', b'"step": -2'),
    "a step of 30 digits": row(2).replace(b'"step": 2', b'"step": ' + b"9" * 30),
    "no limit": row(2).replace(b"limit", b"limits"),
    "a norm that is text": row(2).replace(b"2.0", b'"2.0"'),
    "a flag that is a number": row(2).replace(b"true", b"1"),
    "groups that are none": row(2, groups={"a": {"norm": 1.0}}),
    "tensor norms that are text": row(2, tensor_norms={"a": "x"}),
    "tensor norms that are a list": row(2, tensor_norms=[1.0]),
    "ranks that are a number": row(2, nonfinite_parameters={"a": 1}),
    "ranks that are no numbers": row(2, nonfinite_parameters={"a": [0, {}]}),
}


@pytest.mark.parametrize("place", ["first", "in the middle", "last"])
@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_left_out_and_counted(damaged: bytes, place: str, tmp_path: Path) -> None:
    lines = [HEADER, row(1), row(3)]
    lines.insert({"first": 0, "in the middle": 2, "last": 3}[place], damaged)
    run = read(tmp_path, *lines)
    assert run.steps.tolist() == [1, 3]
    assert run.num_broken == 1


def test_a_header_that_is_damaged_hides_no_row(tmp_path: Path) -> None:
    run = read(tmp_path, HEADER[:-9] + b"\n", row(1))
    assert (run.steps.tolist(), run.num_broken, run.versions) == ([1], 1, ())


def test_a_file_may_end_anywhere(tmp_path: Path) -> None:
    lines = [HEADER, row(1, tensor_norms={"a": 1.0}), row(2)]
    whole = b"".join(lines)
    ends = [sum(map(len, lines[: i + 1])) for i in range(3)]
    for size in range(len(whole) + 1):
        (tmp_path / "history.jsonl").write_bytes(whole[:size])
        if size < ends[1] - 1:  # the newline is no part of the row
            refusal(tmp_path)
            continue
        run = read_run(tmp_path)
        assert run.steps.tolist() == ([1, 2] if size >= ends[2] - 1 else [1])
        assert run.num_broken == (ends[1] < size < ends[2] - 1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)
NAMES = ["step", "total_norm", "tensor_norms", "groups", "nonfinite_parameters", "history", "loss"]
NAMES += ["norm_type"]


@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), JSON).map(
            lambda change: json.dumps({**json.loads(row(1)), change[0]: change[1]}).encode()
        )
        | st.binary(max_size=50),
        max_size=5,
    )
)
def test_any_other_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        run = read_run(path)
    except HistoryError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert len(run.steps) == len(run.columns["total_norm"]) > 0
        assert (np.diff(run.steps) > 0).all()


def test_what_has_no_history(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"{tmp_path}/none does not exist"
    assert re.search(r"has no history.jsonl, which distclip.History writes$", refusal(tmp_path))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "history.jsonl").write_bytes(HEADER + row(1))
    assert refusal(tmp_path).endswith(f"its folders do: {tmp_path}/a, {tmp_path}/b")
    file = tmp_path / "a" / "history.jsonl"
    file.write_bytes(b"")
    assert refusal(tmp_path / "a") == f"{file} is empty"
    file.write_bytes(HEADER)
    assert refusal(tmp_path / "a") == f"{file} has no step yet"
    file.write_bytes(HEADER + row(10**19))
    assert refusal(file) == f"{file} has no step that can be read, but 1 line that cannot"
    file.write_bytes(b"step,loss\n1,2\n")
    assert refusal(file) == f"{file} is no history: distclip.History wrote no line of it"
    file.write_bytes(line_of({"history": 2, "distclip": "9.1\n"}) + row(1))
    assert refusal(file) == (
        f"{file} was written by distclip 9.1 in format 2; this version reads format 1"
    )
    file.unlink()
    file.symlink_to(tmp_path / "gone")
    assert "has no history.jsonl" in refusal(tmp_path / "a")


def test_the_size_of_each_line_is_told(tmp_path: Path) -> None:
    read(tmp_path, HEADER, row(1), b"broken\n")
    sizes: list[int] = []
    read_run(tmp_path, sizes.append)
    assert sum(sizes) == (tmp_path / "history.jsonl").stat().st_size
