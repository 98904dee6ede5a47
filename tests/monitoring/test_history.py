"""What `distclip.History` writes, when, and what it does where it cannot."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from distclip import History
from distclip.monitoring.records import read_run
from tests.support import accelerator
from tests.support.accelerator import NAME, Accelerator
from tests.support.ranks import Ranks

ROOT = Path(__file__).parents[2]


def clipper_of(
    *names: str, device: str = "cpu", **options: Any
) -> tuple[distclip.Clipper, list[Tensor]]:
    params = [nn.Parameter(torch.zeros(2, device=device)) for _ in names]
    return distclip.Clipper(zip(names, params, strict=True), **options), params


def report_of(norm: float, limit: float = 1.0) -> distclip.Report:
    clipper, (param,) = clipper_of("w", policy=distclip.ClipNorm(limit))
    param.grad = torch.tensor([0.0, norm])
    return clipper.clip_()


def lines(history: History) -> list[dict[str, Any]]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = history.path.read_text().splitlines()
    return [json.loads(line, parse_constant=no_constant) for line in text]


def test_a_row_has_the_figures_of_its_report(tmp_path: Path) -> None:
    with History(tmp_path / "new" / "folder") as history:
        for step in range(1, 4):
            loss = torch.tensor([step / 3])
            history.append(report_of(2.0 * step), lr=0.1, loss=loss, phase="warm-up")
            loss.zero_()
    header, *rows = lines(history)
    assert header["history"] == 1
    assert header["distclip"] == distclip.__version__
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        norm = 2.0 * row["step"]
        assert row["total_norm"] == norm
        assert row["limit"] == 1.0
        assert row["coefficient"] == pytest.approx(1 / norm, rel=1e-7)
        assert (row["clipped"], row["finite"], row["lr"]) == (True, True, 0.1)
        assert row["loss"] == pytest.approx(row["step"] / 3, rel=1e-7)
        assert row["phase"] == "warm-up"
        assert not {"groups", "tensor_norms", "nonfinite_parameters"} & row.keys()


def test_float32_numbers_are_read_back_exactly(tmp_path: Path) -> None:
    numbers = torch.randn(200, generator=torch.Generator().manual_seed(0)).exp()
    with History(tmp_path) as history:
        for number in numbers:
            history.append(report_of(1.0), number=number)
    read = torch.tensor([row["number"] for row in lines(history)[1:]], dtype=torch.float64)
    assert torch.equal(read.float(), numbers)


def test_groups_and_tensor_norms(tmp_path: Path) -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    groups = [
        {"params": [("a", a)], "name": "first", "policy": distclip.ClipNorm(1.0)},
        {"params": [("b", b)], "name": "second", "policy": distclip.ClipNorm(math.inf)},
    ]
    clipper = distclip.Clipper(groups, tensor_norms=2)
    with History(tmp_path) as history:
        for _ in range(2):
            a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 12.0])
            history.append(clipper.clip_())
    _, first, second = lines(history)
    assert first["total_norm"] == 13.0
    assert first["groups"] == {
        "first": {"norm": 5.0, "limit": 1.0, "coefficient": pytest.approx(0.2)},
        "second": {"norm": 12.0, "limit": "Infinity", "coefficient": 1.0},
    }
    assert first["tensor_norms"] == {"a": 5.0, "b": 12.0}
    assert "tensor_norms" not in second


def test_numbers_that_json_lacks(tmp_path: Path) -> None:
    with History(tmp_path) as history:
        history.append(report_of(math.nan), loss=-math.inf, nonfinite_parameters={"w": [3]})
        history.append(report_of(math.inf), loss=torch.tensor(math.nan))
    _, first, second = lines(history)
    assert (first["total_norm"], first["loss"], first["finite"]) == ("NaN", "-Infinity", False)
    assert first["nonfinite_parameters"] == {"w": [3]}
    assert (second["total_norm"], second["loss"]) == ("Infinity", "NaN")


def test_a_later_start_goes_on(tmp_path: Path) -> None:
    for after in (None, None, 3):
        with History(tmp_path, after=after) as history:
            for _ in range(2):
                history.append(report_of(2.0))
    assert [row["step"] for row in lines(history) if "step" in row] == [1, 2, 3, 4, 4, 5]
    assert list(read_run(tmp_path).steps) == [1, 2, 3, 4, 5]
    with History(tmp_path, after=1) as history:
        pass  # ended before its first step
    assert list(read_run(tmp_path).steps) == [1]
    with History(tmp_path) as history:
        history.append(report_of(2.0))
    assert list(read_run(tmp_path).steps) == [1, 2]


def test_a_line_that_was_cut_is_left_out_by_the_next_start(tmp_path: Path) -> None:
    with History(tmp_path) as history:
        history.append(report_of(2.0))
    with history.path.open("a") as file:
        file.write('{"step": 7, "total_norm": 2.0, "li')
    with History(tmp_path) as history:
        history.append(report_of(3.0))
    assert [row["step"] for row in lines(history) if "step" in row] == [1, 2]
    assert read_run(tmp_path).num_broken == 0


def test_an_earlier_start_that_still_runs_writes_no_more(tmp_path: Path) -> None:
    earlier = History(tmp_path)
    earlier.append(report_of(2.0))
    with History(tmp_path) as later:
        with pytest.warns(UserWarning, match="belongs to a later start of this run"):
            earlier.append(report_of(9.0))
        earlier.append(report_of(9.0))  # warned once
        assert "later start" in str(earlier.failure)
        later.append(report_of(3.0))
    earlier.close()
    assert list(read_run(tmp_path).columns["total_norm"]) == [2.0, 3.0]


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut can leave the name with an empty file, and no earlier row."""
    with History(tmp_path) as history:
        history.append(report_of(2.0))
    synced: list[bytes] = []

    def fsync(file: int) -> None:
        path = Path(f"/proc/self/fd/{file}")
        assert path.readlink().name == "history.tmp"
        synced.append(path.read_bytes())

    monkeypatch.setattr(os, "fsync", fsync)
    with History(tmp_path) as history:
        assert synced == [history.path.read_bytes()]


def test_a_full_disk_ends_the_history_and_not_the_training(tmp_path: Path) -> None:
    with History(tmp_path) as history:
        for _ in range(3):
            history.append(report_of(2.0))
        full = limited_files(history.path.stat().st_size + 30)
        with full, pytest.warns(UserWarning, match="Training goes on, and no later") as warned:
            history.append(report_of(9.0))
        history.append(report_of(9.0))
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert str(history.path) in str(history.failure)
    run = read_run(tmp_path)
    assert list(run.columns["total_norm"]) == [2.0] * 3
    assert run.num_broken == 1  # what fitted of the fourth line


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("text", ['{"loss": 1}\n', "step,loss\n1,2\n", "\n"])
def test_a_file_of_another_program_is_not_touched(text: str, tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text(text)
    with pytest.raises(ValueError, match="not written by distclip"):
        History(tmp_path)
    assert (tmp_path / "history.jsonl").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["history.jsonl"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        History(tmp_path / "file")


def test_numbers_of_other_libraries(tmp_path: Path) -> None:
    with History(tmp_path) as history:
        history.append(report_of(1.0), lr=np.float32(0.5), epoch=np.int64(3), part=Fraction(1, 4))
    row = lines(history)[-1]
    assert (row["lr"], row["epoch"], row["part"]) == (0.5, 3, 0.25)


BAD_VALUES = {
    "a list": [1.0],
    "None": None,
    "two elements": torch.zeros(2),
    "complex": torch.zeros((), dtype=torch.complex64),
}


@pytest.mark.parametrize("value", BAD_VALUES.values(), ids=BAD_VALUES)
def test_values_that_cannot_be_written(value: Any, tmp_path: Path) -> None:
    with History(tmp_path) as history:
        with pytest.raises(TypeError, match="cannot append loss="):
            history.append(report_of(1.0), loss=value)
        history.append(report_of(1.0))
    assert [row["step"] for row in lines(history)[1:]] == [1]


def test_nonfinite_parameters_that_are_none(tmp_path: Path) -> None:
    with History(tmp_path) as history, pytest.raises(TypeError, match="Pass what `report"):
        history.append(report_of(1.0), nonfinite_parameters=["w"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["total_norm", "clipped", "groups", "tensor_norms", "history"])
def test_names_of_figures_are_refused(name: str, tmp_path: Path) -> None:
    with History(tmp_path) as history, pytest.raises(ValueError, match="Choose another name"):
        history.append(report_of(1.0), **{name: 1.0})


@pytest.mark.parametrize("step", [-1, 1.0, "1", True])
def test_steps_are_whole_numbers(step: Any, tmp_path: Path) -> None:
    with History(tmp_path) as history, pytest.raises(ValueError, match="Pass an int"):
        history.append(report_of(1.0), step)
    with pytest.raises(ValueError, match="Pass an int"):
        History(tmp_path, after=step)


def test_only_reports(tmp_path: Path) -> None:
    with History(tmp_path) as history, pytest.raises(TypeError, match="Pass the report that"):
        history.append(torch.tensor(1.0))  # type: ignore[arg-type]


class Recorder:
    def __init__(self, fails_in: int = 0) -> None:
        self.rows: list[tuple[int, Mapping[str, Any]]] = []
        self.fails_in, self.num_closed = fails_in, 0

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        if step == self.fails_in:
            raise ConnectionError("no network")
        self.rows.append((step, row))

    def close(self) -> None:
        self.num_closed += 1
        if self.fails_in < 0:
            raise ConnectionError("no network")


def test_writers_get_each_row_and_one_that_fails_is_left_out(tmp_path: Path) -> None:
    good, bad = Recorder(), Recorder(fails_in=2)
    with History(tmp_path, writers=[bad, good]) as history:
        history.append(report_of(2.0), loss=1.5)
        with pytest.warns(UserWarning, match="Recorder failed in step 2: ConnectionError: no net"):
            history.append(report_of(3.0))
        history.append(report_of(math.nan))
    assert [step for step, _ in bad.rows] == [1]
    assert [row["total_norm"] for _, row in good.rows[:2]] == [2.0, 3.0]
    assert math.isnan(good.rows[2][1]["total_norm"])
    assert good.rows[0][1]["loss"] == 1.5
    assert good.num_closed == bad.num_closed == 1
    assert len(read_run(tmp_path).steps) == 3


def test_a_writer_that_cannot_be_closed_is_a_warning(tmp_path: Path) -> None:
    bad, good = Recorder(fails_in=-1), Recorder()
    history = History(tmp_path, writers=[bad, good])
    history.append(report_of(2.0))
    with pytest.warns(UserWarning, match="Recorder failed as it was closed: ConnectionError"):
        history.close()
    history.close()
    assert good.num_closed == bad.num_closed == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_closed_history_takes_no_more_on_any_rank(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    history = History(tmp_path)
    history.close()
    with pytest.raises(ValueError, match="it is closed"):
        history.append(report_of(2.0))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_two_never_write_to_one_file(duplicate: Any, tmp_path: Path) -> None:
    with History(tmp_path) as history, pytest.raises(TypeError, match="cannot pickle or copy"):
        duplicate(history)


def append_without_a_rank(folder: str) -> str:
    """As where a program makes the history first, and then its process group."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RANK")
        patch.setattr(dist, "is_initialized", lambda: False)
        history = History(f"{folder}/{dist.get_rank()}")
    with history, pytest.raises(RuntimeError) as raised:
        history.append(report_of(1.0))
    return str(raised.value).replace(str(history.path), "")


def test_every_rank_raises_where_none_knew_its_rank(four_ranks: Ranks, tmp_path: Path) -> None:
    (text,) = set(four_ranks.run(append_without_a_rank, str(tmp_path)))
    assert "made before the process group" in text


def append_on_ranks(folder: str) -> tuple[bool, str]:
    history = History(folder)
    clipper, (param,) = clipper_of("w", policy=distclip.ClipNorm(1.0))
    param.grad = torch.full((2,), float(dist.get_rank()))
    report = clipper.clip_()
    history.append(report, loss=torch.tensor(float(dist.get_rank())))
    try:
        history.append(report, loss=[1.0])  # type: ignore[arg-type]
    except TypeError as error:
        refused = str(error)
    history.close()
    return history._file is None, refused


def test_rank_0_writes_and_all_check(four_ranks: Ranks, tmp_path: Path) -> None:
    answers = four_ranks.run(append_on_ranks, str(tmp_path))
    assert len(set(answers)) == 1
    assert "cannot append loss=[1.0]" in answers[0][1]
    assert read_run(tmp_path).columns["loss"].tolist() == [0.0]


def test_before_there_is_a_process_group_torchrun_says_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with History(tmp_path) as history:
        history.append(report_of(1.0))
    assert not history.path.exists()


KILLED = """
import sys, torch, distclip
weight = torch.nn.Parameter(torch.zeros(2))
others = [(f"layer.{i}.weight", torch.nn.Parameter(torch.zeros(1))) for i in range(100)]
clipper = distclip.Clipper([*others, ("w", weight)], distclip.ClipNorm(1.0), tensor_norms=True)
history = distclip.History(sys.argv[1])
print("ready", flush=True)
while True:
    weight.grad = torch.ones(2)
    history.append(clipper.clip_())
"""


def test_a_kill_loses_no_row_and_cuts_at_most_the_last(tmp_path: Path) -> None:
    before = 0
    for start in range(3):
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.2 + 0.013 * start)
            process.kill()
        *whole, last = (tmp_path / "history.jsonl").read_bytes().split(b"\n")
        steps = [row["step"] for line in whole if "step" in (row := json.loads(line))]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) > before
        before = len(steps)
        run = read_run(tmp_path)
        assert list(run.steps) == steps
        assert run.num_broken == bool(last)


needs_compiler = pytest.mark.skipif(
    not accelerator.can_be_built(), reason=f"no compiler ({accelerator.COMPILER}) here"
)


def append_late(folder: str) -> list[int]:
    """The number of rows in the file after each step, on a device whose copies arrive late."""
    clipper, (param,) = clipper_of("w", device=f"{NAME}:1", policy=distclip.ClipNorm(1.0))
    history = History(folder)
    loss, on_host = torch.zeros((), device=f"{NAME}:1"), torch.zeros(())
    found = []
    for step in range(1, 9):
        param.grad = torch.tensor([0.0, float(step)]).to(param)
        history.append(clipper.clip_(), loss=loss.fill_(step), on_host=on_host.fill_(step))
        found.append(history.path.read_text().count('"step"'))
    history.flush()
    found.append(history.path.read_text().count('"step"'))
    history.close()
    return found


@pytest.mark.ranks
@needs_compiler
def test_rows_of_an_accelerator_are_written_when_they_have_arrived(
    tmp_path: Path, on_accelerator: Accelerator
) -> None:
    (found,) = on_accelerator.run(append_late, str(tmp_path))
    assert found[0] == 0, "the first row was waited for"
    assert found == sorted(found)
    assert found[-1] == 8
    columns = read_run(tmp_path).columns
    for name in ("total_norm", "loss", "on_host"):
        assert columns[name].tolist() == [*range(1, 9)], name


AT_EXIT = """
import sys
from pathlib import Path
from tests.support import accelerator
accelerator.install(str(accelerator.built()))
import torch, distclip
weight = torch.nn.Parameter(torch.zeros(2, device="toy"))
clipper = distclip.Clipper([weight], distclip.ClipNorm(1.0))
history = distclip.History(sys.argv[1])
for _ in range(3):
    weight.grad = torch.ones(2).to("toy")
    history.append(clipper.clip_())
assert history.path.read_text().count('"step"') < 3
"""


@pytest.mark.ranks
@needs_compiler
def test_the_end_of_the_program_writes_the_last_rows(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", AT_EXIT, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list(read_run(tmp_path).steps) == [1, 2, 3]


def waits_of_append(folder: str) -> list[str]:
    from tests.support.host_waits import Watch

    clipper, (param,) = clipper_of(
        "w", device=NAME, policy=distclip.ClipNorm(1.0), tensor_norms=True
    )
    history = History(folder)
    loss = torch.zeros((), device=NAME)
    param.grad = torch.ones(2).to(param)
    report = clipper.clip_()
    with Watch() as watch:
        for _ in range(4):
            history.append(report, loss=loss)
    history.close()
    return [seen.what for seen in watch.waits]


@pytest.mark.ranks
@needs_compiler
def test_append_never_waits(tmp_path: Path, on_accelerator: Accelerator) -> None:
    assert on_accelerator.run(waits_of_append, str(tmp_path)) == [[]]
