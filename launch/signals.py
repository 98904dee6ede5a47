"""SIGUSR1 and SIGTERM ask a run to stop soon: handlers record it, and the ranks agree on a step.

This module imports nothing that takes time: before `install`, either signal ends the process.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

# EX_TEMPFAIL of sysexits.h: a checkpoint was written, and the run is to be started again.
STOPPED = 75
USER_ERROR = 2
WARNINGS = (signal.SIGUSR1, signal.SIGTERM)
# Where a rank leaves its exit code for `launch.run`: torchrun only tells success from failure.
EXIT_FILE = "LAUNCH_EXIT_FILE"

_received: list[int] = []


def install() -> None:
    """Installs the handlers; ends this rank where torchrun restarted it after a user's mistake."""
    for number in WARNINGS:
        signal.signal(number, _record)
    # `launch.run` starts its ranks with both blocked: neither is lost before this line.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WARNINGS)
    path = Path(os.environ.get(EXIT_FILE) or os.devnull)
    if path.exists() and path.read_text() == str(USER_ERROR):
        sys.exit(USER_ERROR)


def _record(number: int, frame: FrameType | None) -> None:
    # SLURM and torchrun may both signal a rank, and the batch script repeats the signal.
    _received.append(number)


def warned() -> bool:
    """Whether this rank was asked to stop. Others may not have been: agree before acting on it."""
    return bool(_received)


def leave(code: int) -> NoReturn:
    """Ends this rank with `code`, whatever signals arrive meanwhile."""
    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN)
    # torchrun restarts a rank that fails (--max-restarts), and a rank that stopped did not fail.
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if path := os.environ.get(EXIT_FILE):
        try:
            Path(path).write_text(str(code))
        except OSError:  # a full disk: torchrun has to see the code itself
            under_torchrun = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # sys.exit would wait for gloo's threads, which can hang when the other ranks have left.
    os._exit(0 if code == STOPPED and under_torchrun else code)
