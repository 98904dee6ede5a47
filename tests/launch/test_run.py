"""launch.run on one machine: signals, restarts, exit codes. With SLURM: tests/slurm."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch import run as launcher
from launch.signals import STOPPED, USER_ERROR
from tests.launch.conftest import INTERRUPTED
from tests.launch.runs import (
    LAUNCHER,
    ROOT,
    TRAIN,
    children_of,
    command,
    kill,
    popen,
    run,
    wait_for_step,
)
from tests.support.rows import Row, rows_of, without_seconds

pytestmark = pytest.mark.timeout(300)


def test_a_killed_rank_and_then_a_warning_end_at_the_same_bits(
    text: Path, tmp_path: Path, undisturbed: list[Row]
) -> None:
    """The rank starts again from the last checkpoint, and the run that stops is resumed."""
    words = command(text, tmp_path, *INTERRUPTED, launcher=(*LAUNCHER, "--max-restarts=1"))
    with popen(words, stderr=subprocess.DEVNULL) as parent:
        try:
            wait_for_step(30, tmp_path, parent)
            # What a kill in the middle of a checkpoint leaves must not be chosen, whatever it is
            # called.
            for name in ("unfinished-80", "step-0000080"):
                (tmp_path / "checkpoints" / name).mkdir()
            os.kill(max(children_of(parent.pid)), signal.SIGKILL)
            before = len(rows_of(tmp_path))
            wait_for_step(before + 10, tmp_path, parent)
            for warning in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
                parent.send_signal(warning)
            printed, _ = parent.communicate(timeout=200)
        finally:
            kill(parent)
    assert 30 <= before < 80
    assert parent.returncode == STOPPED
    assert "going on after step " in printed
    assert printed.count("asked to stop") == 1
    step = len(rows_of(tmp_path))
    assert before <= step < 100
    assert f"checkpoint of step {step} is complete" in printed

    done = run(command(text, tmp_path, *INTERRUPTED, "--resume"))
    assert done.returncode == 0, done.stderr
    assert f"going on after step {step}," in done.stdout
    assert without_seconds(rows_of(tmp_path)) == undisturbed


def test_a_mistake_is_one_line_from_one_rank_and_not_started_again(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    done = run(command(nowhere, tmp_path / "out", launcher=(*LAUNCHER, "--max-restarts=3")))
    assert done.returncode == USER_ERROR
    assert done.stderr == f"train.py: error: --data {nowhere}: no such folder\n"


def test_a_full_disk_is_one_line_from_one_rank(text: Path, tmp_path: Path) -> None:
    words = command(text, tmp_path, "--steps", "20", "--layout", "fsdp2", "--save-every", "0")
    done = run(["bash", "-c", 'ulimit -f 1; exec "$@"', "_", *words])
    assert done.returncode == USER_ERROR
    assert done.stderr.startswith("train.py: error: ")
    assert "history.jsonl cannot be written: File too large" in done.stderr
    assert done.stderr.count("\n") == 1


FAKE_TORCH = """
import os, signal
numbers = (signal.SIGUSR1, signal.SIGTERM)
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
print([callable(signal.getsignal(n)) for n in numbers], [n in blocked for n in numbers], flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("module", "handled", "blocked"),
    [("launch.train", [True, True], [False, False]), ("launch.run", [False, False], [True, True])],
)
def test_signals_cannot_end_a_process_that_imports_torch(
    tmp_path: Path, module: str, handled: list[bool], blocked: list[bool]
) -> None:
    (tmp_path / "torch.py").write_text(FAKE_TORCH)
    done = run([sys.executable, "-m", module], PYTHONPATH=str(tmp_path))
    assert done.stdout == f"{handled} {blocked}\n", done.stderr


# The rendezvous ----------------------------------------------------------------------------------


def test_a_rendezvous_that_cannot_succeed_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        options = ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=1")
        start = (sys.executable, "-m", "launch.run", *options, f"--rdzv-endpoint={endpoint}")
        done = run([*start, *TRAIN])
    assert done.returncode == USER_ERROR
    said = (
        f"run.py: error: --rdzv-endpoint {endpoint}: the port is taken, perhaps by an earlier run"
    )
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("host", "node_rank", "said"),
    [
        ("nosuch.invalid", 0, "nosuch.invalid has no address here"),
        ("127.0.0.1", 1, "did not reach it in 1 s (Connection refused)"),
    ],
)
def test_a_head_that_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    host: str,
    node_rank: int,
    said: str,
) -> None:
    monkeypatch.setenv(launcher.HEAD_SECONDS, "1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(SystemExit) as caught:
        launcher.check_head(f"{host}:{port}", node_rank)
    assert caught.value.code == USER_ERROR
    printed = capsys.readouterr().err
    assert f"--rdzv-endpoint {host}:{port}: " in printed
    assert said in printed
    assert printed.count("\n") == 1


def test_a_head_with_a_free_port_is_fine() -> None:
    launcher.check_head("127.0.0.1:0", 0)


# launch/torchrun.sh ------------------------------------------------------------------------------


def torchrun_sh(**env: str) -> subprocess.CompletedProcess[str]:
    return run([str(ROOT / "launch" / "torchrun.sh"), *TRAIN], **env)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE=two: a whole number, at least 1"),
        ({"NNODES": "2"}, "NNODES=2: MASTER_ADDR has to name the machine with NODE_RANK 0"),
        ({"NNODES": "2", "SLURM_NNODES": "1"}, "NNODES=2 and this job has 1: sbatch --nodes=2"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1 of NNODES=1: they count from 0"),
    ],
)
def test_torchrun_sh_refuses_what_cannot_be(env: dict[str, str], said: str) -> None:
    done = torchrun_sh(**env)
    assert done.returncode == 2
    line = f"torchrun.sh: error: {said}"
    assert done.stderr == f"{line}\n" or done.stderr.startswith(f"{line}, or")


def test_torchrun_sh_starts_in_the_repository(tmp_path: Path) -> None:
    script = ROOT / "launch" / "torchrun.sh"
    words = [str(script), *TRAIN]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"torchrun.sh: error: {tmp_path} is not the repository: cd {ROOT}\n"


def test_torchrun_sh_says_what_it_took(tmp_path: Path) -> None:
    echo = tmp_path / "python"
    echo.write_text('#!/bin/bash\necho "$GLOO_SOCKET_IFNAME" "$@"\n')
    echo.chmod(0o755)
    machine = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    given = {"CUDA_VISIBLE_DEVICES": "4,5,6", "MAX_RESTARTS": "2", "GLOO_SOCKET_IFNAME": "eth7"}
    done = torchrun_sh(PYTHON=str(echo), **machine, **given)
    assert done.returncode == 0
    assert done.stderr == (
        "torchrun.sh: 3 ranks here (3 GPUs, nccl), machine 1 of 2, rendezvous run at "
        "127.0.0.1:29400, interface eth7, 2 restarts\n"
    )
    options = "--nproc-per-node=3 --max-restarts=2 --nnodes=2 --node-rank=1"
    assert done.stdout.startswith(f"eth7 -m launch.run {options}")
    assert done.stdout.endswith(" -m launch.train\n")
