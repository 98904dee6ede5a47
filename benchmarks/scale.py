"""Plans and collectives on up to 16,384 simulated ranks: every element once, and at what cost.

    python -m benchmarks.scale [--quick] [--json FILE] [--save]
    python -m benchmarks.scale --plan

One process is one rank after the other under torch's fake process group; the weights are meta
tensors. Exits with 1 where an element is not counted exactly once. `--plan` only prints the table
in docs of what one step communicates.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.scale_costs import Network, collectives
from tests.benchmarks.counting import Collective
from tests.benchmarks.models import LLAMA_8B, LLAMA_70B, LLAMA_405B, MIXTURE
from tests.benchmarks.simulated_ranks import Case, build_plans, counted_once

CASES = (
    Case(LLAMA_8B, (1, 1, 8, 1)),
    Case(LLAMA_8B, (1, 8, 256, 8), num_random=0),  # half of the ranks hold nothing of wk and wv
    Case(LLAMA_70B, (10, 3, 10, 8)),  # shards of different sizes
    Case(LLAMA_70B, (8, 8, 32, 8)),
    Case(LLAMA_405B, (16, 1, 128, 8)),  # the axes of its training (arXiv:2407.21783, table 4)
    Case(LLAMA_405B, (16, 2, 64, 8)),
    Case(LLAMA_405B, (1, 8, 256, 8), num_random=0),  # the whole model in one rank's plan
    Case(MIXTURE, (16, 2, 64, 8), (16, 2, 8, 64)),
    Case(MIXTURE, (16, 4, 32, 8), (16, 4, 4, 64)),
)
QUICK = (
    Case(LLAMA_70B, (10, 3, 10, 4), num_random=0),
    Case(LLAMA_405B, (16, 2, 64, 8), num_random=0, num_corners=2),
    Case(MIXTURE, (16, 2, 8, 8), (16, 2, 2, 32), num_random=0, num_corners=2),
)
ON_PAPER = (
    Case(LLAMA_8B, (1, 1, 8, 1)),
    Case(LLAMA_8B, (1, 8, 8, 1)),
    Case(LLAMA_70B, (4, 4, 8, 8)),
    Case(LLAMA_405B, (16, 1, 128, 8)),
)
NETWORK = Network(call=6.8e-6, alpha=5e-6, beta=1e-9 / 50)
PLANS = ["GPUs", "model", "mesh", "elements", "counted", "plans", "tensors"]
PLANS += ["s", "CPU s", "MB (RSS)"]
MEMORY = "{megabytes:.1f} ({rss_megabytes:.1f})"
AXES = "pp x replicate x shard x tp"
COSTS = ["GPUs", "model", AXES, "library", "collectives, of ranks", "bytes", "tree us", "ring us"]
METHOD = f"""\
mesh: {AXES}; after "+": efsdp x ep, the experts' mesh over the same ranks.
counted: `Layout.counted_at` for every rank, and the sizes of its shards by torch's own rule.
"once": one rank counts each shard, and for each weight they add up to the whole.
plans: a complete Clipper for the first and last rank of the first and last stage and for random
ranks, sharded by `distribute_tensor` and `fully_shard`; layouts, coordinates and sizes are those of
the rule. tensors: the most on one rank. s, CPU s, MB: of the most expensive plan, without meshes
and wrappers; MB is the peak of tracemalloc (growth of RSS)."""
MODEL = """\
A model, not a measurement. tree: call + 2 ceil(log2 p) (alpha + n beta); ring: call + 2 (p - 1)
(alpha + n beta / p); p ranks, n bytes (Thakur, Rabenseifner, Gropp, IJHPCA 19(1), 2005). call = 6.8
us, alpha = 5 us: NCCL's table for trees over a network, protocol LL (src/graph/tuning.cc). beta = 1
s / 50 GB: 400 Gb/s for each GPU (arXiv:2407.21783, section 3.3).
A tree over all ranks is as deep as trees over the axes one after the other: one collective saves
`call` for each of the others, and pays for dp_replicate, which torch leaves out.
distclip's and torch's collectives are counted by CommDebugMode on rank 0, with small weights and
two layers in each stage; torch's for each mesh, combined over pp, as torchtitan does. DeepSpeed's
are read in its source (0.19.8): 2 parameter groups, sub-groups of 1e9 elements."""


@dataclass(frozen=True)
class Row:
    case: Case
    once: bool
    costs: dict[str, float]
    collectives: dict[str, list[Collective]]

    def cells(self) -> list[str]:
        numel, once = f"{self.case.model.numel:,}", "once" if self.once else "WRONG"
        formats = ("{plans}", "{tensors}", "{seconds:.3f}", "{cpu_seconds:.3f}", MEMORY)
        costs = [text.format(**self.costs) for text in formats]
        return [*case_cells(self.case), numel, once, *costs]

    def as_json(self) -> dict[str, Any]:
        counts = {name: [asdict(c) for c in found] for name, found in self.collectives.items()}
        _, model, mesh = case_cells(self.case)
        about = {"ranks": self.case.world, "model": model, "mesh": mesh, "once": self.once}
        return {**self.costs, **about, "collectives": counts}


def case_cells(case: Case) -> list[str]:
    experts = () if case.experts is None else (case.experts[2:],)
    mesh = " + ".join(" x ".join(map(str, shape)) for shape in (case.dense, *experts))
    return [f"{case.world:,}", case.model.name, mesh]


def cost_lines(case: Case, collectives: dict[str, list[Collective]]) -> list[list[str]]:
    lines: list[list[str]] = []
    for library, found in collectives.items():
        ranks = f"{len(found)}: {' + '.join(f'{c.ranks:,}' for c in found)}"
        tree, ring = (sum(map(seconds, found)) * 1e6 for seconds in (NETWORK.tree, NETWORK.ring))
        payload = str(sum(c.payload for c in found))
        numbers = [ranks, payload, f"{tree:.0f}", f"{ring:,.0f}"]
        lines.append([*case_cells(case), library, *numbers])
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser, began = tables.parser("scale", __doc__), time.perf_counter()
    add = parser.add_argument
    add("--quick", action="store_true", help="a few small meshes and one of 16,384 ranks")
    add("--plan", action="store_true", help="print the table in docs and nothing else")
    add("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    add("--save", action="store_true", help="write results/scale-DATE.md")
    options = parser.parse_args(argv)
    # It warns about redistributions that no step repeats.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    if options.plan:
        lines = (line for case in ON_PAPER for line in cost_lines(case, collectives(case)))
        print(tables.markdown([COSTS, *lines]))
        return 0
    rows: list[Row] = []
    for case in QUICK if options.quick else CASES:
        layouts, costs = build_plans(case)
        rows.append(Row(case, counted_once(case, layouts), costs, collectives(case)))
    plans = [PLANS, *(row.cells() for row in rows)]
    costs = [COSTS, *(line for r in rows for line in cost_lines(r.case, r.collectives))]
    about = tables.run_facts(began) | {r.case.model.name: r.case.model.source for r in rows}
    print(tables.plain(plans), METHOD, tables.plain(costs), MODEL, tables.listed(about), sep="\n\n")
    if options.json:
        options.json.write_text(json.dumps([row.as_json() for row in rows], indent=1))
    if options.save:
        parts = tables.markdown(plans), METHOD, tables.markdown(costs), MODEL
        tables.save("scale", "Plans and collectives on simulated ranks", about, *parts)
    return 0 if all(row.once for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
