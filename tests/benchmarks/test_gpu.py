"""`benchmarks.gpu`: every section runs, none takes others with it, each leaves what it found."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import gpu, gpu_report
from benchmarks.gpu import Options, Section
from benchmarks.gpu_device import Record, Session

ROOT = Path(__file__).parents[2]
LIMIT = 600  # seconds of a dry run; about 100 on two idle cores
ON_CPU = Options("cpu", tiny=True)

pytestmark = pytest.mark.timeout(2 * LIMIT)


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """`main` sets variables for the processes of the sections."""
    with mock.patch.dict(os.environ):
        yield


# A machine with a GPU that has torch, Triton and pytest, and little else. In every process.
BARE_MACHINE = """
import sys
MISSING = {"tyro", "rich", "matplotlib", "hypothesis", "deepspeed", "megatron", "torchtitan",
           "numba", "accelerate", "transformers", "pytest_timeout", "xdist"}
class Finder:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in MISSING:
            return self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Finder, sys.meta_path)
"""


def on_bare_machine(
    folder: Path, *arguments: str, without: str = ""
) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(f"{BARE_MACHINE}MISSING.add({without!r})\n")
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def records_in(folder: Path) -> list[Record]:
    (path,) = folder.glob("gpu-*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


# The whole run ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dry_run_of_every_section_on_a_bare_machine(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = on_bare_machine(
        tmp_path, "benchmarks.gpu", "--device", "cpu", "--seconds", "3000", "--out", str(out)
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    records = records_in(out)
    assert records[0]["section"] == "facts"
    assert "dry run" in records[0]["card"]
    assert not [r for r in records if gpu_report.is_wrong(r) or "skipped" in r]
    ended = [record["section"] for record in records if "took_s" in record]
    assert ended == [section.name for section in gpu.SECTIONS]
    checked = {record["section"] for record in records if record.get("right")}
    timed = {record["section"] for record in records if "device_us" in record}
    only_timed = {"launches", "folding", "bandwidth", "compiled"}
    assert checked == set(ended) - only_timed
    assert timed >= only_timed
    (result,) = out.glob("gpu-*.md")
    text = result.read_text()
    assert all(f"| {name} |" in text for name in ended)
    assert f"torch {torch.__version__}" in text
    shown = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert shown == records


# Triton's interpreter needs numpy; a device does not.
@pytest.mark.parametrize(
    ("names", "without"),
    [(["test_gpu.py"], "numpy"), (["kernels/test_cuda.py", "kernels/test_tensor_table.py"], "")],
    ids=["without numpy", "kernels"],
)
def test_the_tests_for_a_device_are_collected_on_a_bare_machine(
    names: list[str], without: str, tmp_path: Path
) -> None:
    """With the strict settings of pyproject.toml, although plugins are missing too."""
    options = ("--collect-only", "-q", "-p", "no:cacheprovider")
    files = [f"tests/{name}" for name in names]
    run = on_bare_machine(tmp_path, "pytest", *options, *files, without=without)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert all(f"{file}::test_" in run.stdout for file in files)


def test_without_a_device_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert gpu.main([]) == 2
    shown = capsys.readouterr()
    assert shown.err.strip() == f"benchmarks.gpu: {gpu.NO_DEVICE}"
    assert shown.out == ""


def test_a_section_that_is_not_there_ends_with_one_line() -> None:
    with pytest.raises(SystemExit, match="no such section among first_calls"):
        gpu.main(["--device", "cpu", "--only", "int8"])


# What goes wrong ----------------------------------------------------------------------------------


def passes(session: Session) -> None: ...


def raises(session: Session) -> None:
    session.check("before", True)
    raise ValueError("this section is wrong")


def crashes(session: Session) -> None:
    session.check("before", True)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(session: Session) -> None:
    session.check("before", True)
    time.sleep(600)


def one_rank_hangs(session: Session) -> None:
    session.say(what=f"rank {session.rank} of {session.num_ranks}")
    if session.rank:
        time.sleep(600)


@pytest.fixture(scope="module")
def _forkserver() -> None:
    """Its start takes long on a loaded machine."""
    list(gpu.run_section(Section(passes, 1), ON_CPU, limit_s=LIMIT))


@pytest.mark.usefixtures("_forkserver")
@pytest.mark.parametrize(
    ("run", "message"),
    [
        (raises, "ValueError: this section is wrong"),
        (crashes, f"exit code -{int(signal.SIGSEGV)}"),
        (hangs, "ended after 12 s; 1 s were expected"),
    ],
)
def test_a_section_that_fails_is_said_to_and_is_over(
    run: Callable[[Session], None], message: str
) -> None:
    began = time.monotonic()
    records = list(gpu.run_section(Section(run, 1), ON_CPU, limit_s=12))
    assert time.monotonic() - began < 30
    assert records[0] == {"section": run.__name__, "check": "before", "right": True}
    (failure,) = [record["error"] for record in records if "error" in record]
    assert failure.strip().endswith(message)
    assert list(records[-1]) == ["section", "took_s"]


@pytest.mark.usefixtures("_forkserver")
def test_a_rank_that_hangs_is_ended_with_the_others() -> None:
    records = list(gpu.run_section(Section(one_rank_hangs, 1, num_ranks=2), ON_CPU, limit_s=12))
    assert records[0]["what"] == "rank 0 of 2"
    assert "ended after 12 s" in records[1]["error"]


def test_what_does_not_fit_into_the_time_is_said_to_be_skipped() -> None:
    records = list(gpu.run_all(gpu.SECTIONS, ON_CPU, seconds=4.0))
    assert [record["section"] for record in records] == [each.name for each in gpu.SECTIONS]
    needed = gpu.SECTIONS[0].seconds
    assert records[0]["skipped"] == f"needs about {needed} s, and 4 s are left"
    assert all("skipped" in record for record in records)


def test_all_sections_are_expected_to_fit_into_nine_minutes() -> None:
    assert sum(section.seconds for section in gpu.SECTIONS) + gpu.START_S < gpu.SECONDS < 540


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ({"section": "sums", "check": "one", "right": True}, 0),
        ({"section": "sums", "check": "one", "right": False}, 1),
        ({"section": "sums", "error": "ValueError"}, 1),
        ({"section": "sums", "goal": "us", "found": 2.0, "at_most": 1.0, "reached": False}, 0),
        ({"section": "sums", "skipped": "no time"}, 0),
    ],
)
def test_the_exit_code_tells_whether_something_is_wrong(
    record: Record, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "run_all", lambda *given: iter([record]))
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == code
    assert records_in(tmp_path)[1:] == [record]


def test_a_run_that_is_cut_off_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"section": "sums", "check": "one", "right": True, "norm": [math.nan], "of": 1 / 3}

    def cut_off(*given: object) -> Iterator[Record]:
        yield record
        assert records_in(tmp_path)[1]["check"] == "one"
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "run_all", cut_off)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--device", "cpu", "--out", str(tmp_path)])
    assert records_in(tmp_path)[1:] == [{**record, "norm": ["nan"], "of": 0.333333}]
