"""SIGUSR1 and SIGTERM ask a run to stop soon; a handler only notes it, and the ranks agree on the step themselves.

Imported before torch: until its handlers are there, either signal ends the process.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

STOPPED = 75  # "try again later" in sysexits.h: a checkpoint was written, and the run is to be started again
USER_ERROR = 2
WARNINGS = (signal.SIGUSR1, signal.SIGTERM)
# Where a rank leaves its exit code for launch/run.py; torchrun itself only tells success from failure.
EXIT_FILE = "LAUNCH_EXIT_FILE"

_noted: list[int] = []


def _note(number: int, frame: FrameType | None) -> None:
    # Idempotent: SLURM and torchrun may both signal a rank, and the batch script repeats itself.
    _noted.append(number)


def listen() -> None:
    for number in WARNINGS:
        signal.signal(number, _note)
    # launch/run.py starts its ranks with both blocked, so that neither is lost before this line.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WARNINGS)


def warned() -> bool:
    """Whether this rank has been asked to stop. The other ranks may not have been: agree before acting on it."""
    return bool(_noted)


def leave(code: int) -> NoReturn:
    """Ends this rank with `code`, whatever else is signalled meanwhile."""
    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN)
    if path := os.environ.get(EXIT_FILE):
        Path(path).write_text(str(code))
    # torchrun would start a rank that fails again (--max-restarts), and this one has done what it was asked to.
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: gloo's threads can keep Python from ending when the other ranks have gone.
    os._exit(0 if code == STOPPED and under_torchrun else code)


def stay_out() -> None:
    """Ends a rank that torchrun has started again after a user's mistake, which starting again does not mend."""
    path = os.environ.get(EXIT_FILE)
    if path and Path(path).exists() and Path(path).read_text() == str(USER_ERROR):
        sys.exit(USER_ERROR)


listen()
stay_out()
