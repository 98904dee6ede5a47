"""One process among the ranks: joining them, agreeing with them, and leaving together with one line."""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TypeVar

import signals
import torch
import torch.distributed as dist

T = TypeVar("T")

# Longer than ranks differ in how long they take to import torch. torchrun ends the waiting ranks as soon as
# rank 0 has left, so under torchrun nobody waits this long.
SECONDS_FOR_RANK_0 = 30.0


class UserError(Exception):
    """Something the user can put right; shown as one line, without a traceback."""

    speaks: bool | None = None
    """Whether this rank says it, where the ranks could not agree; otherwise rank 0 does."""


def pick_device(choice: str) -> torch.device:
    """A GPU of its own for this rank, or the CPU."""
    local_rank, num_local = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_gpus = torch.cuda.device_count() if choice != "cpu" else 0
    if num_gpus >= num_local:
        return torch.device("cuda", local_rank)
    # Under --gpus-per-task a rank sees its own alone, as device 0; SLURM counts those of the whole node.
    if num_gpus and int(os.environ.get("SLURM_GPUS_ON_NODE") or 0) >= num_gpus * num_local:
        return torch.device("cuda", 0)
    if choice == "cuda":
        slurm = " (--gpus-per-node or --gpus-per-task)" if "SLURM_JOB_ID" in os.environ else ""
        raise UserError(
            f"--device cuda: {num_local} ranks on this machine and {num_gpus} GPUs; NCCL needs one a rank{slurm}"
        )
    return torch.device("cpu")


def join(device: torch.device, timeout: float) -> None:
    """Makes the process group; without torchrun, a group of one that needs no port.

    Collective: every rank must call it.
    """
    # The CPU side carries objects and checkpoints also where NCCL carries the gradients.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    bound = device if device.type == "cuda" else None
    if bound:
        torch.cuda.set_device(device)
    limit = timedelta(seconds=timeout)
    if "RANK" in os.environ:
        store, rank, size = _meet(limit)
    else:
        store, rank, size = dist.HashStore(), 0, 1
    try:
        dist.init_process_group(
            backend, timeout=limit, device_id=bound, store=dist.PrefixStore("group", store), rank=rank, world_size=size
        )
        dist.barrier()  # NCCL connects at its first collective only
    except RuntimeError as error:
        raise _not_joined(error, store, rank) from None


def _meet(limit: timedelta) -> tuple[dist.Store, int, int]:
    """The store through which the ranks find each other."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        return next(dist.rendezvous("env://", timeout=limit))
    except (RuntimeError, ValueError, OSError) as error:
        if "EADDRINUSE" in str(error):
            text = f"port {port} of {address} is taken, perhaps by an earlier run: end that, or set another MASTER_PORT"
        else:
            text = f"{address}:{port} (MASTER_ADDR, MASTER_PORT) was not reached in {limit.seconds} s: {_first(error)}"
        complaint = UserError(text)
        # Nothing reaches the others: each machine says it once.
        complaint.speaks = os.environ.get("LOCAL_RANK", "0") == "0"
        raise complaint from None


def _not_joined(error: RuntimeError, store: dist.Store, rank: int) -> UserError:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    given = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    where = given or f"{names[0]} and {names[1]} are not set"
    complaint = UserError(
        f"rank {rank} on {socket.gethostname()} could not connect to the other ranks: {_first(error)} ({where}; they "
        "have to name the network interface that leads to the other machines)"
    )
    try:
        complaint.speaks = store.add("complaints", 1) == 1
    except RuntimeError:  # rank 0, which holds the store, has gone, and has said it
        complaint.speaks = rank == 0
    return complaint


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].partition(" Exception raised from ")[0]


def agree(work: Callable[[], T]) -> T:
    """What `work` returns; where it fails on any rank, every rank raises the first such rank's UserError.

    Raising on one rank while the others go on would leave them waiting in their next collective.
    `work` must not communicate.
    """
    result, complaint = None, None
    try:
        result = work()
    except UserError as error:
        complaint = str(error)
    complaints: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(complaints, complaint)
    first = next((text for text in complaints if text), None)
    if first:
        raise UserError(first)
    return result  # type: ignore[return-value]


def from_rank_0(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, the only rank that runs it; its UserError is raised everywhere."""
    result = [agree(work if dist.get_rank() == 0 else lambda: None)]
    dist.broadcast_object_list(result)
    return result[0]  # type: ignore[return-value]


def any_rank(here: bool) -> bool:
    """Whether `here` is true on any rank.

    Collective: every rank must call it.
    """
    flags = [here] * dist.get_world_size()
    dist.all_gather_object(flags, here)
    return any(flags)


def leave(error: UserError) -> NoReturn:
    """Ends this rank with exit code 2; one rank says why, and no rank goes before it has."""
    speaks = os.environ.get("RANK", "0") == "0" if error.speaks is None else error.speaks
    if speaks:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
        _tell_torchrun(str(error))
    if dist.is_initialized() and error.speaks is None:
        with contextlib.suppress(RuntimeError):  # a rank that is ahead may have closed its connections
            dist.barrier()
    elif not speaks:
        # torchrun stops all ranks when the first one leaves: the one that speaks has to be it, or its line is lost.
        together = "TORCHELASTIC_RUN_ID" in os.environ and error.speaks is None
        until = time.monotonic() + (SECONDS_FOR_RANK_0 if together else 1.0)
        while time.monotonic() < until and not signals.warned():
            time.sleep(0.05)
    signals.leave(signals.USER_ERROR)


def _tell_torchrun(line: str) -> None:
    """Makes torchrun's closing table repeat the line where it would print "To enable traceback see"."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"timestamp": str(int(time.time()))}
        with open(path, "w") as file:
            json.dump({"message": {"message": line, "extraInfo": extra}}, file)
