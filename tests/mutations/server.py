"""Runs tests in a forked process, over and over: torch is imported once.

Started in the folder of the tests. Reads a line of JSON for each run, `{"tests": [...], "seconds":
...}`, and answers with one: `{"code": ...}`, pytest's exit code, or None after the time limit.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import NoReturn

import pytest

BROKEN = 70  # an exit code that pytest does not have
# What the tests import beside distclip, whose files change.
PRELOAD = [
    *("numpy", "numba", "triton", "torch"),
    *("torch.distributed.fsdp", "torch.distributed.tensor.parallel"),
    *("torch.distributed.tensor.debug", "torch.distributed.pipelining", "torch._dynamo"),
]


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # as tests/conftest.py, before triton is imported
    for name in PRELOAD:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the tests print is no answer
    for line in sys.stdin:
        print(json.dumps({"code": run(**json.loads(line))}), file=answers, flush=True)


def run(tests: list[str], seconds: float) -> int | None:
    if (child := os.fork()) == 0:
        os.setsid()  # its ranks end with it
        _test(tests)
    deadline, parent = time.monotonic() + seconds, os.getppid()
    code = None
    while code is None and time.monotonic() < deadline and os.getppid() == parent:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if code is None:
        os.waitpid(child, 0)
    return code


def _test(tests: list[str]) -> NoReturn:
    code: int = BROKEN
    try:
        sys.stdin = open(os.devnull)  # noqa: SIM115
        options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist"]
        code = pytest.main([*options, *tests])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
