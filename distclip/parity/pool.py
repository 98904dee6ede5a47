"""Ranks as processes: each does what it is asked, and a rank that fails or hangs is an answer."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import re
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from distclip.parity.worker import Worker

START_S = 300.0  # imports of frameworks, on a loaded machine
GRACE_S = 5.0  # for the others, once one rank has failed: they may wait for it
PRELOAD = ["distclip", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"]


class Answer(NamedTuple):
    """What a rank did with a request.

    Attributes:
        value: what the method returned.
        error: the type and the first line of what it raised; "" if it returned.
        traceback: all of it.
        waited_s: how long it has not answered; 0 if it has.
        where: the function in which it hangs.
    """

    value: Any = None
    error: str = ""
    traceback: str = ""
    waited_s: float = 0.0
    where: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.error or self.waited_s)


class PerRank(list[Any]):
    """An argument that is another one on each rank."""


class Pool:
    """`size` ranks in one process group of gloo. After a failure they are other processes."""

    def __init__(self, size: int, start_method: str) -> None:
        self.size = size
        self._context: Any = get_context(start_method)
        if start_method == "forkserver":
            self._context.set_forkserver_preload(PRELOAD)
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder = Path()

    def start(self) -> None:
        """Does nothing where the ranks run.

        Raises:
            RuntimeError: a rank ended, or was not ready in time.
        """
        if self._processes:
            return
        self._folder = Path(tempfile.mkdtemp(prefix="distclip-parity-"))
        for rank in range(self.size):
            ours, theirs = self._context.Pipe()
            args = (rank, self.size, str(self._folder), theirs)
            process: BaseProcess = self._context.Process(target=serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        answers = self._answers(START_S)
        if failed := [answer for answer in answers if answer.failed]:
            self.stop()
            raise RuntimeError(
                f"cannot start the ranks: {failed[0].error or 'a rank does not answer'}. In a "
                f'script, call parity below `if __name__ == "__main__":`, because every rank '
                f"imports the script.\n{failed[0].traceback}"
            )

    def call(self, method: str, *args: Any, limit_s: float) -> list[Answer]:
        """What `Worker.method(*args)` did on each rank. Unless all returned, the ranks are ended.

        Args:
            args: of a `PerRank`, each rank gets its own item.
        """
        for rank, pipe in enumerate(self._pipes):
            own = [arg[rank] if isinstance(arg, PerRank) else arg for arg in args]
            with contextlib.suppress(BrokenPipeError):
                pipe.send_bytes(pickle.dumps((method, own, limit_s)))
        answers = self._answers(limit_s)
        if any(answer.failed for answer in answers):
            self.stop()
        return answers

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._processes:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._pipes = [], []

    def _answers(self, limit_s: float) -> list[Answer]:
        began = time.monotonic()
        deadline = began + limit_s
        answers: dict[int, Answer] = {}
        silent = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while silent and (left := deadline - time.monotonic()) > 0:
            for pipe in wait([*silent], left):
                rank = silent.pop(pipe)  # pyright: ignore[reportArgumentType]
                answers[rank] = self._received(rank, pipe)
                if answers[rank].failed:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        for rank in silent.values():
            answers[rank] = Answer(waited_s=time.monotonic() - began, where=self._where(rank))
        return [answers[rank] for rank in range(self.size)]

    def _received(self, rank: int, pipe: Any) -> Answer:
        try:
            return pickle.loads(pipe.recv_bytes())  # noqa: S301  (of our own process)
        except (EOFError, ConnectionResetError):
            process = self._processes[rank]
            process.join(GRACE_S)
            return Answer(error=f"the process ended with exit code {process.exitcode}")

    def _where(self, rank: int) -> str:
        """The innermost function that is not torch's, of the stack that the rank wrote."""
        path = self._folder / f"stack.{rank}"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [re.fullmatch(r'  File "(.*)", line (\d+) in (.*)', line) for line in lines]
        of_torch = f"{Path(torch.__file__).parent}{os.sep}"
        frames = [f for f in found if f is not None and not f[1].startswith(of_torch)]
        names = [f"{f[3]} ({Path(f[1]).name}:{f[2]})" for f in frames]
        return names[0] if names else ""


def serve(rank: int, size: int, folder: str, pipe: Connection) -> None:
    """The main function of a rank: answers requests until the pipe is closed."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    # Nobody else needs to reach them: gloo would listen on the interface of the host's name.
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback[0]
    rendezvous = f"file://{folder}/store"
    # Longer than any limit of the pool, which ends ranks that hang.
    limit = timedelta(hours=10)
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=size, timeout=limit)
    worker = Worker(rank, size)
    pipe.send_bytes(pickle.dumps(Answer()))
    # It ends when the process that asks has gone.
    with open(f"{folder}/stack.{rank}", "w") as stack, contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send_bytes(pickle.dumps(_answer(worker, pipe.recv_bytes(), stack)))
    os.kill(os.getpid(), signal.SIGKILL)  # without destructors, which may wait for other ranks


def _answer(worker: Worker, request: bytes, stack: Any) -> Answer:
    try:
        method, args, limit_s = pickle.loads(request)  # noqa: S301  (of the process that started this one)
        faulthandler.dump_traceback_later(0.8 * limit_s, file=stack)
        return Answer(getattr(worker, method)(*args))
    except BaseException as error:
        first_line = (str(error).strip() or "without a message").splitlines()[0]
        return Answer(error=f"{type(error).__name__}: {first_line}", traceback=_text(error))
    finally:
        faulthandler.cancel_dump_traceback_later()


def _text(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def outcomes_by_rank(answers: Sequence[Answer]) -> str:
    """One line: which ranks raised what, and which hang where; "" where all returned."""
    texts: dict[str, list[int]] = {}
    for rank, answer in enumerate(answers):
        text = f"raised {answer.error}" if answer.error else "returned"
        if answer.waited_s:
            where = f" in {answer.where}" if answer.where else ""
            text = f"hangs{where} after {answer.waited_s:.0f} s"
        texts.setdefault(text, []).append(rank)
    if [*texts] == ["returned"]:
        return ""
    return "; ".join(f"{_ranks(ranks, len(answers))} {text}" for text, ranks in texts.items())


def _ranks(ranks: Sequence[int], size: int) -> str:
    if len(ranks) == size:
        return "every rank"
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
