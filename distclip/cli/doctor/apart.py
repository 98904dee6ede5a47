"""Functions that run in processes of their own: one that crashes or hangs is an answer."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from distclip.cli.doctor.finding import Finding

_GRACE_S = 3.0  # for a process to end by itself at its limit, and for the other ranks of a call
_NUMBERS = count()  # of files in which processes write where they hang
_PRELOAD = ["distclip", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"]


class Call(NamedTuple):
    """`function(*args)`, which yields what it finds, one after the other."""

    function: Callable[..., Iterator[Any]]
    args: tuple[Any, ...] = ()


@dataclass
class Answer:
    """What a call has yielded, and why it came to no end: "" if it did."""

    values: list[Any] = field(default_factory=list[Any])
    error: str = ""

    def advice(self, other: str) -> str:
        """`other`, unless time may be all that was missing."""
        late = self.error.startswith("no answer")
        return f"try again with a longer --timeout; then {other}" if late else other


class Check(NamedTuple):
    """Calls that start together, because they may wait for each other, and what they tell."""

    name: str
    calls: list[Call]
    read: Callable[[list[Answer]], Iterable[Finding]]


@dataclass
class _Running:
    answer: Answer
    process: BaseProcess
    pipe: Connection
    log: Path
    deadline: float
    timeout: float


def run_apart(checks: Sequence[Check], timeout: float) -> Iterator[tuple[Check, list[Answer]]]:
    """Yields each check and its answers when all of its calls have ended.

    As many checks run at a time as there are cores. No process outlives this one by more than
    `timeout`.
    """
    waiting, running = [*checks], list[tuple[Check, list[_Running]]]()
    at_once = max(1, min(4, os.cpu_count() or 1))
    with tempfile.TemporaryDirectory(prefix="distclip-", ignore_cleanup_errors=True) as folder:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    check = waiting.pop(0)
                    group = [_start(call, Path(folder), timeout) for call in check.calls]
                    running.append((check, group))
                _listen([one for _, group in running for one in group])
                for check, group in [*running]:
                    _shorten(group)
                    if all(map(_ended, group)):
                        running.remove((check, group))
                        yield check, [one.answer for one in group]
        finally:
            for one in (one for _, group in running for one in group):
                _kill(one.process)


def _start(call: Call, folder: Path, timeout: float) -> _Running:
    context = get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(_PRELOAD)  # torch is imported once for all processes
    ours, theirs = context.Pipe(duplex=False)
    log = folder / str(next(_NUMBERS))
    args = (call, dict(os.environ), str(log), timeout, theirs)
    process = context.Process(target=_serve, args=args, daemon=True)
    process.start()
    theirs.close()
    deadline = time.monotonic() + timeout + _GRACE_S
    return _Running(Answer(), process, ours, log, deadline, timeout)


def _ended(one: _Running) -> bool:
    return one.pipe.closed


def _listen(running: Sequence[_Running]) -> None:
    """Receives what there is, after a wait for the first message or the next deadline."""
    open_pipes = {one.pipe: one for one in running if not one.pipe.closed}
    left = min(one.deadline for one in open_pipes.values()) - time.monotonic()
    ready = {id(pipe) for pipe in wait([*open_pipes], max(0.0, left))}
    for pipe, one in open_pipes.items():
        if id(pipe) in ready:
            _receive(one)
        elif time.monotonic() > one.deadline:
            _end(one, f"no answer within {one.timeout:g} s{_where(one.log)}")


def _receive(one: _Running) -> None:
    try:
        kind, value = one.pipe.recv()
    except (EOFError, ConnectionResetError):
        _end(one, _why_ended(one))
        return
    if kind == "yielded":
        one.answer.values.append(value)
    else:
        _end(one, value)


def _end(one: _Running, error: str) -> None:
    one.answer.error = error
    one.pipe.close()
    _kill(one.process)


def _shorten(group: Sequence[_Running]) -> None:
    """Ranks wait for one that has failed; they have little time left to say where."""
    if any(_ended(one) and one.answer.error for one in group):
        for one in group:
            one.deadline = min(one.deadline, time.monotonic() + _GRACE_S)


def _kill(process: BaseProcess) -> None:
    process.kill()
    process.join(_GRACE_S)


def _why_ended(one: _Running) -> str:
    one.process.join(_GRACE_S)
    code = one.process.exitcode
    if (where := _where(one.log)) and code == 1:  # faulthandler has ended it
        return f"no answer within {one.timeout:g} s{where}"
    if code is not None and code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"


def _where(log: Path) -> str:
    """The innermost function of the stack that faulthandler wrote when time was up."""
    text = log.read_text(errors="replace") if log.exists() else ""
    found = re.search(
        r'^Timeout .*?File "(.*?)", line \d+ in (\S+)', text, re.DOTALL | re.MULTILINE
    )
    return f": it waits in {found[2]} of {Path(found[1]).name}" if found else ""


def _serve(call: Call, env: dict[str, str], log: str, timeout: float, pipe: Connection) -> None:
    """The main function of a process."""
    os.environ.clear()  # of the process that forks, which may be older than a setting
    os.environ.update(env)
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    except OSError:  # its folder is gone, and so is the command
        os._exit(1)
    os.dup2(descriptor, 1)  # what libraries print is for nobody
    os.dup2(descriptor, 2)
    faulthandler.dump_traceback_later(timeout, exit=True, file=descriptor)
    pipe.send(("ended", _run(call, pipe)))
    pipe.close()
    os._exit(0)  # without destructors, which may wait for other ranks


def _run(call: Call, pipe: Connection) -> str:
    warnings.simplefilter("ignore")
    try:
        for value in call.function(*call.args):
            pipe.send(("yielded", value))
    except BaseException as error:  # SystemExit too: an import may raise anything
        return in_words(error)
    return ""


def in_words(error: BaseException) -> str:
    """The type of an error and its first line."""
    line = next(iter(str(error).strip().splitlines()), "without a message")
    return f"{type(error).__name__}: {line[:300]}"
