"""What processes of tests/cli/test_doctor.py run."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distclip.cli.doctor import ranks


def two_values() -> Iterator[Any]:
    print("what libraries print is for nobody")
    yield os.getpid()
    yield os.environ.get("DISTCLIP_TEST")


def raises() -> Iterator[Any]:
    yield 1
    raise ValueError("first line\nsecond line")


def exits() -> Iterator[Any]:
    yield 1
    sys.exit(3)


def leaves() -> Iterator[Any]:
    yield 1
    os._exit(4)


def crashes() -> Iterator[Any]:
    yield 1
    ctypes.string_at(0)


def hangs() -> Iterator[Any]:
    yield os.getpid()
    time.sleep(1000)


def hangs_with_file(path: str) -> Iterator[Any]:
    Path(path + ".tmp").write_text(str(os.getpid()))
    Path(path + ".tmp").rename(path)
    yield from hangs()


def hangs_and_cannot_end() -> Iterator[Any]:
    """faulthandler's thread is stopped too: only another process can end this one."""
    yield 1
    os.kill(os.getpid(), signal.SIGSTOP)


def clips_wrongly(backend: str, rank: int, store: str, timeout: float) -> Iterator[Any]:
    """As `ranks.run` where a norm is wrong by half on one rank, and NaN for one wrapper."""
    import distclip

    clip, calls = distclip.clip_grad_norm_, iter((1.0, 1.5, float("nan"), 1.0))

    def wrong(*args: Any) -> Any:
        return clip(*args) * (next(calls) if rank == 1 else 1.0)

    distclip.clip_grad_norm_ = wrong
    yield from ranks.run(backend, rank, store, timeout)


def one_leaves(backend: str, rank: int, store: str, timeout: float) -> Iterator[Any]:
    if rank == 1:
        os._exit(5)
    yield from ranks.run(backend, rank, store, timeout)
