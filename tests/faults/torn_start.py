"""One start of `launch.train`, as processes that are killed, or whose disk is full, at one moment.

The processes are forked from one that has torch, so that a start takes a second and not five.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import TCPStore

from tests.faults.small_disk import fill
from tests.support.ranks import PRELOAD

LIMIT_S = 240.0  # machines are shared: usually a hundredth of it
GRACE_S = 1.0  # for the ranks that are left, before they are ended too, as torchrun does
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")  # Python's audit events


class Moment(NamedTuple):
    """When something happens to a start, and what.

    Attributes:
        rank: whose file operations are counted.
        operation: before this one of them; 0 for none.
        seconds: so long after it, or after the start where there is none.
        alone: only that rank is killed.
        free: instead of a kill, the disk is filled up to so many bytes.
    """

    rank: int = 0
    operation: int = 0
    seconds: float = 0.0
    alone: bool = False
    free: int | None = None


class Ended(NamedTuple):
    """
    Attributes:
        codes: of the ranks; negative where a signal ended one.
        said: what they printed.
    """

    codes: list[int]
    said: str

    @property
    def killed(self) -> bool:
        return -signal.SIGKILL in self.codes

    @property
    def finished(self) -> bool:
        return self.codes[0] == 0


def start(
    out: Path, words: Sequence[str], size: int, moment: Moment | None, num_kept: int = 0
) -> Ended:
    """Starts the ranks with `words`, and returns when all have ended.

    Args:
        num_kept: the number of checkpoints that are kept; 0 for launch's own.
    """
    with tempfile.NamedTemporaryFile() as log:  # not on the disk that is full
        codes = _codes(out, words, size, moment, num_kept, Path(log.name))
        return Ended(codes, Path(log.name).read_text(errors="replace"))


def _codes(
    out: Path, words: Sequence[str], size: int, moment: Moment | None, num_kept: int, log: Path
) -> list[int]:
    context = get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "launch.train"])
    # As torchrun: its own process has the store, and a new start finds nothing of the last.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ours, theirs = context.Pipe(duplex=False)
    processes: list[BaseProcess] = []
    for rank in range(size):
        watched = moment if moment and moment.rank == rank else None
        args = (words, out, log, _environment(rank, size, store.port), watched, num_kept, theirs)
        processes.append(context.Process(target=_train, args=args, daemon=True))
        processes[-1].start()
    theirs.close()
    try:
        _disturb(processes, moment or Moment(), ours)
        _join(processes, LIMIT_S)
    finally:
        for process in processes:
            process.kill()
            process.join()
        ours.close()
    return [process.exitcode if process.exitcode is not None else 1 for process in processes]


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    if size == 1:
        return {}
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
        **{"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"},
    }


def _disturb(processes: list[BaseProcess], moment: Moment, pipe: Connection) -> None:
    """Kills what the moment says when it has come."""
    sentinels = [process.sentinel for process in processes]
    if moment.operation:
        wait([pipe, *sentinels], LIMIT_S)
        time.sleep(moment.seconds)
    else:
        wait(sentinels, moment.seconds or LIMIT_S)
    if moment.free is not None or not (moment.operation or moment.seconds):
        return
    for process in [processes[moment.rank]] if moment.alone else processes:
        process.kill()
    _join(processes, GRACE_S)
    for process in processes:
        process.kill()


def _join(processes: list[BaseProcess], seconds: float) -> None:
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))


def _train(
    words: Sequence[str],
    out: Path,
    log: Path,
    environment: dict[str, str],
    moment: Moment | None,
    num_kept: int,
    pipe: Connection,
) -> None:
    import torch

    from launch import checkpoint, signals, train

    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    os.environ.update(environment)
    signals.install()
    if num_kept:
        checkpoint.NUM_KEPT = num_kept
    if moment and (moment.operation or moment.free is not None):
        _Operations(out, moment, pipe).count()
    sys.argv = ["train.py", *words]
    train.main()


class _Operations:
    """Counts what this process does with the files of its run, until the moment comes."""

    def __init__(self, out: Path, moment: Moment, pipe: Connection) -> None:
        self.out, self.moment, self.pipe, self.num = str(out), moment, pipe, 0

    def count(self) -> None:
        fsync = os.fsync

        def counted(descriptor: int) -> None:
            self._add()
            fsync(descriptor)

        os.fsync = counted  # which Python does not audit
        sys.addaudithook(self._heard)

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in OPERATIONS:
            return
        # `rmtree` names files by the folder's descriptor.
        if event in ("os.remove", "os.rmdir") or str(args[0]).startswith(self.out):
            self._add()

    def _add(self) -> None:
        self.num += 1
        if self.num != self.moment.operation:
            return
        if self.moment.free is not None:
            fill(Path(self.out).parent, self.moment.free)
        elif not self.moment.seconds:
            os.kill(os.getpid(), signal.SIGKILL)
        self.pipe.send(None)
