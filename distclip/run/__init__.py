"""`python -m distclip.run script.py ...`: a script whose torch functions are distclip's.

    python -m distclip.run script.py --its --own arguments
    python -m distclip.run -m package.module --its --own arguments
    torchrun --nproc-per-node 2 -m distclip.run script.py

It runs the script as `python` would, inside `distclip.adapters.replacing_torch()`. Processes that
the script starts by `multiprocessing` or `torch.multiprocessing.spawn`, and those that Lightning
starts, have distclip's functions as well. A new `python`, such as a rank of torchrun, has not: put
`-m distclip.run` there.
"""

from __future__ import annotations

from distclip.run import script


def main() -> None:
    """Runs what the command line names."""
    script.run_command(__doc__)
