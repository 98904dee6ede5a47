"""Clipping what FSDP2 and tensor parallelism have sharded, on ranks over gloo, baselines in turn.

    python -m benchmarks.sharded [--quick] [--rounds N] [--only NAME] [--out DIR]

A rank is a process with one thread. The time of a round is that of the slowest rank, from a barrier
on. Exits with 1 where distclip is wrong or missing.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, parallel

from benchmarks import report
from benchmarks.baselines import ON_RANKS
from benchmarks.goals import FOUR_RANKS, SHARDED, TWO_AXES, TWO_RANKS
from benchmarks.gradients import Gradients, float64_norm
from benchmarks.timing import STATES, Row, measure
from tests.support.ranks import Ranks, mesh

LIMIT_S = 600.0  # for one case
TOKENS = 8  # of a sequence; the ranks of a tensor parallel axis share them


class Size(NamedTuple):
    num_blocks: int
    width: int


class Case(NamedTuple):
    name: str
    shape: tuple[int, ...]  # of the mesh
    axes: tuple[str, ...]


CASES = (
    Case(TWO_RANKS, (2,), ("dp",)),
    Case(FOUR_RANKS, (4,), ("dp",)),
    Case(TWO_AXES, (2, 2), ("dp", "tp")),
)
FULL, QUICK = Size(num_blocks=32, width=256), Size(num_blocks=2, width=32)


class Block(nn.Module):
    """The tensors of a transformer; only gradients matter here, so the attention has no softmax."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.out(self.q(y) * self.k(y).sigmoid() + self.v(y))
        return x + self.down(self.up(self.norm2(x)).relu())


def tensor_parallel(block: Block, tp: DeviceMesh) -> None:
    """Makes every parameter a DTensor: torch cannot clip DTensors and plain tensors together."""
    columns = parallel.ColwiseParallel(input_layouts=Shard(1))
    rows = parallel.RowwiseParallel(output_layouts=Shard(1))
    plan = dict.fromkeys(("norm1", "norm2"), parallel.SequenceParallel())
    plan |= dict.fromkeys(("q", "k", "v", "up"), columns) | dict.fromkeys(("out", "down"), rows)
    parallel.parallelize_module(block, tp, plan)


def gradients(case: Case, size: Size) -> Gradients:
    """Those of one real backward: they lie in memory as FSDP2 puts them. Collective."""
    ranks = mesh(case.shape, case.axes)
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(size.width) for _ in range(size.num_blocks)))
    for block in model:
        if "tp" in case.axes:
            tensor_parallel(block, ranks["tp"])
        fully_shard(block, mesh=ranks["dp"])
    fully_shard(model, mesh=ranks["dp"])
    torch.manual_seed(ranks["dp"].get_local_rank())
    x = torch.randn(2, TOKENS, size.width)
    if "tp" in case.axes:
        x = x.chunk(ranks["tp"].size(), 1)[ranks["tp"].get_local_rank()]
    # Large, because torch adds 1e-6 to the norm.
    (1e4 * model(x).square().mean()).backward()
    grads = [p.grad for p in model.parameters() if isinstance(p.grad, DTensor)]
    assert len(grads) == 12 * size.num_blocks
    whole = float64_norm([g.full_tensor() for g in grads])
    return Gradients(list(model.parameters()), [g.to_local() for g in grads], whole)


def measure_case(case: Case, size: Size, rounds: int) -> list[Row]:
    """The same rows on every rank. Collective."""
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # advice on meshes
    rows: list[Row] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work = gradients(case, size)
        for state, factor in STATES.items():
            rows += measure(case.name, state, work, ON_RANKS, factor, rounds)
    return rows


def main(argv: Sequence[str] | None = None, pool: Callable[[int], Ranks] | None = None) -> int:
    """`pool`: ranks by their number; without it they are started, and end with this process."""
    run = report.Benchmark.parse("sharded", "Clipping sharded tensors", __doc__, argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # the ranks read it when they start
    pool, (size, times) = pool or cache(Ranks), (QUICK, 1) if run.quick else (FULL, 2)

    def on_ranks(case: Case, rounds: int) -> list[Row]:
        ranks = pool(prod(case.shape))
        return ranks.run(measure_case, case, size, times * rounds, limit_s=LIMIT_S)[0]

    numel = size.num_blocks * sum(p.numel() for p in Block(size.width).parameters())
    tensors = f"{size.num_blocks} blocks of 12 tensors, {numel:,} float32 elements"
    work = f"gloo, one thread per rank; {tensors}"
    return run.publish(run.measure(CASES, on_ranks), SHARDED, work)


if __name__ == "__main__":
    sys.exit(main())
