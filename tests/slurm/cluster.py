"""A real SLURM cluster on `Machines`: munged and slurmctld on the head, a slurmd a node, fake GPUs.

    python -m tests.slurm.cluster     starts one with a shell on its head, for sbatch and sinfo

Configuration, keys, sockets, state and logs lie in one folder; /etc/slurm and /etc/munge are not
touched.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.slurm import machines
from tests.slurm.machines import HEAD, NETWORK, Machines, wait_until

NUM_NODES, NUM_GPUS, NUM_CPUS = 4, 2, 4
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    "TIMEOUT",
}
# cred_expire is how long a requeued job is held back; config_overrides lets a node claim more CPUs
# than there are; EnforcePartLimits refuses what can never run. No cgroups, no database: sacct does
# not work, scontrol does.
CONF = """
ClusterName=tests
SlurmctldHost={head}({network}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MinJobAge=3600
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=0
SlurmctldParameters=preempt_send_user_signal
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=8
MessageTimeout=10
TCPTimeout=2
ReturnToService=2
EnforcePartLimits=ALL
JobRequeue=1
MpiDefault=none
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node[1-{nodes}] CPUs={cpus} RealMemory=2000 Gres=gpu:fake:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""
CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\nConstrainDevices=no\n"


def why_not() -> str | None:
    """Why there can be no cluster here, or None."""
    programs = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
    lost = [program for program in programs if not shutil.which(program)]
    if lost:
        return f"{', '.join(lost)} not installed (packages slurm-wlm, munge)"
    return machines.why_not()


@dataclass(frozen=True)
class Job:
    """What scontrol says of a job."""

    state: str
    code: int
    signal: int
    restarts: int
    nodes: str
    reason: str


class Cluster:
    """The machines with SLURM running on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o755)
        self._daemons: list[subprocess.Popen] = []
        self._write_files()
        self.machines = Machines(folder, NUM_NODES)
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _write_files(self) -> None:
        folder = self.folder
        counts = {"nodes": NUM_NODES, "gpus": NUM_GPUS, "cpus": NUM_CPUS}
        names = {"head": HEAD, "network": NETWORK, **counts}
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, **names))
        (folder / "cgroup.conf").write_text(CGROUP_CONF)
        (folder / "state").mkdir(mode=0o700)
        (folder / "munge").mkdir(mode=0o700)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        # slurmd takes only a device for a GPU: this one is another /dev/null.
        for gpu in range(NUM_GPUS):
            os.mknod(folder / f"gpu{gpu}", 0o020666, os.makedev(1, 3))
        gpus = f"Name=gpu Type=fake File={folder}/gpu[0-{NUM_GPUS - 1}]"
        line = f"NodeName=node[1-{NUM_NODES}] {gpus}\n"
        (folder / "gres.conf").write_text(line)

    def _start(self) -> None:
        folder = self.folder
        files = {
            "key-file": "munge/key",
            "seed-file": "munge/seed",
            "log-file": "munge/log",
            "socket": "munge.socket",
            "pid-file": "munge/pid",
        }
        words = [f"--{name}={folder / file}" for name, file in files.items()]
        self._daemon(self.machines.head, "munged", "--foreground", *words)
        wait_until((folder / "munge.socket").exists, 10, "munged")
        self._daemon(self.machines.head, "slurmctld", "-D", "-c")
        for name in self.machines.nodes:
            self._slurmd(name)
        wait_until(lambda: self.idle() == NUM_NODES, 30, "all nodes idle")

    def _daemon(self, where: machines.Space, *words: str) -> None:
        with (self.folder / f"{words[0]}.out").open("a") as log:
            self._daemons.append(where.popen(words, env=self.env, stdout=log, stderr=log))

    def _slurmd(self, name: str) -> None:
        self._daemon(self.machines.nodes[name], "slurmd", "-D", "-N", name)

    def run(self, *words: object, **options: object) -> str:
        return self.machines.head.run(*words, **{"env": self.env} | options)

    def idle(self) -> int:
        words = ("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N")
        return len(self.run(*words, check=False).split())

    def submit(self, *words: object, env: dict[str, str] | None = None) -> str:
        """The number of the job that sbatch makes of these words."""
        printed = self.run("sbatch", "--parsable", *words, env=self.env | (env or {}))
        return printed.strip().partition(";")[0]

    def job(self, number: str) -> Job:
        text = self.run("scontrol", "-o", "show", "job", number, check=False)
        found = dict(re.findall(r"(\w+)=(\S*)", text))
        code, signal = map(int, found.get("ExitCode", "0:0").split(":"))
        state, restarts = found.get("JobState", ""), int(found.get("Restarts", 0))
        nodes, reason = found.get("NodeList", ""), found.get("Reason", "")
        return Job(state, code, signal, restarts, nodes, reason)

    def wait(
        self, number: str, seconds: float, states: Sequence[str] = tuple(ENDED), restarts: int = 0
    ) -> Job:
        """The job as soon as it is in one of the states after that many restarts."""
        until = time.monotonic() + seconds
        while True:
            job = self.job(number)
            if job.state in states and job.restarts >= restarts:
                return job
            failure = f"job {number} not in {states} within {seconds:g} s: {job}"
            assert time.monotonic() < until, failure
            time.sleep(0.2)

    def crash(self, name: str) -> None:
        """Takes a node's power away."""
        self.machines.nodes[name].kill()

    def repair(self) -> None:
        """Ends all jobs, brings back lost nodes, and waits until all are idle."""
        self.run("scancel", "--user=root", check=False)
        for name, node in self.machines.nodes.items():
            if not Path(f"/proc/{node.pid}").exists():
                self.machines.boot(name)
                self._slurmd(name)
            self.machines.cable(name, "up")
        wait_until(lambda: self.idle() == NUM_NODES, 60, "all nodes idle again")

    def stop(self) -> None:
        self.machines.stop()
        for daemon in self._daemons:
            daemon.wait()


def main() -> None:
    reason = why_not()
    if reason:
        raise SystemExit(f"no cluster: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder))
        try:
            subprocess.run([*cluster.machines.head.enter, "bash"], env=cluster.env, check=False)
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
