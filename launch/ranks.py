"""One process among the ranks: which rank it is, joining the others, agreeing with them, leaving.

| srun                        | torch                    |
|-----------------------------|--------------------------|
| SLURM_PROCID                | RANK                     |
| SLURM_NTASKS                | WORLD_SIZE               |
| SLURM_LOCALID               | LOCAL_RANK               |
| SLURM_STEP_TASKS_PER_NODE   | LOCAL_WORLD_SIZE         |
| first of SLURM_STEP_NODELIST| MASTER_ADDR              |
| from SLURM_JOB_ID           | MASTER_PORT              |
"""

import contextlib
import os
import re
import socket
import sys
import time
from collections.abc import Callable, MutableMapping
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from launch import signals

T = TypeVar("T")

FIRST_PORT, NUM_PORTS = 20_000, 10_000
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
# Above 0 when torchrun or SLURM has started the run again.
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
# More than the time by which ranks differ in importing torch. Under torchrun nobody waits this
# long, because torchrun ends the waiting ranks as soon as rank 0 has left.
SECONDS_FOR_RANK_0 = 30.0


class UserError(Exception):
    """Something that the user can put right; shown as one line, without a traceback.

    Attributes:
        prints: whether this rank prints it, where the ranks could not agree; otherwise rank 0 does.
    """

    prints: bool | None = None


def read_environment(env: MutableMapping[str, str] = os.environ) -> None:
    """Sets torch's variables where srun has started this process as one of several tasks.

    Raises:
        UserError: only some of the variables are set.
    """
    if "RANK" not in env and "SLURM_STEP_ID" in env and env.get("SLURM_NTASKS", "1") != "1":
        _read_srun(env)
    missing = [name for name in NEEDED if not env.get(name)]
    if "RANK" in env and missing:
        raise UserError(
            f"RANK is set and {', '.join(missing)} not: start the ranks with torchrun or srun, "
            f"which set all of {', '.join(NEEDED)}, or unset RANK to train on one rank"
        )
    for name in NUMBERS:
        if not env.get(name, "0").isdecimal():
            raise UserError(f"{name}={env[name]}: not a number; torchrun and srun set it")


def _read_srun(env: MutableMapping[str, str]) -> None:
    try:
        env["LOCAL_RANK"], env["WORLD_SIZE"] = env["SLURM_LOCALID"], env["SLURM_NTASKS"]
        tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env["SLURM_TASKS_PER_NODE"]
        env["LOCAL_WORLD_SIZE"] = str(num_tasks(tasks, int(env["SLURM_NODEID"])))
        nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
        env.setdefault("MASTER_ADDR", first_host(nodes))
        env.setdefault("MASTER_PORT", str(FIRST_PORT + int(env["SLURM_JOB_ID"]) % NUM_PORTS))
        env["RANK"] = env["SLURM_PROCID"]
    except KeyError as error:
        raise UserError(
            f"{error.args[0]} is not set beside SLURM_NTASKS: start the ranks with srun"
        ) from None


def num_tasks(tasks_per_node: str, node: int) -> int:
    """How many tasks SLURM starts on a node: "2(x3),1" is 2, 2, 2, 1."""
    counts: list[int] = []
    for item in tasks_per_node.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if not found:
            raise UserError(f"SLURM_TASKS_PER_NODE={tasks_per_node}: expected a list like 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts[node]


def first_host(node_list: str) -> str:
    """The first name in SLURM's short form: "gpu[03-07,9]" is gpu03.

    `scontrol show hostnames` would tell as well, but containers lack it.
    """
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", node_list)[0])


def restarted() -> bool:
    """Whether torchrun or SLURM has started this run again."""
    return any(int(os.environ.get(name) or 0) > 0 for name in RESTARTS)


def pick_device(choice: str) -> torch.device:
    """A GPU for this rank alone, or the CPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_gpus = torch.cuda.device_count() if choice != "cpu" else 0
    if num_gpus >= num_local:
        return torch.device("cuda", local_rank)
    # Under --gpus-per-task a rank sees only its own, as device 0; SLURM counts the whole node's.
    if num_gpus and int(os.environ.get("SLURM_GPUS_ON_NODE") or 0) >= num_gpus * num_local:
        return torch.device("cuda", 0)
    if choice == "cuda":
        slurm = " (--gpus-per-node or --gpus-per-task)" if "SLURM_JOB_ID" in os.environ else ""
        raise UserError(
            f"--device cuda: {num_local} ranks on this machine and {num_gpus} GPUs; "
            f"NCCL needs one a rank{slurm}"
        )
    return torch.device("cpu")


def join(device: torch.device, timeout: float) -> None:
    """Makes the process group; without torchrun or srun, a group of one that needs no port.

    Collective: every rank must call it.
    """
    bound = device if device.type == "cuda" else None
    if bound:
        torch.cuda.set_device(device)
    # Objects and checkpoints are exchanged on the CPU also where NCCL reduces the gradients.
    backend = "cpu:gloo,cuda:nccl" if bound else "gloo"
    limit = timedelta(seconds=timeout)
    store, rank, size = _meet(limit) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
    prefixed = dist.PrefixStore("group", store)
    try:
        dist.init_process_group(
            backend, timeout=limit, device_id=bound, store=prefixed, rank=rank, world_size=size
        )
        dist.barrier()  # NCCL connects only at its first collective
    except RuntimeError as error:
        raise _not_joined(error, store, rank) from None


def _meet(limit: timedelta) -> tuple[dist.Store, int, int]:
    """The store through which the ranks find each other, this rank, and how many there are."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        return next(dist.rendezvous("env://", timeout=limit))
    except (RuntimeError, ValueError, OSError) as error:
        text = (
            f"{address}:{port} (MASTER_ADDR, MASTER_PORT) was not reached in {limit.seconds} s: "
            f"{_first_line(error)}"
        )
        if "EADDRINUSE" in str(error):
            text = (
                f"port {port} of {address} is taken, perhaps by an earlier run: end that, "
                "or set another MASTER_PORT"
            )
        failure = UserError(text)
        # Without a store the machines cannot agree on one that prints: each does, once.
        failure.prints = os.environ.get("LOCAL_RANK", "0") == "0"
        raise failure from None


def _not_joined(error: RuntimeError, store: dist.Store, rank: int) -> UserError:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    given = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    failure = UserError(
        f"rank {rank} on {socket.gethostname()} could not connect to the other ranks: "
        f"{_first_line(error)} ({given or f'{names[0]} and {names[1]} are not set'}; they have to "
        "name the network interface that leads to the other machines)"
    )
    try:
        failure.prints = store.add("failures", 1) == 1
    except RuntimeError:  # rank 0, which holds the store, has printed its failure and left
        failure.prints = rank == 0
    return failure


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].partition(" Exception raised from ")[0]


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order.

    Collective: every rank must call it.
    """
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(work: Callable[[], T]) -> T:
    """What `work` returns; where it fails on any rank, all raise the first such rank's UserError.

    An OSError counts as one: files are the user's to put right.
    If one rank raised while the others went on, they would wait in their next collective.
    `work` must not communicate, unless what fails in it fails on all ranks.
    """
    result, failure = None, None
    try:
        result = work()
    except (UserError, OSError) as error:
        failure = str(error)
    first = next((text for text in gather(failure) if text), None)
    if first:
        raise UserError(first)
    return result  # type: ignore[return-value]


def on_rank_0(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, the only rank that runs it; all ranks raise its UserError."""
    return gather(agree(work if dist.get_rank() == 0 else lambda: None))[0]  # type: ignore


def leave(error: UserError) -> NoReturn:
    """Ends this rank with exit code 2, after one rank has printed the line."""
    prints = os.environ.get("RANK", "0") == "0" if error.prints is None else error.prints
    if prints:
        program = os.path.basename(sys.argv[0])
        with contextlib.suppress(OSError):  # its disk is full too
            print(f"{program}: error: {error}", file=sys.stderr, flush=True)
    if dist.is_initialized() and error.prints is None:
        with contextlib.suppress(RuntimeError):  # a rank that is ahead may have left
            dist.barrier()
    elif not prints:
        # torchrun ends all ranks when the first one leaves: that has to be the one that prints.
        together = "TORCHELASTIC_RUN_ID" in os.environ and error.prints is None
        until = time.monotonic() + (SECONDS_FOR_RANK_0 if together else 1.0)
        while time.monotonic() < until and not signals.warned():
            time.sleep(0.05)
    signals.leave(signals.USER_ERROR)
