"""`distclip doctor`: real processes, real frameworks that are broken, real settings that fail."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from distclip import cli
from distclip.adapters.frameworks import MEGATRON
from distclip.cli.doctor import Findings, frameworks, kernels, ranks, versions
from distclip.cli.doctor.apart import Answer, Call, Check, run_apart
from distclip.cli.doctor.finding import Finding
from tests.cli import apart

pytestmark = pytest.mark.ranks
ROOT = Path(__file__).parents[2]
LIMIT_S = 100.0  # of a process, on a loaded machine


def answer(*functions: Callable[..., Any], timeout: float = LIMIT_S) -> list[Answer]:
    """The answers of one check that makes these calls."""
    check = Check("check", [Call(function) for function in functions], lambda answers: [])
    [(same, answers)] = run_apart([check], timeout)
    assert same is check
    return answers


def found(check: Check) -> list[Finding]:
    [(_, answers)] = run_apart([check], LIMIT_S)
    return list(check.read(answers))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Processes.


def test_values_come_from_another_process_with_this_environment(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for value in ("a", "b"):  # the process that forks may have started before
        monkeypatch.setenv("DISTCLIP_TEST", value)
        [one] = answer(apart.two_values)
        assert one.error == ""
        assert one.values[0] != os.getpid()
        assert one.values[1] == value
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (apart.raises, "ValueError: first line"),
        (apart.exits, "SystemExit: 3"),
        (apart.leaves, "the process ended with exit code 4"),
        (apart.crashes, "the process was ended by SIGSEGV"),
    ],
)
def test_what_ends_a_process_is_an_answer(function: Callable[..., Any], error: str) -> None:
    [one] = answer(function)
    assert (one.values, one.error) == ([1], error)


def test_a_process_that_hangs_says_where() -> None:
    [one] = answer(apart.hangs, timeout=3.0)
    assert one.error == "no answer within 3 s: it waits in hangs of apart.py"
    assert not alive(one.values[0])


def test_a_process_that_cannot_end_is_ended() -> None:
    began = time.monotonic()
    [one] = answer(apart.hangs_and_cannot_end, timeout=2.0)
    assert one.error == "no answer within 2 s"
    assert time.monotonic() - began < 60


def test_a_process_does_not_wait_for_one_that_has_failed() -> None:
    began = time.monotonic()
    first, second = answer(apart.hangs, apart.raises)
    assert second.error == "ValueError: first line"
    assert first.error.startswith("no answer")
    assert time.monotonic() - began < LIMIT_S / 2


def test_no_process_is_left_where_the_reader_stops(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    soon = Check("soon", [Call(apart.two_values)], lambda answers: [])
    never = Check("never", [Call(apart.hangs_with_file, (str(path),))], lambda answers: [])
    answers = run_apart([never, soon], LIMIT_S)
    next(iter(answers))
    deadline = time.monotonic() + LIMIT_S / 2
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = int(path.read_text())
    assert alive(pid)
    answers.close()  # type: ignore[attr-defined]
    assert not alive(pid)


# Versions.


@pytest.mark.parametrize(
    ("version", "lowest", "highest", "right"),
    [
        ("2.13.0+cpu", "2.13", "2.13", True),
        ("2.13.1", "2.6", "2.13", True),
        ("2.14.0", "2.6", "2.13", False),
        ("2.5.1", "2.6", "2.13", False),
        ("5.23.0", "5.23.0", "5.23.0", True),
        ("5.23.1", "5.23.0", "5.23.0", False),
        ("0.15.3", "0.15.3", "0.16.1", True),
        ("0.16.10", "0.15.3", "0.16.1", False),
    ],
)
def test_versions_between_two_others(version: str, lowest: str, highest: str, right: bool) -> None:
    assert versions.is_between(version, lowest, highest) == right


@pytest.mark.parametrize(
    ("version", "status", "needed"),
    [("2.5.1", "unusable", True), ("2.13.4", "ok", False), ("2.14.0a0", "warning", False)],
)
def test_a_torch_that_is_too_old_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, version: str, status: str, needed: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    [line] = [one for one in versions.findings() if one.name == "torch"]
    assert (line.status, line.needed) == (status, needed)
    assert version in line.found
    assert bool(line.advice) == (status != "ok")


# Frameworks.


@pytest.fixture
def megatron(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], list[Finding]]:
    """A package megatron.core before all others: its source and its version."""

    def install(source: str, version: str) -> list[Finding]:
        core = tmp_path / "megatron" / "core"
        core.mkdir(parents=True)
        (core / "__init__.py").write_text(source)
        (core / "optimizer.py").write_text("")
        info = tmp_path / f"megatron_core-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: megatron-core\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(frameworks, "MODULES", {MEGATRON: frameworks.MODULES[MEGATRON]})
        [check] = frameworks.checks(str(tmp_path / "store"))
        return [*found(check), *frameworks.absent()]

    return install


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('no GPU')", "RuntimeError: no GPU"),
        ("import something_missing", "ModuleNotFoundError: No module named 'something_missing'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: without a message"),
        ("import ctypes; ctypes.string_at(0)", "the process was ended by SIGSEGV"),
        ("import os; os._exit(0)", "the process ended with exit code 0"),
    ],
)
def test_a_framework_whose_import_fails_is_a_finding(megatron: Any, source: str, said: str) -> None:
    [line] = megatron(source, "0.16.0")
    assert line == Finding(
        "frameworks",
        "megatron-core",
        "unusable",
        f"0.16.0 cannot be used: {said}",
        "pip install --force-reinstall megatron-core==0.16.1; "
        'python -c "import megatron.core" shows all of an import error',
    )


def test_a_framework_that_only_takes_long_gets_more_time() -> None:
    late = Answer(error="no answer within 3 s")
    [line] = frameworks.findings(MEGATRON, [late])
    assert line.status == "unusable"
    assert line.advice.startswith("try again with a longer --timeout; then pip install")


def test_a_tested_framework_is_ok(megatron: Any) -> None:
    assert megatron("", "0.16.0") == [Finding("frameworks", "megatron-core", "ok", "0.16.0")]


def test_an_untested_framework_is_a_warning(megatron: Any) -> None:
    [line] = megatron("", "0.17.0")
    assert line.status == "warning"
    assert line.found == "0.17.0; the adapter is tested with 0.15.3 to 0.16.1"
    assert "pip install megatron-core==0.16.1" in line.advice


def test_a_missing_framework_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = MEGATRON._replace(name="some-trainer")
    monkeypatch.setattr(frameworks, "MODULES", {missing: ["some_trainer"]})
    assert list(frameworks.checks("")) == []
    [line] = frameworks.absent()
    assert (line.status, line.found) == ("absent", "not installed")
    assert line.advice == "to train with it: pip install some-trainer==0.16.1"


def test_an_engine_of_deepspeed_clips(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    [check] = [one for one in frameworks.checks(str(tmp_path / "s")) if one.name == "deepspeed"]
    [line] = found(check)
    assert line.status in ("ok", "warning"), line
    assert "an engine clips to within" in line.found


# Kernels and devices.


def test_the_cpu_is_tried() -> None:
    lines = list(kernels.devices())
    assert lines[0].name == "CPU"
    assert lines[0].status == "ok", lines[0]
    assert "of float64" in lines[0].found
    assert lines[-1].name == "Triton"


def test_an_error_against_float64_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    import distclip

    clip = distclip.clip_grad_norm_
    for factor in (1.0001, float("nan")):
        monkeypatch.setattr(distclip, "clip_grad_norm_", lambda *a, f=factor: clip(*a) * f)
        [cpu, *_] = kernels.devices()
        assert (cpu.status, cpu.needed) == ("unusable", True)
        assert "do not train with it" in cpu.advice


@pytest.mark.parametrize("errors", [[float("nan"), 1.0], [1.0, float("nan")]])
def test_nan_is_the_worst_error(errors: list[float]) -> None:
    assert math.isnan(kernels.worst(errors))


def test_gradients_that_were_not_clipped_are_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    import distclip

    def only_measures(params: Any, limit: float) -> torch.Tensor:
        return distclip.get_total_norm([param.grad for param in params])

    monkeypatch.setattr(distclip, "clip_grad_norm_", only_measures)
    cpu = next(iter(kernels.devices()))
    assert cpu.status == "unusable"


def test_numba_is_compiled_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from distclip.kernels import cpu_numba

    [line] = kernels.numba()
    assert line.status == "ok", line
    monkeypatch.setattr(cpu_numba, "scale_", lambda tensors, coefficient: None)
    [line] = kernels.numba()
    assert line.status == "unusable"


def test_a_broken_numba_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise SystemExit('needs NumPy 2.3 or less')")
    monkeypatch.syspath_prepend(tmp_path)
    [check] = [one for one in kernels.checks() if one.name == "Numba"]
    [line] = found(check)
    assert (line.status, line.needed) == ("unusable", False)
    assert line.found == "SystemExit: needs NumPy 2.3 or less"
    assert "pip uninstall numba" in line.advice


@pytest.mark.parametrize(
    ("cuda", "driver", "status", "said"),
    [
        (None, False, "absent", "training runs on the CPU"),
        (None, True, "warning", "built without CUDA"),
        ("12.8", True, "warning", "finds no GPU"),
        ("12.8", False, "absent", "training runs on the CPU"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cuda: str | None,
    driver: bool,
    status: str,
    said: str,
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(kernels, "_NVIDIA_DRIVER", tmp_path if driver else tmp_path / "none")
    [line] = [one for one in kernels.devices() if one.name == "accelerator"]
    assert line.status == status
    assert said in line.found
    assert bool(line.advice) == (status == "warning")


# Ranks.


def test_a_wrong_norm_on_one_rank_is_found(tmp_path: Path) -> None:
    check = ranks.check("gloo", str(tmp_path / "store"), LIMIT_S)
    wrong = [call._replace(function=apart.clips_wrongly) for call in check.calls]
    lines = {line.name: line for line in found(check._replace(calls=wrong))}
    statuses = {name: line.status for name, line in lines.items()}
    assert statuses == {
        "all-reduce": "ok",
        "DDP": "ok",
        "FSDP1": "unusable",
        "FSDP2": "unusable",
        "DTensor": "ok",
    }
    assert lines["FSDP1"].found == "clips to within 5e-01 of float64"
    assert lines["FSDP2"].found == "clips to within nan of float64"
    assert "do not train with it" in lines["FSDP1"].advice


def test_gloo_without_an_interface_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonexistent")
    [first, *others] = found(ranks.check("gloo", str(tmp_path / "store"), LIMIT_S))
    assert (first.name, first.status, first.needed) == ("all-reduce", "unusable", True)
    assert "Unable to find address for: nonexistent" in first.found
    assert first.advice.startswith("unset GLOO_SOCKET_IFNAME=nonexistent")
    assert "lo" in first.advice
    assert {line.found for line in others} == {"not tried, because all-reduce failed"}


def test_a_rank_that_ends_does_not_keep_the_other(tmp_path: Path) -> None:
    check = ranks.check("gloo", str(tmp_path / "store"), LIMIT_S)
    leaving = [call._replace(function=apart.one_leaves) for call in check.calls]
    began = time.monotonic()
    [first, *_] = found(check._replace(calls=leaving))
    assert first.found == "the process ended with exit code 5"
    assert "set GLOO_SOCKET_IFNAME" in first.advice
    assert time.monotonic() - began < LIMIT_S / 2


@pytest.mark.parametrize(("gpus", "right"), [(0, False), (1, False), (2, True), (8, True)])
def test_nccl_needs_a_gpu_for_each_rank(
    monkeypatch: pytest.MonkeyPatch, gpus: int, right: bool
) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    lines = [Finding("devices", f"CUDA:{index}", "ok", "") for index in range(gpus)]
    assert ranks.can_use_nccl([Finding("devices", "CPU", "ok", ""), *lines]) == right


# The command.


def test_what_is_needed_decides_the_exit_code() -> None:
    lines = [Finding("devices", "CPU", "ok", "", needed=True)]
    assert Findings(lines).exit_code == 0
    lines.append(Finding("frameworks", "x", "unusable", "broken", "reinstall it"))
    assert Findings(lines).exit_code == 0
    lines.append(Finding("2 local ranks, gloo", "DDP", "unusable", "broken", "", needed=True))
    assert Findings(lines).exit_code == 1
    assert Findings(lines).to_dict()["usable"] is False


def test_lines_fit_a_terminal_and_show_all_of_the_text() -> None:
    lines = [
        Finding("devices", "CPU", "ok", "[red]2 cores"),
        Finding("frameworks", "a", "unusable", "word " * 60, "do this " * 30 + "x" * 200),
        Finding("frameworks", "b", "warning", "old", "pip install b"),
        Finding("frameworks", "c", "absent", "not installed"),
    ]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(Findings(lines))
    shown = captured.get()
    assert max(map(len, shown.splitlines())) <= 80
    assert "[red]2 cores" in shown
    assert shown.count("word") == 60
    assert "".join(shown.split()).count("x" * 200) == 1
    assert "-> pip install b" in shown
    assert "What distclip needs works here; 1 with a warning, 1 not usable." in shown


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_timeout_that_is_none_is_one_line(
    capsys: pytest.CaptureFixture[str], seconds: str
) -> None:
    assert cli.main(["doctor", "--timeout", seconds]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("distclip doctor: error: ")
    assert "--timeout" in shown.err
    assert shown.err.count("\n") == 1


WITHOUT_FRAMEWORKS = """
import signal, sys
from distclip.cli import main
from distclip.cli.doctor import frameworks
if __name__ == "__main__":
    # What a shell runs in the background ignores Ctrl-C, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    frameworks.MODULES.clear()  # their imports take half a minute
    sys.exit(main(["doctor", *sys.argv[1:]]))
"""


def start(tmp_path: Path, *words: str, **env: str) -> subprocess.Popen[str]:
    script = tmp_path / "doctor.py"
    script.write_text(WITHOUT_FRAMEWORKS)
    return subprocess.Popen(
        [sys.executable, str(script), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )


def test_the_command_tries_everything_and_prints_one_json_object(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(frameworks, "MODULES", {})  # their imports take half a minute
    code = cli.main(["doctor", "--json"])
    out, err = capfd.readouterr()
    assert code == 0, out
    shown = json.loads(out)
    assert shown["usable"] is True
    sections = dict.fromkeys(check["section"] for check in shown["checks"])
    assert [*sections] == ["versions", "devices", "kernels", "backends", "2 local ranks, gloo"]
    for check in shown["checks"]:
        assert set(check) == {"section", "name", "status", "found", "advice", "needed"}
    ranks = [check for check in shown["checks"] if check["section"] == "2 local ranks, gloo"]
    assert [one["name"] for one in ranks] == ["all-reduce", "DDP", "FSDP1", "FSDP2", "DTensor"]
    assert {(one["status"], one["needed"]) for one in ranks} == {("ok", True)}, ranks
    assert [line.partition(":")[0] for line in err.splitlines()] == ["checking"] * 3


def test_the_exit_code_is_1_where_ranks_cannot_connect(tmp_path: Path) -> None:
    process = start(tmp_path, GLOO_SOCKET_IFNAME="nonexistent", COLUMNS="80")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, (out, err)
    assert "Traceback" not in err
    assert "-> unset GLOO_SOCKET_IFNAME=nonexistent" in out
    assert "Something that distclip needs does not work here: 2 local ranks, gloo." in out
    assert max(map(len, out.splitlines())) <= 80


def test_ctrl_c_ends_it_quietly_with_all_its_processes(tmp_path: Path) -> None:
    process = start(tmp_path)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("checking: 1 of 3")
    children = _children(process.pid)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    deadline = time.monotonic() + 30
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, children))


def _children(pid: int) -> list[int]:
    paths = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for path in paths for child in path.read_text().split()]
    return found + [grandchild for child in found for grandchild in _children(child)]
