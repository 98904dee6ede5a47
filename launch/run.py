"""torchrun, but a rank that left with one line and exit code 2 ends the whole command with that line and that code.

    python launch/run.py --standalone --nproc-per-node=2 launch/train.py --out runs/main

torchrun itself puts a traceback of its own below the line, and leaves with 1.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

USER_ERROR = 2


def run() -> None:
    # What torchrun logs of a failed rank stands in its closing table too, which is shown unless the user was at fault.
    for name in ("api", "errors.error_handler"):
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}").setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        # All ranks leave together; one that torchrun ended before it could leave may stand first in the table.
        if any(failure.exitcode == USER_ERROR for failure in error.failures.values()):
            sys.exit(USER_ERROR)
        print(error, file=sys.stderr)
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)


if __name__ == "__main__":
    run()
