"""Clipping what FSDP2 and tensor parallelism have sharded, on real ranks over gloo, the rivals in turn.

    python -m benchmarks.sharded [--quick] [--rounds N] [--only NAME] [--out DIR]

A rank is a process with one thread. A round's time is that of the slowest rank, from a barrier on. Exits with 1 where
distclip is wrong or missing.
"""

from __future__ import annotations

import sys

import tyro

from benchmarks import show
from benchmarks.goals import FOUR_RANKS, SHARDED, TWO_AXES, TWO_RANKS
from benchmarks.sharded_ranks import Case, Size, measure_all

CASES = (
    Case(TWO_RANKS, (2,), ("dp",)),
    Case(FOUR_RANKS, (4,), ("dp",)),
    Case(TWO_AXES, (2, 2), ("dp", "tp")),
)
FULL, QUICK = Size(num_blocks=32, width=256), Size(num_blocks=2, width=32)


def main() -> int:
    options = tyro.cli(show.Options, prog="python -m benchmarks.sharded", description=__doc__)
    began = show.Began()
    size = QUICK if options.quick else FULL
    rows = measure_all(options.chosen(CASES), size, options.num_rounds * (1 if options.quick else 2))
    work = f"gloo, one thread a rank; {size.num_blocks} blocks of 12 tensors, {size.numel:,} float32 elements"
    return show.publish("sharded", "Clipping sharded tensors", rows, SHARDED, options, began, work)


if __name__ == "__main__":
    sys.exit(main())
