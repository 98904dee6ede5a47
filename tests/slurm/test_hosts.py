"""torchrun across machines without SLURM: launch/torchrun.sh on each."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.jobs import ENVIRONMENT, ROOT, TINY, Undisturbed, processes, rows
from tests.slurm.machines import NETWORK, Machines, wait_until

pytestmark = [pytest.mark.cluster_slow, pytest.mark.timeout(240)]
WITHIN_S = 30.0


class Launchers:
    """launch/torchrun.sh on both machines, each with its own settings."""

    def __init__(self, hosts: Machines, text: Path, out: Path) -> None:
        self.hosts, self.running = hosts, {}
        options = ["--data", text, "--out", out, *TINY]
        self.words = ["launch/torchrun.sh", "-m", "launch.train", *options]

    def start(self, rank: int, **env: str) -> None:
        given = {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": f"{NETWORK}.1", **env}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        node = self.hosts.nodes[f"node{rank + 1}"]
        env = {**os.environ, **ENVIRONMENT, **given}
        self.running[rank] = node.popen(self.words, env=env, cwd=ROOT, **options)

    def said(self, rank: int, seconds: float) -> str:
        """What the launcher printed; it has to end in time, of itself and with 2."""
        printed, _ = self.running[rank].communicate(timeout=seconds)
        assert self.running[rank].returncode == 2, printed
        return printed

    def stop(self) -> None:
        self.hosts.stop()
        for launcher in self.running.values():
            launcher.wait()
            launcher.stdout.close()


@pytest.fixture
def launchers(hosts: Machines, text: Path, tmp_path: Path):
    launchers = Launchers(hosts, text, tmp_path / "out")
    yield launchers
    launchers.stop()


def error_lines(printed: str) -> list[str]:
    assert "Traceback" not in printed
    return [line for line in printed.splitlines() if "error:" in line]


def is_launcher(pid: int, rank: int) -> bool:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return f"--node-rank={rank}".encode() in words and words[0] != b"nsenter"


def test_two_machines_train_as_one_does(
    launchers: Launchers, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    launchers.start(0)
    launchers.start(1)
    out = tmp_path / "out"
    wait_until(lambda: len(rows(out)) >= 30, 90, "30 steps on two machines")
    # One launcher is warned; the ranks of both stop, with a checkpoint.
    running = processes(out, ranks=False)
    (warned,) = (pid for pid in running if is_launcher(pid, rank=1))
    os.kill(warned, signal.SIGTERM)
    for launcher in launchers.running.values():
        launcher.communicate(timeout=60)
        assert launcher.returncode == 75
    undisturbed.assert_same(out, 30)
    num_steps = len(rows(out))
    saved = (out / "checkpoints").iterdir()
    (last,) = [path for path in saved if int(path.name[5:]) == num_steps]
    assert (last / "run.json").exists()


@pytest.mark.parametrize("interface", ["nosuch", "lo"])
def test_a_wrong_interface(launchers: Launchers, interface: str) -> None:
    launchers.start(0, GLOO_SOCKET_IFNAME=interface)
    launchers.start(1, GLOO_SOCKET_IFNAME=interface)
    running = launchers.running.values()
    wait_until(lambda: any(one.poll() is not None for one in running), WITHIN_S, "an error")
    launchers.hosts.stop()
    (line,) = [line for one in running for line in error_lines(one.communicate()[0])]
    assert "could not connect to the other ranks" in line
    assert f"GLOO_SOCKET_IFNAME={interface}" in line


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (f"{NETWORK}.77", "node2 did not reach it in 20 s"),  # no machine
        (f"{NETWORK}.1", "node2 did not reach it in 20 s"),  # a machine where nothing listens
        ("nosuch", "nosuch has no address here"),
    ],
)
def test_an_unreachable_head(launchers: Launchers, address: str, said: str) -> None:
    began = time.monotonic()
    launchers.start(1, MASTER_ADDR=address)
    (line,) = error_lines(launchers.said(1, 60))
    assert time.monotonic() - began < WITHIN_S
    assert said in line


def test_a_rendezvous_of_an_earlier_run(launchers: Launchers) -> None:
    launchers.start(0)
    time.sleep(5)
    began = time.monotonic()
    launchers.hosts.nodes["node1"].call("true")
    first = launchers.running.pop(0)
    launchers.start(0)
    (line,) = error_lines(launchers.said(0, 60))
    assert time.monotonic() - began < WITHIN_S
    assert "the port is taken, perhaps by an earlier run" in line
    launchers.running[0] = first
