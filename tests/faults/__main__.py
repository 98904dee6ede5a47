"""`python -m tests.faults --cases 20000 --seed 0`: the fault matrix; `--only NUMBER`: one case."""

from __future__ import annotations

import argparse
import sys
import time

from tests.faults import cases
from tests.faults.run import findings, summary
from tests.support.ranks import Ranks


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER")
    parser.add_argument("--policy", action="append", choices=cases.POLICIES, help="again for more")
    args = parser.parse_args()
    if args.only is None:
        some = list(cases.sample(args.cases, args.seed, args.policy or cases.POLICIES))
    else:
        some = [cases.case_of(args.only)]
    if why := cases.why_impossible(some[0]):
        print(f"{some[0]} cannot be: {why}")
        return 2
    ranks, start = Ranks(cases.NUM_RANKS), time.monotonic()

    def said(num: int) -> None:
        print(f"{num} of {len(some)} cases, {time.monotonic() - start:.0f} s", flush=True)

    found = []
    for each in findings(some, ranks, said):
        found.append(each)
        print(each.text, flush=True)
    ranks.stop()
    print(f"{cases.num_possible()} cases are possible, of which some were drawn")
    print(summary(len(some), found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
