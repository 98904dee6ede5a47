"""The table of docs/scale.md: what one clipping step communicates at four sizes.

    python -m benchmarks.scale_plan

Collectives are counted under a fake process group and priced by the alpha-beta model, as in `benchmarks.scale`.
"""

from __future__ import annotations

import logging

from benchmarks.models import LLAMA_8B, LLAMA_70B, LLAMA_405B
from benchmarks.scale import arguments
from benchmarks.scale_costs import Collective, Network, counted, deepspeed
from benchmarks.scale_ranks import Case

CASES = (
    Case(LLAMA_8B, (1, 1, 8, 1)),
    Case(LLAMA_8B, (1, 8, 8, 1)),
    Case(LLAMA_70B, (4, 4, 8, 8)),
    Case(LLAMA_405B, (16, 1, 128, 8)),
)
HEAD = [
    "GPUs",
    "model",
    "pp x replicate x shard x tp",
    "library",
    "collectives, of ranks",
    "bytes",
    "tree us",
    "ring us",
]


def table(network: Network) -> str:
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # torch says it is suboptimal
    lines = [HEAD, ["---"] * len(HEAD)]
    for case in CASES:
        name, theirs = deepspeed(case, num_groups=2, sub_group_size=1e9)
        for library, collectives in {**counted(case), name: theirs}.items():
            mesh = " x ".join(map(str, case.dense))
            lines.append([f"{case.world:,}", case.model.name, mesh, library, *cells(collectives, network)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(collectives: list[Collective], network: Network) -> list[str]:
    ranks = " + ".join(f"{c.ranks:,}" for c in collectives)
    tree, ring = (sum(map(time, collectives)) * 1e6 for time in (network.tree, network.ring))
    return [f"{len(collectives)}: {ranks}", str(sum(c.payload for c in collectives)), f"{tree:.0f}", f"{ring:,.0f}"]


if __name__ == "__main__":
    defaults = arguments([])
    print(table(Network(defaults.call * 1e-6, defaults.alpha * 1e-6, 1e-9 / defaults.gbs)))
