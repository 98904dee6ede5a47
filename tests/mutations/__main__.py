"""`python -m tests.mutations --num 300 --seed 0`: do the tests see that the code was changed?

Needs the tests to pass as the code is. What was found stands in runs/mutations/, a line of JSON for
each mutant, and a run that was ended goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

from tests.mutations.covering import Covering, measure
from tests.mutations.mutants import Mutant, sample
from tests.mutations.run import PASSED, Outcome, Stage, Tree, outcome
from tests.versions.core import ROOT, core

FOLDER = ROOT / "runs" / "mutations"
ROOMS = ("norms", "sharding", "policies", "training")
PATHS = [
    "distclip/step.py",
    *(
        str(p.relative_to(ROOT))
        for r in ROOMS
        for p in sorted((ROOT / "distclip" / r).glob("*.py"))
    ),
]
CORE = [each for each in core() if each != "tests/kernels"]  # no kernel is changed
CORE += [f"tests/faults/test_{name}.py" for name in ("matrix", "machine", "misbehaving")]
ALONE = ["-m", "not ranks", "--timeout=120"]
ON_RANKS = ["-m", "ranks", "--timeout=300"]
FEW, MANY = 10, 40  # functions: those that come after these run most of the code
SECONDS = 900.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="mutants at a time")
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / f"seed-{args.seed}.jsonl"
    found = {each.mutant: each for each in _read(file)}
    shutil.rmtree(FOLDER / "trees", ignore_errors=True)
    trees = [Tree(ROOT, FOLDER / "trees" / str(i)) for i in range(args.processes)]
    measured = trees[0].root
    if not found:
        measure(measured, FOLDER / "coverage", CORE)
    covering = Covering(measured, FOLDER / "coverage")
    if trees[0].run(["--collect-only", *covering.names()], SECONDS) != PASSED:
        raise RuntimeError(f"tests that were measured are not found: {measured / 'server.log'}")
    idle: SimpleQueue[Tree] = SimpleQueue()
    for tree in trees:
        idle.put(tree)

    def judge(mutant: Mutant) -> Outcome:
        alone, on_ranks = covering.tests(mutant.path, mutant.line)
        stages = [
            Stage("one process", ALONE, alone[:MANY]),
            Stage("ranks", ON_RANKS, on_ranks[:FEW]),
            Stage("one process", ALONE, alone[MANY:]),
            Stage("ranks", ON_RANKS, on_ranks[FEW:]),
        ]
        tree = idle.get()
        try:
            return outcome(tree, mutant, stages, SECONDS)
        finally:
            idle.put(tree)

    with ThreadPoolExecutor(len(trees)) as threads:
        mutants = sample(ROOT, PATHS, args.num, args.seed)
        waiting = [threads.submit(judge, each) for each in mutants if each not in found]
        for future in as_completed(waiting):
            each = future.result()
            found[each.mutant] = each
            _append(file, each)
            became = each.killed_by or "SURVIVED"
            print(f"{len(found)} of {args.num}: {became}, {each.mutant}", flush=True)
    for tree in trees:
        tree.stop()
    print(summary(found.values()))


def summary(found: Iterable[Outcome]) -> str:
    outcomes = [*found]
    left = [each for each in outcomes if each.killed_by is None]
    lines = [f"{each.mutant}\n{each.difference}" for each in left]
    num = len(outcomes)
    lines.append(f"{num} mutants, {num - len(left)} killed ({(num - len(left)) / num:.1%})")
    return "\n".join(lines)


def _read(file: Path) -> list[Outcome]:
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [Outcome(Mutant(*row[0]), *row[1:]) for row in rows]


def _append(file: Path, each: Outcome) -> None:
    with file.open("a") as lines:
        print(json.dumps(each), file=lines)


if __name__ == "__main__":
    main()
