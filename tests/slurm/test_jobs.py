"""The scripts in slurm/ on a real cluster: what has to work on every change."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ENVIRONMENT, ROOT, SLURM, Jobs, Undisturbed, processes, rows
from tests.slurm.machines import wait_until

SCRIPTS = sorted(path.name for path in SLURM.glob("*.sbatch"))
pytestmark = pytest.mark.timeout(240)


def test_there_are_scripts() -> None:
    assert SCRIPTS == ["deepspeed.sbatch", "sweep.sbatch", "train-direct.sbatch", "train.sbatch"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_explains_itself_and_refuses_to_run_without_slurm(script: str) -> None:
    plain = {"PATH": "/usr/bin:/bin"}
    options = {"env": plain, "capture_output": True, "text": True}
    shown = subprocess.run(["bash", SLURM / script, "--help"], check=False, **options)
    assert shown.returncode == 0
    assert f"slurm/{script}" in shown.stdout
    assert "OUT" in shown.stdout
    assert "SBATCH --" not in shown.stdout
    refused = subprocess.run(["bash", SLURM / script], check=False, **options)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert f"no SLURM variables: this is no job; sbatch slurm/{script}" in refused.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_scripts_are_clean() -> None:
    scripts = [*SLURM.iterdir(), *(ROOT / "launch").glob("*.sh")]
    shell = [str(path) for path in scripts if path.suffix in (".sh", ".sbatch")]
    assert len(shell) >= 6
    done = subprocess.run(["shellcheck", *shell], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_slurm_takes_every_script(cluster: Cluster) -> None:
    for script in SCRIPTS:
        cluster.run("sbatch", "--test-only", "--nodes=2", "--gpus-per-node=2", SLURM / script)
    words = ("sbatch", "--test-only", "--nodes=9", SLURM / "train.sbatch")
    refused = cluster.machines.head.call(*words, env=cluster.env)
    assert refused.returncode != 0
    assert "More processors requested than permitted" in refused.stderr


def test_one_node_runs_to_the_end(jobs: Jobs) -> None:
    args = ("--steps", "4", "--save-every", "2", "--width", "32", "--depth", "1", "--device", "cpu")
    job = jobs.submit("train.sbatch", args=args, NPROC_PER_NODE="2")
    done = jobs.cluster.wait(job, 120)
    assert (done.state, done.code) == ("COMPLETED", 0)
    assert len(rows(jobs.out)) == 4
    assert (jobs.out / "report.png").exists()
    assert jobs.checkpoints() == [2, 4]
    assert "2 ranks here (0 GPUs, gloo), one machine" in jobs.log(job)


@pytest.mark.parametrize("script", ["train.sbatch", "train-direct.sbatch"])
def test_a_warned_job_goes_on_to_the_same_bits(
    jobs: Jobs, undisturbed: Undisturbed, script: str
) -> None:
    job = jobs.submit(script, "--nodes=2", "--ntasks-per-node=1")
    jobs.wait_for_step(20)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 sends
    jobs.cluster.wait(job, 60, ("RUNNING",), restarts=1)
    (stop,) = jobs.stopped_at(job)
    assert stop == jobs.checkpoints()[-1]
    assert len(rows(jobs.out)) == stop
    jobs.wait_for_step(stop + 20)
    assert f"going on after step {stop}" in jobs.log(job)
    assert jobs.cancel(job).state == "CANCELLED"  # and not requeued
    wait_until(
        lambda: not processes(jobs.out, ranks=True) + processes(jobs.out, ranks=False),
        15,
        "no process of a cancelled job",
    )
    undisturbed.assert_same(jobs.out, stop + 20)
    if script == "train.sbatch":
        port = 20000 + int(job)
        assert f"2, rendezvous {job}.0 at node1:{port}, interface eth0" in jobs.log(job)


def test_a_failing_last_rank_fails_the_job(jobs: Jobs) -> None:
    program = jobs.folder / "python"
    others = "((SLURM_PROCID < SLURM_NTASKS - 1)) && sleep 2 && exit 0"
    program.write_text(f"#!/bin/bash\n{others}\nexit 7\n")
    program.chmod(0o755)
    job = jobs.submit("train-direct.sbatch", "--nodes=2", PYTHON=str(program))
    done = jobs.cluster.wait(job, 30)
    assert (done.state, done.code) == ("FAILED", 7)


# The cluster's GPUs are not real: torch sees as many as SLURM gives.
PICK = """
import os
import torch
from launch import ranks
visible = os.environ["CUDA_VISIBLE_DEVICES"]
torch.cuda.device_count = lambda: len(visible.split(","))
ranks.read_environment()
print(f"{visible} of {os.environ['LOCAL_WORLD_SIZE']}: {ranks.pick_device('cuda')}", flush=True)
"""


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--gpus-per-node=2", ["0,1 of 2: cuda:0", "0,1 of 2: cuda:1"]),
        ("--gpus-per-task=1", ["0 of 2: cuda:0", "1 of 2: cuda:0"]),
    ],
)
def test_every_rank_has_a_gpu_of_its_own(jobs: Jobs, flag: str, expected: list[str]) -> None:
    words = ["srun", "--ntasks=2", "--nodes=1", flag, ENVIRONMENT["PYTHON"], "-c", PICK]
    said = jobs.cluster.run(*words, env={**jobs.cluster.env, **ENVIRONMENT}, cwd=ROOT)
    assert sorted(said.splitlines()) == expected
