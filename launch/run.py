"""torchrun, and three things that it lacks.

    python -m launch.run --standalone --nproc-per-node=2 -m launch.train --out runs/main

- A rank that left with one line and exit code 2 ends the whole command with that line and code;
  torchrun adds a traceback of its own and leaves with 1.
- SIGUSR1 and SIGTERM are passed on to the ranks as SIGUSR1; when these have stopped with a
  checkpoint, the command leaves with 75. torchrun dies of the first and gives its ranks 30 s after
  the second.
- A rendezvous that cannot succeed ends in one line; torchrun tries for minutes.
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

from launch.signals import EXIT_FILE, STOPPED, USER_ERROR, WARNINGS

DEFAULT_PORT = 29400
# Seconds that a machine waits for the head to listen; 20 where it is not set.
HEAD_SECONDS = "LAUNCH_HEAD_SECONDS"


def main() -> None:
    # Blocked before torch is imported: all threads and ranks start with them blocked.
    signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)
    threading.Thread(target=forward, daemon=True).start()
    run()


def forward() -> None:
    """Passes warnings on to the ranks for ever; leaves at once where there are none yet."""
    while True:
        number = signal.sigwait(WARNINGS)
        ranks = children()
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        if not ranks:
            # Only SIGUSR1 asks for another start: SIGTERM may mean that another machine failed.
            os._exit(STOPPED if number == signal.SIGUSR1 else 128 + number)


def children() -> list[int]:
    paths = Path("/proc/self/task").glob("*/children")
    return [int(pid) for path in paths for pid in path.read_text().split()]


def run() -> None:
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    # The closing table repeats what these log of a failed rank.
    for name in ("api", "errors.error_handler"):
        logger = logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}")
        logger.setLevel(logging.CRITICAL)
    # One store for all starts of the ranks would give them addresses of ranks that are gone.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    args = parse_args(None)
    if args.rdzv_backend == "c10d" and args.rdzv_endpoint and not args.standalone:
        check_head(args.rdzv_endpoint, args.node_rank)
        args.node_rank = 0  # c10d numbers the machines itself, and torchrun warns of other numbers
    with tempfile.TemporaryDirectory() as folder:
        exit_file = Path(folder, "code")
        os.environ[EXIT_FILE] = str(exit_file)
        try:
            torchrun(args)
        except ChildFailedError as error:
            # torchrun may have ended another rank before the one that left with its own code.
            if any(failure.exitcode == USER_ERROR for failure in error.failures.values()):
                sys.exit(USER_ERROR)
            print(error, file=sys.stderr)
            _, failure = error.get_first_failure()
            sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
        except RendezvousError as error:
            fail(
                f"rendezvous {args.rdzv_id} at {args.rdzv_endpoint}: "
                f"{error or type(error).__name__}; if it is that of an earlier run, give this one "
                "another --rdzv-id; if machines are missing, see that all have started"
            )
        sys.exit(int(exit_file.read_text()) if exit_file.exists() else 0)


def check_head(endpoint: str, node_rank: int) -> None:
    """Leaves with one line where torchrun would try for minutes, or reach another program."""
    host, _, port = endpoint.rpartition(":") if ":" in endpoint else (endpoint, "", DEFAULT_PORT)
    try:
        address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    except OSError as error:
        fail(
            f"--rdzv-endpoint {endpoint}: {host} has no address here ({error.strerror}); "
            "give the head's name or IP"
        )
    if node_rank > 0 or not listens_here(address, endpoint):
        connect(address, endpoint)


def listens_here(address: tuple, endpoint: str) -> bool:
    """Whether this machine is the head; leaves where its port is taken."""
    with socket.socket(*address[:3]) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address[4])
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return False
            if error.errno != errno.EADDRINUSE:
                raise
            fail(
                f"--rdzv-endpoint {endpoint}: the port is taken, perhaps by an earlier run: end "
                "that or take another port; of several launchers on this machine, all but the "
                "first need --node-rank above 0"
            )
    return True


def connect(address: tuple, endpoint: str) -> None:
    seconds = float(os.environ.get(HEAD_SECONDS, "20"))
    until, reason = time.monotonic() + seconds, "no answer"
    while time.monotonic() < until:
        with socket.socket(*address[:3]) as probe:
            probe.settimeout(max(0.1, until - time.monotonic()))
            try:
                return probe.connect(address[4])
            except OSError as error:
                reason = error.strerror or "no answer"
        time.sleep(0.2)
    fail(
        f"--rdzv-endpoint {endpoint}: {socket.gethostname()} did not reach it in {seconds:g} s "
        f"({reason}): start the launcher there too, name an address that leads there, open the "
        f"port; {HEAD_SECONDS} sets the time"
    )


def fail(line: str) -> NoReturn:
    print(f"run.py: error: {line}", file=sys.stderr, flush=True)
    sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
