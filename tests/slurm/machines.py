"""A few machines in one: namespaces with their own addresses, names and processes, and a bridge.

Everything lives in one outer process namespace whose first process dies with this Python: no name,
no link and no process of it can stay behind on the real machine, however a test ends. Files are
shared, as on a cluster with a shared home; /dev/shm is each machine's own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

NETWORK = "10.213.7"
HEAD = "head"
# A shell as a namespace's first process: it reaps what its children leave.
FIRST_PROCESS = ("bash", "-c", "trap : TERM; while :; do sleep 1000 & wait; done")


def why_not() -> str | None:
    """Why namespaces cannot be made here, or None."""
    needed = ("ip", "unshare", "nsenter", "setpriv")
    lost = [program for program in needed if not shutil.which(program)]
    if lost:
        return f"{', '.join(lost)} not installed (packages iproute2, util-linux)"
    if os.geteuid() != 0:
        return "network namespaces take root"
    words = ["unshare", "--net", "--mount", "--pid", "--fork", "true"]
    tried = subprocess.run(words, capture_output=True, check=False)
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.decode().strip()}"


def wait_until(true: Callable[[], object], seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


class Space:
    """The namespaces of one machine, and their first process."""

    def __init__(self, name: str, enter: Sequence[str], ready: Path) -> None:
        self.name, self._ready = name, ready
        ready.unlink(missing_ok=True)
        own = f"hostname {name}; mount -t tmpfs tmpfs /dev/shm; ip link set lo up"
        setup = f'{own}; echo up > "$1"; exec "${{@:2}}"'
        spaces = "--net --mount --uts --ipc --pid --fork --kill-child --mount-proc"
        make = f"setpriv --pdeathsig KILL unshare {spaces}".split()
        words = [*enter, *make, "bash", "-c", setup, "-", str(ready), *FIRST_PROCESS]
        self._outer = subprocess.Popen(words, stdin=subprocess.DEVNULL)
        wait_until(ready.exists, 10, f"the namespaces of {name}")
        self.pid = self._first_process()

    def _first_process(self) -> int:
        """As this Python's process namespace numbers it."""
        pid = self._outer.pid
        while not _is_first(pid):
            (pid,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return pid

    @property
    def enter(self) -> list[str]:
        """The words before a command that is to run here."""
        return ["nsenter", f"--target={self.pid}", "--all", f"--wdns={os.getcwd()}"]

    def popen(self, words: Sequence[object], **options: object) -> subprocess.Popen:
        options = {"stdin": subprocess.DEVNULL, **options}
        return subprocess.Popen([*self.enter, *map(str, words)], **options)

    def call(
        self, *words: object, timeout: float = 60, **options: object
    ) -> subprocess.CompletedProcess[str]:
        """The command's exit code and all that it printed."""
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, **options}
        words = [*self.enter, *map(str, words)]
        return subprocess.run(words, check=False, timeout=timeout, **options)

    def run(self, *words: object, check: bool = True, **options: object) -> str:
        """What the command printed."""
        done = self.call(*words, **options)
        failure = f"{words} left with {done.returncode}: {done.stderr}"
        assert not check or done.returncode == 0, failure
        return done.stdout

    def kill(self) -> None:
        """Ends every process of the machine at once, as when its power fails."""
        self._outer.kill()  # --kill-child: the kernel ends the first process, which ends the others
        self.wait()

    def wait(self) -> None:
        self._outer.wait()
        wait_until(lambda: not Path(f"/proc/{self.pid}").exists(), 10, f"the end of {self.name}")


def _is_first(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (numbers,) = (line.split()[1:] for line in lines if line.startswith("NSpid:"))
    return len(numbers) > 1 and numbers[-1] == "1"


class Machines:
    """`count` machines node1, node2, ... and a head, which reach each other and nothing else."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.nodes = folder, {}
        self._pid = os.getpid()
        hosts = [f"{NETWORK}.254 {HEAD}"] + [f"{NETWORK}.{i} node{i}" for i in range(1, count + 1)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        self.head = Space(HEAD, (), folder / "head.up")
        try:
            for name in ("hosts", "nsswitch.conf"):
                self.head.run("mount", "--bind", folder / name, f"/etc/{name}")
            self.head.run("ip", "link", "add", "br0", "type", "bridge")
            self.head.run("ip", "address", "add", f"{NETWORK}.254/24", "dev", "br0")
            self.head.run("ip", "link", "set", "br0", "up")
            for i in range(1, count + 1):
                self.boot(f"node{i}")
        except BaseException:
            self.stop()
            raise

    def boot(self, name: str) -> None:
        """Starts a machine that is not there, or was killed."""
        number = name.removeprefix("node")
        # The mounts of the head are copied: names resolve there as well.
        self.nodes[name] = node = Space(name, self.head.enter, self.folder / f"{name}.up")
        inside = self._pid_in_head(node)
        link = f"ip link add v{number} type veth peer name eth0 netns {inside}"
        self.head.run(*link.split())
        self.head.run("ip", "link", "set", f"v{number}", "master", "br0", "up")
        node.run("ip", "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        node.run("ip", "link", "set", "eth0", "up")

    def _pid_in_head(self, node: Space) -> str:
        lines = Path(f"/proc/{node.pid}/status").read_text().splitlines()
        (numbers,) = (line.split()[1:] for line in lines if line.startswith("NSpid:"))
        return numbers[-2]

    def cable(self, name: str, state: str) -> None:
        """Pulls the machine's cable ("down"), or plugs it in again ("up")."""
        self.head.run("ip", "link", "set", f"v{name.removeprefix('node')}", state)

    def stop(self) -> None:
        self.head.kill()  # the machines' namespaces lie in its own
        for node in self.nodes.values():
            node.wait()
