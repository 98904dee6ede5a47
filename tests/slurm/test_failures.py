"""What goes wrong on a cluster: each run resumes to the same bits as the undisturbed one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

import pytest

from tests.slurm.jobs import TINY, Jobs, Undisturbed, processes, rows
from tests.slurm.machines import wait_until

pytestmark = [pytest.mark.cluster_slow, pytest.mark.timeout(400)]
# From a crash until SLURM has started the job elsewhere: about 35 s on an idle machine.
BACK_S = 120.0


def resumed_from(jobs: Jobs, job: str) -> int:
    """The step that the last start of the job went on from."""
    wait_until(lambda: "going on after step" in jobs.log(job), BACK_S, "a start that resumes")
    return int(re.findall(r"going on after step (\d+)", jobs.log(job))[-1])


def goes_on_as(jobs: Jobs, job: str, undisturbed: Undisturbed) -> int:
    step = resumed_from(jobs, job)
    jobs.wait_for_step(step + 20)
    jobs.cancel(job)
    undisturbed.assert_same(jobs.out, step + 20)
    return step


def test_a_job_of_higher_priority_takes_the_nodes(jobs: Jobs, undisturbed: Undisturbed) -> None:
    low = jobs.submit("train.sbatch", "--nodes=2")
    jobs.wait_for_step(20)
    words = ("--partition=high", "--nodes=4", "--exclusive", "--wrap=sleep 3")
    high = jobs.cluster.submit("--chdir=/", f"--output={jobs.folder}/high.log", *words)
    assert jobs.cluster.wait(high, 60).state == "COMPLETED"
    jobs.cluster.wait(low, 60, ("RUNNING",), restarts=1)
    (stop,) = jobs.stopped_at(low)
    assert goes_on_as(jobs, low, undisturbed) == stop


def test_the_time_limit_warns_early_enough(jobs: Jobs, undisturbed: Undisturbed) -> None:
    options = ("--nodes=2", "--ntasks-per-node=1", "--time=1", "--signal=B:USR1@30")
    job = jobs.submit("train-direct.sbatch", *options, WARNING_SECONDS="30")
    jobs.cluster.wait(job, 100, ("RUNNING",), restarts=1)
    (stop,) = jobs.stopped_at(job)
    assert goes_on_as(jobs, job, undisturbed) == stop


@pytest.mark.parametrize(
    "to", [["--batch"], []], ids=["the batch shell", "the ranks and launchers"]
)
def test_a_terminated_job_comes_back(jobs: Jobs, undisturbed: Undisturbed, to: list[str]) -> None:
    job = jobs.submit("train.sbatch", "--nodes=2")
    jobs.wait_for_step(20)
    jobs.cluster.run("scancel", *to, "--signal=TERM", job)
    jobs.cluster.wait(job, 60, ("RUNNING",), restarts=1)
    (stop,) = jobs.stopped_at(job)
    assert goes_on_as(jobs, job, undisturbed) == stop


@pytest.mark.parametrize("lost", ["worker", "batch"])
def test_a_crashed_node_is_replaced(jobs: Jobs, undisturbed: Undisturbed, lost: str) -> None:
    job = jobs.submit("train.sbatch", "--nodes=2")
    jobs.wait_for_step(60)
    assert jobs.cluster.job(job).nodes == "node[1-2]"
    crashed = {"worker": "node2", "batch": "node1"}[lost]
    jobs.cluster.crash(crashed)
    back = jobs.cluster.wait(job, BACK_S, ("RUNNING",), restarts=1)
    assert crashed not in jobs.cluster.run("scontrol", "show", "hostnames", back.nodes).split()
    assert goes_on_as(jobs, job, undisturbed) % 50 == 0


def test_a_pulled_cable_ends_the_ranks_within_their_timeout(
    jobs: Jobs, undisturbed: Undisturbed
) -> None:
    job = jobs.submit("train.sbatch", "--nodes=2")
    jobs.wait_for_step(60)
    jobs.cluster.machines.cable("node2", "down")
    began = time.monotonic()
    stuck = len(rows(jobs.out))
    wait_until(lambda: "Traceback" in jobs.log(job), 25, "an error within --timeout 15")
    assert time.monotonic() - began > 5
    back = jobs.cluster.wait(job, BACK_S, ("RUNNING",), restarts=1)
    assert "node2" not in jobs.cluster.run("scontrol", "show", "hostnames", back.nodes).split()
    assert goes_on_as(jobs, job, undisturbed) in range(stuck - 50, stuck + 50)


def test_ranks_on_a_cut_off_node_give_up_the_checkpoints(
    jobs: Jobs, undisturbed: Undisturbed
) -> None:
    job = jobs.submit("train.sbatch", "--nodes=1", NPROC_PER_NODE="2")
    jobs.wait_for_step(60)
    jobs.cluster.machines.cable("node1", "down")  # both ranks are there: nothing fails, they go on
    jobs.cluster.wait(job, BACK_S, ("RUNNING",), restarts=1)
    assert processes(jobs.out, ranks=True)  # of the first start: the second has not come so far
    step = resumed_from(jobs, job)
    lines = "belongs to a later start of this run"
    wait_until(lambda: lines in jobs.log(job), 60, "the cut-off ranks notice")
    assert jobs.log(job).count(lines) == 1
    jobs.wait_for_step(step + 60)
    jobs.cancel(job)
    undisturbed.assert_same(jobs.out, step + 60)


def test_a_killed_rank_starts_again_as_often_as_allowed(
    jobs: Jobs, undisturbed: Undisturbed
) -> None:
    job = jobs.submit("train.sbatch", "--nodes=2", MAX_RESTARTS="1")
    jobs.wait_for_step(60)
    os.kill(processes(jobs.out, ranks=True)[-1], signal.SIGKILL)
    step = resumed_from(jobs, job)
    assert step % 50 == 0
    jobs.wait_for_step(step + 20)
    undisturbed.assert_same(jobs.out, step + 20)
    os.kill(processes(jobs.out, ranks=True)[-1], signal.SIGKILL)
    done = jobs.cluster.wait(job, 90)
    assert done.state == "FAILED"
    assert done.code != 0


def test_a_sweep_ends_in_one_picture(jobs: Jobs) -> None:
    args = (*TINY, "--policy", "none", "--steps", "3", "--save-every", "0")
    (jobs.folder / "sweep.txt").write_text("none\nclip-norm --policy.max-norm 0.5\n\n")
    policies = str(jobs.folder / "sweep.txt")
    sweep = jobs.submit("sweep.sbatch", "--array=0-1", args=args, SWEEP=policies)
    wait_until(lambda: "Submitted batch job" in jobs.logs(), 30, "the job after the array")
    (picture,) = re.findall(r"Submitted batch job (\d+)", jobs.logs())
    done = jobs.cluster.wait(picture, 120)
    assert done.state == "COMPLETED", (jobs.out / "compare.log").read_text()
    assert {jobs.cluster.job(f"{sweep}_{task}").state for task in range(2)} == {"COMPLETED"}
    assert (jobs.out / "compare.png").read_bytes().startswith(b"\x89PNG")
    for name in ("none", "clip-norm_max-norm_0.5"):
        assert len(rows(jobs.out / name)) == 3


def test_deepspeed(jobs: Jobs) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    args = ("--width", "32", "--depth", "1", "--steps", "3", "--device", "cpu")
    job = jobs.submit("deepspeed.sbatch", "--nodes=2", args=args)
    done = jobs.cluster.wait(job, 200)
    assert done.state == "COMPLETED", jobs.log(job)
    assert len(rows(jobs.out)) == 3


def line_of(jobs: Jobs, job: str, codes: tuple[int, ...] = (2,)) -> str:
    """The one line of error with which the job ended."""
    done = jobs.cluster.wait(job, 120)
    assert done.state == "FAILED"
    assert done.code in codes
    lines = [line for line in jobs.log(job).splitlines() if "error:" in line]
    (line,) = [line for line in lines if not line.startswith(("srun", "slurmstepd"))]
    assert "Traceback" not in jobs.log(job)
    return line


def test_a_folder_that_is_not_shared(jobs: Jobs) -> None:
    job = jobs.submit("train.sbatch", "--nodes=2", OUT="/dev/shm/out")
    said = "node2 does not see there what rank 0 wrote: it has to be a folder that all"
    assert said in line_of(jobs, job)


def test_a_folder_that_cannot_be_written(jobs: Jobs) -> None:
    (jobs.folder / "file").write_text("")
    job = jobs.submit("train-direct.sbatch", "--nodes=2", OUT=f"{jobs.folder}/file/out")
    assert "/file/out cannot be used: Not a directory" in line_of(jobs, job)


def test_a_time_limit_that_leaves_no_time(jobs: Jobs) -> None:
    job = jobs.submit("train.sbatch", "--time=1")
    said = "a time limit of 60 s, and the warning comes 120 s before its end: raise --time"
    assert said in line_of(jobs, job)


def test_too_few_ranks_on_one_node(jobs: Jobs) -> None:
    job = jobs.submit("train-direct.sbatch", "--nodes=1", args=(*TINY, "--layout", "hsdp"))
    said = "--layout hsdp needs 4 ranks or more and there are 2: raise --nodes"
    assert said in line_of(jobs, job)


def test_more_launchers_than_nodes(jobs: Jobs) -> None:
    job = jobs.submit("train.sbatch", "--nodes=1", NNODES="2")
    assert "NNODES=2 and this job has 1: sbatch --nodes=2" in line_of(jobs, job)


@pytest.mark.parametrize("script", ["train.sbatch", "train-direct.sbatch"])
def test_a_port_that_is_taken(jobs: Jobs, script: str) -> None:
    port = "23456"
    serve = f"import socket, sys; s = socket.create_server(('', {port}))"
    words = [jobs.env["PYTHON"], "-c", f"{serve}; print(flush=True); sys.stdin.read()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with jobs.cluster.machines.nodes["node1"].popen(words, **pipes) as other:
        try:
            other.stdout.readline()
            args = (*TINY, "--timeout", "120")  # the default
            options = ("--nodes=2", "--ntasks-per-node=1")
            job = jobs.submit(script, *options, args=args, MASTER_PORT=port)
            # The other node still tries, and is killed after 30 s.
            line = line_of(jobs, job, (2, 137, 143))
        finally:
            other.stdin.close()
    assert "taken, perhaps by an earlier run: end that" in line
    assert port in line
