"""Plans and collectives on up to 16,384 ranks, by simulation: every element once, how fast, and at what cost.

    python -m benchmarks.scale [--quick] [--json FILE] [--save]

One process is one rank after the other under torch's fake process group. The weights are meta tensors, so that
nothing of the model is in memory. Exits with 1 where an element is not counted exactly once.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.correctness import RESULTS, about_this_run
from benchmarks.models import LLAMA_8B, LLAMA_70B, LLAMA_405B, MIXTURE
from benchmarks.scale_costs import Collective, Network, counted, deepspeed
from benchmarks.scale_ranks import Case, Measured, build_plans, count, sample

CASES = (
    Case(LLAMA_8B, (1, 1, 8, 1)),
    Case(LLAMA_8B, (1, 8, 256, 8), num_random=0),  # half of the ranks hold nothing of wk and wv
    Case(LLAMA_70B, (10, 3, 10, 8)),  # shards of different sizes
    Case(LLAMA_70B, (8, 8, 32, 8)),
    Case(LLAMA_405B, (16, 1, 128, 8)),  # the axes of its own training (arXiv:2407.21783, table 4)
    Case(LLAMA_405B, (16, 2, 64, 8)),
    Case(LLAMA_405B, (1, 8, 256, 8), num_random=0),  # the whole model in one rank's plan
    Case(MIXTURE, (16, 2, 64, 8), (16, 2, 8, 64)),
    Case(MIXTURE, (16, 4, 32, 8), (16, 4, 4, 64)),
)
QUICK = (
    Case(LLAMA_70B, (10, 3, 10, 4), num_random=0),
    Case(LLAMA_405B, (16, 2, 64, 8), num_random=0),
    Case(MIXTURE, (16, 2, 8, 8), (16, 2, 2, 32), num_random=0),
)
METHOD = """\
mesh: pp x dp_replicate x fsdp x tp; after "+": efsdp x ep, the experts' mesh over the same ranks.
counted: for every rank, `Layout.counted_at` at its coordinates, and the sizes of its shards by torch's own
rule.
"once": each shard has one counting rank; for each weight, what they hold is as much as the weight has.
plans: built in full for the first and last rank of the first and last stage, and for some random ranks: the
stage is sharded by `distribute_tensor` and `fully_shard` under a fake process group, a complete Clipper is
made of it, and layout, coordinates, counted or not, and shard sizes are what the rule says. tensors: the
most on one rank.
s, CPU s, MB: the most of any plan: wall clock, process CPU time, peak of tracemalloc (growth of RSS).
The making of meshes, wrappers and meta tensors is outside of them."""
MODEL = """\
T = sum over the collectives of a step. tree: call + 2 ceil(log2 p) (alpha + n beta), a binomial reduce and
broadcast; ring: call + 2 (p - 1) (alpha + n beta / p); p ranks, n bytes (Thakur, Rabenseifner, Gropp:
Optimization of Collective Communication Operations in MPICH, IJHPCA 19(1), 2005).
call = {call:g} us, alpha = {alpha:g} us: NCCL's own table for trees over a network, protocol LL (baseLat,
hwLat in its src/graph/tuning.cc); beta = 1 s / {gbs:g} GB: 400 Gb/s a GPU (arXiv:2407.21783, section 3.3).
A model, not a measurement. A tree over all ranks is as deep as trees over the axes one after the other: one
collective saves `call` for each of the others, and pays for the levels of dp_replicate, which torch leaves
out.
It wants a tree: a ring over all ranks is far slower than rings over axes.
distclip's and torch's collectives are counted: CommDebugMode on rank 0 under the fake process group, on the
same mesh, with small weights and two layers a stage. torch's functions are called for each mesh and joined
over pp, as torchtitan does; their bytes grow with the number of tensors. DeepSpeed's are read in DeepSpeed
0.19.8 source, for {groups} parameter groups, and sub-groups of {sub_group_size:g} elements."""


@dataclass(frozen=True)
class Row:
    case: Case
    once: bool
    measured: Measured
    collectives: dict[str, list[Collective]]

    @property
    def mesh(self) -> str:
        dense = "x".join(map(str, self.case.dense))
        return dense if self.case.experts is None else f"{dense} + {'x'.join(map(str, self.case.experts[2:]))}"

    def plan_cells(self) -> list[str]:
        m, case = self.measured, self.case
        verdict = "once" if self.once else "WRONG"
        counts = [f"{case.world:,}", f"{case.model.numel:,}", verdict, str(m.plans), str(m.tensors)]
        costs = [f"{m.seconds:.3f}", f"{m.cpu_seconds:.3f}", f"{m.megabytes:.1f} ({m.rss_megabytes:.1f})"]
        return [case.model.name, self.mesh, *counts, *costs]

    def cost_cells(self, network: Network) -> list[list[str]]:
        lines: list[list[str]] = []
        for library, collectives in self.collectives.items():
            alike = Counter(c.ranks for c in collectives)
            ranks = " + ".join(f"{n} x {p:,}" if n > 1 else f"{p:,}" for p, n in alike.items())
            tree, ring = (sum(map(time_of, collectives)) for time_of in (network.tree, network.ring))
            cells = [str(len(collectives)), ranks, str(sum(c.payload for c in collectives))]
            lines.append([self.case.model.name, self.mesh, library, *cells, f"{tree * 1e6:.0f}", f"{ring * 1e6:,.0f}"])
        return lines


def simulate(case: Case, options: argparse.Namespace) -> Row:
    layouts, measured = build_plans(case, sample(case))
    zero, theirs = deepspeed(case, options.groups, options.sub_group_size)
    return Row(case, count(case, layouts), measured, {**counted(case), zero: theirs})


def tables(rows: list[Row], network: Network) -> list[list[list[str]]]:
    plans = ["model", "mesh", "ranks", "elements", "counted", "plans", "tensors", "s", "CPU s", "MB (RSS)"]
    costs = ["model", "mesh", "library", "calls", "ranks of each", "bytes", "tree us", "ring us"]
    return [
        [plans, *(row.plan_cells() for row in rows)],
        [costs, *(line for row in rows for line in row.cost_cells(network))],
    ]


def plain_text(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    padded = ([text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in ruled)
    return "\n".join(" ".join(line).rstrip() for line in padded)


def markdown(rows: list[Row], network: Network, notes: list[str], about: dict) -> str:
    facts = [f"- {name}: {value}" for name, value in about.items()]
    models = [f"- {name}: {source}" for name, source in {r.case.model.name: r.case.model.source for r in rows}.items()]
    parts = [["# Plans and collectives on up to 16,384 simulated ranks", "", *facts, *models, ""]]
    for lines, note in zip(tables(rows, network), notes, strict=True):
        ruled = (lines[0], ["---"] * len(lines[0]), *lines[1:])
        parts.append([f"| {' | '.join(line)} |" for line in ruled] + ["", note, ""])
    return "\n".join(line for part in parts for line in part) + "Made by `python -m benchmarks.scale --save`.\n"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few small meshes and one of 16,384 ranks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}/scale-DATE.md")
    parser.add_argument("--call", type=float, default=6.8, help="fixed cost of a collective, in us")
    parser.add_argument("--alpha", type=float, default=5.0, help="latency of a message, in us")
    parser.add_argument("--gbs", type=float, default=50.0, help="bandwidth in GB/s: 1 / beta")
    parser.add_argument("--groups", type=int, default=2, help="DeepSpeed's parameter groups: with and without decay")
    parser.add_argument("--sub-group-size", type=float, default=1e9, help="DeepSpeed's, in elements")
    return parser.parse_args(argv)


def as_json(row: Row) -> dict:
    counts = {library: [asdict(c) for c in found] for library, found in row.collectives.items()}
    about = {"model": row.case.model.name, "mesh": row.mesh, "ranks": row.case.world, "once": row.once}
    return {**asdict(row.measured), **about, "collectives": counts}


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # torch says it is suboptimal
    begin = time.perf_counter()
    rows = [simulate(case, options) for case in (QUICK if options.quick else CASES)]
    about = about_this_run(time.perf_counter() - begin)
    network = Network(options.call * 1e-6, options.alpha * 1e-6, 1e-9 / options.gbs)
    notes = [METHOD, MODEL.format(**vars(options))]
    for lines, note in zip(tables(rows, network), notes, strict=True):
        print(plain_text(lines), "", note, "", sep="\n")
    print(*(f"{name}: {value}" for name, value in about.items()), sep="\n")
    if options.json:
        options.json.write_text(json.dumps([as_json(row) for row in rows], indent=1))
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"scale-{about['date']}.md").write_text(markdown(rows, network, notes, about))
    return 0 if all(row.once for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
