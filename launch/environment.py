"""Which rank this process is: as torchrun says, or as srun says, in torch's variables.

| srun                        | torch                    |
|-----------------------------|--------------------------|
| SLURM_PROCID                | RANK                     |
| SLURM_NTASKS                | WORLD_SIZE               |
| SLURM_LOCALID               | LOCAL_RANK               |
| SLURM_STEP_TASKS_PER_NODE   | LOCAL_WORLD_SIZE         |
| first of SLURM_STEP_NODELIST| MASTER_ADDR              |
| from SLURM_JOB_ID           | MASTER_PORT              |
"""

import os
import re
from collections.abc import MutableMapping

from ranks import UserError

FIRST_PORT, NUM_PORTS = 20_000, 10_000
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Set above 0 when torchrun or SLURM starts a run again.
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def settle(env: MutableMapping[str, str] = os.environ) -> None:
    """Fills in torch's variables where srun has started this process as one of several tasks.

    Raises: UserError where only some of the variables are there.
    """
    if "RANK" not in env and "SLURM_STEP_ID" in env and env.get("SLURM_NTASKS", "1") != "1":
        _from_srun(env)
    given = [name for name in NEEDED if env.get(name)]
    lost = [name for name in NEEDED if name not in given]
    if "RANK" in given and lost:
        raise UserError(
            f"RANK is set and {', '.join(lost)} not: start the ranks with torchrun or srun, which set all of "
            f"{', '.join(NEEDED)}, or unset RANK to train on one rank"
        )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if not env.get(name, "0").isdecimal():
            raise UserError(f"{name}={env[name]}: not a number; torchrun and srun set it by themselves")


def _from_srun(env: MutableMapping[str, str]) -> None:
    try:
        env["LOCAL_RANK"], env["WORLD_SIZE"] = env["SLURM_LOCALID"], env["SLURM_NTASKS"]
        tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env["SLURM_TASKS_PER_NODE"]
        env["LOCAL_WORLD_SIZE"] = str(num_tasks(tasks, int(env["SLURM_NODEID"])))
        env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]))
        env.setdefault("MASTER_PORT", str(FIRST_PORT + int(env["SLURM_JOB_ID"]) % NUM_PORTS))
        env["RANK"] = env["SLURM_PROCID"]
    except KeyError as error:
        raise UserError(f"{error.args[0]} is not set beside SLURM_NTASKS: start the ranks with srun") from None


def num_tasks(tasks_per_node: str, node: int) -> int:
    """How many tasks SLURM starts on a node: "2(x3),1" is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            raise UserError(f"SLURM_TASKS_PER_NODE={tasks_per_node}: expected a list like 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts[node]


def first_host(node_list: str) -> str:
    """The first name of SLURM's short form, without asking scontrol, which containers lack: "gpu[03-07,9]" is gpu03."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", node_list)[0])


def restarted(env: MutableMapping[str, str] = os.environ) -> bool:
    """Whether torchrun or SLURM has started this run again."""
    return any(int(env.get(name) or 0) > 0 for name in RESTARTS)
