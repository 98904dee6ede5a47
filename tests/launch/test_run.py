"""How a run starts, is told to stop, and starts again: on one machine, without SLURM (that is tests/slurm/)."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.launch.test_train import ENVIRONMENT, LAUNCH, TINY, children_of, kill, numbers, rows_of, run

STOPPED = 75
OPTIONS = ("--policy", "zclip", "--steps", "150", "--save-every", "20", "--layout", "fsdp2")
pytestmark = pytest.mark.timeout(300)

# A start of a run that has been taken over, by another that claims the folder between its two halves of saving.
TAKEN_OVER = """
import sys
from pathlib import Path
import checkpoint, ranks, torch
from torch.distributed.checkpoint.stateful import Stateful

class Part(Stateful):
    value = torch.zeros(1)
    def state_dict(self): return {"value": self.value}
    def load_state_dict(self, state): self.value = state["value"]

folder, when = Path(sys.argv[1]), sys.argv[2]
ranks.join(torch.device("cpu"), 30.0)
part = Part()
parts = {"part": part}
first = checkpoint.claim(folder, everything=True)
for step in (1, 2, 3):
    part.value = torch.full((1,), float(step))
    checkpoint.save(folder, first, step, parts, {})
assert [path.name for path in checkpoint.complete(folder)] == ["step-0000002", "step-0000003"]
second = {}
if when == "before":
    second["token"] = checkpoint.claim(folder, everything=False)
else:  # the ranks of the first have written their parts, and rank 0 is about to complete them
    write, checkpoint._complete = checkpoint._complete, lambda *args: (
        second.update(token=checkpoint.claim(folder, everything=False)), write(*args))
try:
    checkpoint.save(folder, first, 4, parts, {})
except ranks.UserError as error:
    print(error)
else:
    sys.exit("the earlier start completed a checkpoint")
if when == "between":
    checkpoint._complete = write
assert not list(folder.glob("unfinished-*"))
assert checkpoint.load(folder, parts, {}) == 3 and part.value.item() == 3
checkpoint.save(folder, second["token"], 4, parts, {})
assert checkpoint.load(folder, parts, {}) == 4
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.py").write_text(Path(subprocess.__file__).read_text())
    return folder


def command(text: Path, out: Path, *options: str, launcher: tuple[str, ...] = ()) -> list[str]:
    start = [sys.executable, str(LAUNCH / "run.py"), "--standalone", "--nproc-per-node=2", *launcher]
    return [*start, str(LAUNCH / "train.py"), "--data", str(text), "--out", str(out), *TINY, *OPTIONS, *options]


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    out = tmp_path_factory.mktemp("undisturbed")
    done = run(command(text, out))
    assert done.returncode == 0, done.stderr
    return numbers(out)


def until_lines(count: int, out: Path, parent: subprocess.Popen) -> None:
    path, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline
        assert parent.poll() is None
        time.sleep(0.02)


def test_a_warned_launcher_stops_its_ranks_at_one_step(
    text: Path, tmp_path: Path, undisturbed: list[dict[str, object]]
) -> None:
    with subprocess.Popen(command(text, tmp_path), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as parent:
        try:
            until_lines(10, tmp_path, parent)
            for warning in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
                parent.send_signal(warning)
            printed, _ = parent.communicate(timeout=60)
        finally:
            kill(parent)
    assert parent.returncode == STOPPED
    step = len(rows_of(tmp_path))
    assert 10 <= step < 150
    assert printed.count("asked to stop") == 1
    assert f"checkpoint of step {step} is complete" in printed
    done = run(command(text, tmp_path, "--resume"))
    assert done.returncode == 0, done.stderr
    assert f"going on after step {step}," in done.stdout
    assert numbers(tmp_path) == undisturbed


def test_a_killed_rank_starts_again_from_the_last_checkpoint(
    text: Path, tmp_path: Path, undisturbed: list[dict[str, object]]
) -> None:
    words = command(text, tmp_path, launcher=("--max-restarts=1",))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(words, env=ENVIRONMENT, **pipes) as parent:
        try:
            until_lines(30, tmp_path, parent)
            os.kill(max(children_of(parent.pid)), signal.SIGKILL)
            printed, _ = parent.communicate(timeout=200)
        finally:
            kill(parent)
    assert parent.returncode == 0
    assert "going on after step" in printed
    assert numbers(tmp_path) == undisturbed


def test_a_mistake_is_not_started_again(text: Path, tmp_path: Path) -> None:
    done = run(command(tmp_path / "nowhere", tmp_path, launcher=("--max-restarts=3",)))
    assert done.returncode == 2
    assert done.stderr == f"train.py: error: --data {tmp_path / 'nowhere'}: no such folder\n"


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_start_that_was_taken_over_completes_no_checkpoint(tmp_path: Path, when: str) -> None:
    done = run([sys.executable, "-c", TAKEN_OVER, str(tmp_path / "checkpoints"), when])
    assert done.returncode == 0, done.stderr
    assert "now belongs to a later start of this run" in done.stdout


def launch(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    options = {"env": {**ENVIRONMENT, **env}, "capture_output": True, "text": True}
    return subprocess.run([*words, str(LAUNCH / "train.py")], check=False, timeout=60, **options)


def test_a_rendezvous_that_cannot_be_is_one_line() -> None:
    start = (sys.executable, str(LAUNCH / "run.py"), "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        here = f"127.0.0.1:{taken.getsockname()[1]}"
        cases = {
            here: "the port is taken, perhaps by an earlier run",
            "nosuch.invalid:1": "nosuch.invalid has no address here",
        }
        for endpoint, said in cases.items():
            done = launch(*start, f"--rdzv-endpoint={endpoint}")
            assert done.returncode == 2
            assert done.stderr.count("\n") == 1
            assert f"--rdzv-endpoint {endpoint}: {said}" in done.stderr
    done = launch(*start, "--node-rank=1", f"--rdzv-endpoint={here}", LAUNCH_HEAD_SECONDS="1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "did not reach it in 1 s (Connection refused)" in done.stderr


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
    done = launch(str(LAUNCH / "torchrun.sh"), **env)
    assert done.returncode == 2
    assert done.stderr == f"torchrun.sh: error: {said}\n" or done.stderr.startswith(f"torchrun.sh: error: {said}, or")


def test_torchrun_sh_says_what_it_took(tmp_path: Path) -> None:
    echo = tmp_path / "python"
    echo.write_text('#!/bin/bash\necho "$GLOO_SOCKET_IFNAME" "${@:2}"\n')
    echo.chmod(0o755)
    given = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "eth7"}
    done = launch(
        str(LAUNCH / "torchrun.sh"), PYTHON=str(echo), CUDA_VISIBLE_DEVICES="4,5,6", MAX_RESTARTS="2", **given
    )
    assert done.returncode == 0
    assert done.stderr == (
        "torchrun.sh: 3 ranks here (3 GPUs, nccl), machine 1 of 2, rendezvous run at 127.0.0.1:29400, "
        "interface eth7, 2 restarts\n"
    )
    assert done.stdout.startswith("eth7 --nproc-per-node=3 --max-restarts=2 --nnodes=2 --node-rank=1")


# Which rank, and which device -------------------------------------------------------------------

SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "1234567",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],login",
}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """launch/environment.py and launch/ranks.py; the handlers that come with them do not stay."""
    monkeypatch.syspath_prepend(str(LAUNCH))
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    names = SimpleNamespace(**{name: importlib.import_module(name) for name in ("environment", "ranks")})
    for number, handler in before.items():
        signal.signal(number, handler)
    return names


def test_srun_tells_every_rank_what_torchrun_would(modules: SimpleNamespace) -> None:
    env = dict(SRUN)
    modules.environment.settle(env)
    expected = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07"}
    assert {name: env[name] for name in expected} == expected
    assert env["MASTER_PORT"] == "24567"
    torchrun = {**SRUN, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    untouched = dict(torchrun)
    modules.environment.settle(torchrun)
    assert torchrun == untouched
    batch_shell = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    modules.environment.settle(batch_shell)
    assert "RANK" not in batch_shell


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("a,b[1-2]", "a"), ("n[003,7-9]-ib,m", "n003-ib"), ("rack[1-2]n[4-5]", "rack1n4")],
)
def test_the_first_of_a_node_list(modules: SimpleNamespace, nodes: str, first: str) -> None:
    assert modules.environment.first_host(nodes) == first


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set and MASTER_ADDR, MASTER_PORT not"),
        ({**SRUN, "SLURM_TASKS_PER_NODE": "2", "SLURM_STEP_TASKS_PER_NODE": "x"}, "expected a list like 2(x3),1"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_PROCID"}, "SLURM_PROCID is not set"),
        ({"RANK": "0", "WORLD_SIZE": "two", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "WORLD_SIZE=two: not a number"),
    ],
)
def test_an_environment_with_holes(modules: SimpleNamespace, env: dict[str, str], said: str) -> None:
    with pytest.raises(modules.ranks.UserError) as caught:
        modules.environment.settle(dict(env))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("visible", "on_node", "num_local", "expected"),
    [
        (8, "8", 8, "cuda:3"),  # --gpus-per-node, torchrun
        (8, None, 8, "cuda:3"),  # no SLURM
        (1, "8", 8, "cuda:0"),  # --gpus-per-task=1
        (2, "8", 4, "cuda:0"),  # --gpus-per-task=2: both are its own
        (1, None, 8, "cpu"),  # one GPU for eight ranks
        (1, "1", 8, "cpu"),
        (0, "8", 8, "cpu"),
    ],
)
def test_each_rank_takes_a_gpu_of_its_own(
    modules: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    visible: int,
    on_node: str | None,
    num_local: int,
    expected: str,
) -> None:
    monkeypatch.setattr(modules.ranks.torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_local))
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    if on_node:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", on_node)
    assert str(modules.ranks.pick_device("auto")) == expected
