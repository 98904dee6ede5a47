"""Which rank a process is, and which device it takes."""

from __future__ import annotations

import pytest

from launch import ranks

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
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def without(env: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in env.items() if key != name}


def test_srun_gives_every_rank_what_torchrun_would() -> None:
    env = dict(SRUN)
    ranks.read_environment(env)
    assert env == {
        **SRUN,
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "24567",
    }


@pytest.mark.parametrize(
    "env",
    [
        pytest.param({**SRUN, **TORCHRUN}, id="torchrun in a step"),
        pytest.param(without(SRUN, "SLURM_STEP_ID"), id="the batch shell"),
        pytest.param({}, id="neither"),
    ],
)
def test_other_environments_stay_as_they_are(env: dict[str, str]) -> None:
    read = dict(env)
    ranks.read_environment(read)
    assert read == env


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set and MASTER_ADDR, MASTER_PORT not"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "x"}, "expected a list like 2(x3),1"),
        (without(SRUN, "SLURM_PROCID"), "SLURM_PROCID is not set"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE=two: not a number"),
    ],
)
def test_an_environment_with_holes(env: dict[str, str], said: str) -> None:
    with pytest.raises(ranks.UserError) as caught:
        ranks.read_environment(dict(env))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("a,b[1-2]", "a"),
        ("n[003,7-9]-ib,m", "n003-ib"),
        ("rack[1-2]n[4-5]", "rack1n4"),
    ],
)
def test_the_first_of_a_node_list(nodes: str, first: str) -> None:
    assert ranks.first_host(nodes) == first


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
    monkeypatch: pytest.MonkeyPatch,
    visible: int,
    on_node: str | None,
    num_local: int,
    expected: str,
) -> None:
    monkeypatch.setattr(ranks.torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_local))
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    if on_node:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", on_node)
    assert str(ranks.pick_device("auto")) == expected
