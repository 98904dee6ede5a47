"""One process among the ranks: joining them, agreeing with them, and leaving together with one line."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# Longer than ranks differ in how long they take to import torch. torchrun ends the waiting ranks as soon as
# rank 0 has left, so under torchrun nobody waits this long.
SECONDS_FOR_RANK_0 = 30.0


class UserError(Exception):
    """Something the user can put right; shown as one line, without a traceback."""


def pick_device(choice: str) -> torch.device:
    """A GPU of its own for this rank, or the CPU."""
    local_rank, num_local = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_gpus = torch.cuda.device_count() if choice != "cpu" else 0
    if num_gpus >= num_local:
        return torch.device("cuda", local_rank)
    if choice == "cuda":
        raise UserError(f"--device cuda: {num_local} ranks on this machine and {num_gpus} GPUs; NCCL needs one a rank")
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
        dist.init_process_group(backend, timeout=limit, device_id=bound)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, timeout=limit, device_id=bound, store=store, rank=0, world_size=1)


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


def leave(error: UserError) -> NoReturn:
    """Ends this rank with exit code 2; rank 0 says why, and no rank goes before it has."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
        _tell_torchrun(str(error))
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # a rank that is ahead may have closed its connections
            dist.barrier()
            dist.destroy_process_group()
    elif rank:
        # torchrun stops all ranks when the first one leaves: rank 0 has to be that one, or its line is lost.
        time.sleep(SECONDS_FOR_RANK_0)
    sys.exit(2)


def _tell_torchrun(line: str) -> None:
    """Makes torchrun's closing table repeat the line where it would print "To enable traceback see"."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"timestamp": str(int(time.time()))}
        with open(path, "w") as file:
            json.dump({"message": {"message": line, "extraInfo": extra}}, file)
