"""A pool of real ranks that lives as long as the test worker.

A test hands over a module-level function; every rank calls it with the same arguments, and the test
gets what each returned. A rank that raises, or does not answer in time, fails the test with the
traceback of every rank.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.support.measured_ranks import Measured

LIMIT_S = 180.0  # for one call on all ranks; a loaded machine has taken more than 60
PRELOAD = [
    "pytest",
    "hypothesis",
    "tests.support.ranks",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.tensor.debug",
    "torch.distributed.pipelining",
]
GRACE_S = 5.0  # for the others, once one rank has failed


class RankError(AssertionError):
    """What the failing ranks raised."""


class Ranks:
    """`size` processes in one process group: gloo on CPUs, NCCL where each has its own GPU."""

    grace_s = GRACE_S

    def __init__(self, size: int, device: str = "cpu") -> None:
        self.size, self.device = size, device
        self._store = ""
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        atexit.register(self.stop)

    def run(self, function: Callable[..., Any], *args: Any, limit_s: float = LIMIT_S) -> list[Any]:
        """What `function(*args)` returned on each rank, in order."""
        answers = self.answers(function, *args, limit_s=limit_s)
        failed = {rank: text for rank, (ok, text) in answers.items() if not ok}
        silent = sorted(set(range(self.size)) - set(answers))
        if failed or silent:
            self.stop()  # the ranks may wait in different collectives: a new pool for the next test
            texts = [f"--- rank {rank} ---\n{text}" for rank, text in sorted(failed.items())]
            raise RankError(
                "\n".join([f"{function.__name__}: no answer from ranks {silent}", *texts])
            )
        return [answers[rank][1] for rank in range(self.size)]

    def answers(
        self, function: Callable[..., Any], *args: Any, limit_s: float = LIMIT_S
    ) -> dict[int, tuple[bool, Any]]:
        """Of each rank that answers: whether the function returned, and what, or the traceback."""
        self._start()
        for pipe in self._pipes:
            pipe.send((function, args, os.environ.get("PYTEST_CURRENT_TEST", "")))
        return self._answers(time.monotonic() + limit_s)

    def _answers(self, deadline: float) -> dict[int, tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        silent = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while silent and (left := deadline - time.monotonic()) > 0:
            for pipe in wait([*silent], left):
                rank = silent.pop(pipe)
                answers[rank] = _received(pipe)
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + self.grace_s)
        return answers

    def _start(self) -> None:
        if self._processes:
            return
        context = get_context("forkserver")  # imports torch once a test worker, not once a rank
        context.set_forkserver_preload(PRELOAD)
        self._store = self._new_store()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, self.device, self._store, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._answers(time.monotonic() + LIMIT_S)  # each says that it is ready

    def _new_store(self) -> str:
        return tempfile.mktemp(prefix="distclip-ranks-")

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._store)


def _received(pipe: Connection) -> tuple[bool, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return False, "the process ended"


def _store(where: str, rank: int, size: int) -> dist.Store:
    """Of a file; or of a port, "localhost:12345", where rank 0 keeps it."""
    host, _, port = where.rpartition(":")
    return dist.TCPStore(host, int(port), size, rank == 0) if host else dist.FileStore(where, size)


def _share_one_gloo_device() -> None:
    """All process groups of this process take the same thread of gloo, which polls every 10 ms.

    By default each group gets its own: 46 of them on each of eight ranks took a quarter of a core,
    while nothing ran.
    """
    gloo = dist.ProcessGroupGloo
    device = gloo.create_default_device()

    class Kind(type(gloo)):
        def __instancecheck__(cls, group: object) -> bool:
            return isinstance(group, gloo)

    class Gloo(gloo, metaclass=Kind):
        def __new__(
            cls, store: dist.Store, rank: int, size: int, timeout: timedelta, **since_2_15: Any
        ) -> Any:
            assert not any(since_2_15.values()), since_2_15  # enable_reconfigure=False
            options = gloo._Options()
            options._devices = [device]
            options._timeout = timeout
            return gloo(store, rank, size, options)

    dist.distributed_c10d.ProcessGroupGloo = Gloo  # where torch makes its groups


@functools.cache
def dtensors_by_the_host() -> None:
    """From now on, the collectives of DTensors take the host's memory.

    Where gloo has CUDA tensors, its all-gather ends the process in torch 2.11.
    """
    functional = torch.distributed._functional_collectives

    def by_the_host(collective: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
            found = collective(tensor.detach().cpu(), *args, **options)
            return functional.wait_tensor(found).to(tensor.device)

        return run

    names = ["all_gather_tensor", "all_reduce", "reduce_scatter_tensor"]
    names += ["all_gather_single", "reduce_scatter_single"]  # what torch 2.13 calls
    for name in names:
        if hasattr(functional, name):
            setattr(functional, name, by_the_host(getattr(functional, name)))


def _serve(rank: int, size: int, device: str, store: str, pipe: Connection) -> None:
    gc.freeze()  # DeepSpeed asks for many collections, which then leave out what modules hold
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    _share_one_gloo_device()
    own_gpu = device == "cuda" and torch.cuda.device_count() >= size
    if device == "cuda":
        torch.cuda.set_device(rank if own_gpu else 0)
        if not own_gpu:
            dtensors_by_the_host()
    dist.init_process_group(
        "nccl" if own_gpu else "gloo",
        store=_store(store, rank, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=LIMIT_S),
    )
    measured = Measured()
    pipe.send((True, None))
    while True:
        try:
            function, args, test = pipe.recv()
        except EOFError:
            os._exit(0)  # the test worker is gone
        measured.begin(test)
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        measured.end()
        pipe.send(answer)


@functools.cache
def mesh(shape: tuple[int, ...], axes: tuple[str, ...], device: str = "cpu") -> DeviceMesh:
    """A mesh over all ranks, made once a rank: every new one would cost a process group an axis."""
    return init_device_mesh(device, shape, mesh_dim_names=axes)


def device_of(rank_device: str) -> torch.device:
    return (
        torch.device(rank_device, torch.cuda.current_device())
        if rank_device == "cuda"
        else torch.device("cpu")
    )


def same_bits_everywhere(scalar: Tensor) -> bool:
    """Whether every rank of the world has the same bits; NaN equals NaN."""
    mine = bytes(scalar.detach().cpu().reshape(1).view(torch.uint8).tolist())
    dist.all_gather_object(everyone := [b""] * dist.get_world_size(), mine)
    return set(everyone) == {mine}
