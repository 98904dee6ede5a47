"""torchrun, and beyond it: a rank's own exit code, signals that reach the ranks, a rendezvous that fails in one line.

    python launch/run.py --standalone --nproc-per-node=2 launch/train.py --out runs/main

A rank that left with one line and exit code 2 ends the whole command with that line and that code; torchrun itself
puts a traceback of its own below the line, and leaves with 1. SIGUSR1 and SIGTERM are passed on to the ranks as
SIGUSR1; when these have stopped with a checkpoint, the command leaves with 75. torchrun dies of the first and gives
its ranks 30 s after the second.
"""

import contextlib
import errno
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NoReturn

from signals import EXIT_FILE, STOPPED, USER_ERROR, WARNINGS

DEFAULT_PORT = 29400
HEAD_SECONDS = "LAUNCH_HEAD_SECONDS"
"""Seconds that a machine waits for the head to listen; 20 where it is not set."""


def forward() -> None:
    """Passes warnings on to the ranks, for as long as this process lives; leaves at once where there are none yet."""
    while True:
        number = signal.sigwait(WARNINGS)
        ranks = children()
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        if not ranks:
            # Nothing is lost, but only a warning asks for another start: SIGTERM may say that another machine failed.
            os._exit(STOPPED if number == signal.SIGUSR1 else 128 + number)


def children() -> list[int]:
    return [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]


def run() -> None:
    # Imported after the signals are blocked, so that every thread and every rank starts with them blocked.
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    # What torchrun logs of a failed rank stands in its closing table too, which is shown unless the user was at fault.
    for name in ("api", "errors.error_handler"):
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}").setLevel(logging.CRITICAL)
    # One store for all starts of the ranks would show them addresses of ranks that are gone.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    args = parse_args(None)
    if args.rdzv_backend == "c10d" and args.rdzv_endpoint and not args.standalone:
        check_head(args.rdzv_endpoint, args.node_rank)
        args.node_rank = 0  # c10d numbers the machines itself, and torchrun warns of other numbers
    with tempfile.TemporaryDirectory() as folder:
        os.environ[EXIT_FILE] = f"{folder}/code"
        try:
            torchrun(args)
        except ChildFailedError as error:
            # All ranks leave together; one that torchrun ended before it could leave may stand first in the table.
            if any(failure.exitcode == USER_ERROR for failure in error.failures.values()):
                sys.exit(USER_ERROR)
            print(error, file=sys.stderr)
            _, failure = error.get_first_failure()
            sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
        except RendezvousError as error:
            fail(
                f"rendezvous {args.rdzv_id} at {args.rdzv_endpoint}: {error or type(error).__name__}; if it is that of "
                "an earlier run, give this one another --rdzv-id; if machines are missing, see that all have started"
            )
        sys.exit(exit_code(Path(folder, "code")))


def exit_code(path: Path) -> int:
    return int(path.read_text()) if path.exists() else 0


def check_head(endpoint: str, node_rank: int) -> None:
    """Leaves with one line where torchrun would try for minutes, or talk to a stranger."""
    host, _, port = endpoint.rpartition(":") if ":" in endpoint else (endpoint, "", str(DEFAULT_PORT))
    try:
        address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    except OSError as error:
        fail(f"--rdzv-endpoint {endpoint}: {host} has no address here ({error.strerror}); give the head's name or IP")
    if node_rank == 0 and is_local(address):
        check_free(address, endpoint)
    else:
        check_reached(address, endpoint)


def is_local(address: tuple) -> bool:
    family, kind, protocol, _, where = address
    with socket.socket(family, kind, protocol) as probe:
        try:
            probe.bind((where[0], 0))
        except OSError:
            return False
    return True


def check_free(address: tuple, endpoint: str) -> None:
    family, kind, protocol, _, where = address
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(where)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            fail(
                f"--rdzv-endpoint {endpoint}: the port is taken, perhaps by an earlier run: end that or take another "
                "port; of several launchers on this machine, all but the first need --node-rank above 0"
            )


def check_reached(address: tuple, endpoint: str) -> None:
    seconds = float(os.environ.get(HEAD_SECONDS, "20"))
    family, kind, protocol, _, where = address
    until, found = time.monotonic() + seconds, "no answer"
    while time.monotonic() < until:
        with socket.socket(family, kind, protocol) as probe:
            probe.settimeout(max(0.1, until - time.monotonic()))
            try:
                return probe.connect(where)
            except OSError as error:
                found = error.strerror or "no answer"
        time.sleep(0.2)
    fail(
        f"--rdzv-endpoint {endpoint}: {socket.gethostname()} did not reach it in {seconds:g} s ({found}): start the "
        f"launcher there too, name an address that leads there, open the port; {HEAD_SECONDS} sets the time"
    )


def fail(line: str) -> NoReturn:
    print(f"run.py: error: {line}", file=sys.stderr, flush=True)
    sys.exit(USER_ERROR)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)
    threading.Thread(target=forward, daemon=True).start()
    run()
