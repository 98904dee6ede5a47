"""From loss-scaled gradients to the step: what torch and distclip read and write of each gradient.

    python -m benchmarks.passes [--save] [--elements N] [--rounds N]

Bytes are counted, not timed: every operator that is called on a gradient counts what it reads and
writes of it once. Temporaries do not count on either side. Times are of the same work, in turn.
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.utils.benchmark import timer

import distclip
from benchmarks import tables
from benchmarks.timing import Row, in_turn, milliseconds, ratio
from tests.benchmarks.counting import Traffic

WAYS = ("torch", "clip_", "step")
Make = Callable[[list[nn.Parameter]], Optimizer]
MAKE: dict[str, Make] = {
    "AdamW, fused": lambda params: AdamW(params, fused=True),
    "SGD with momentum, fused": lambda params: SGD(params, lr=1e-3, momentum=0.9, fused=True),
    "AdamW, foreach": lambda params: AdamW(params, foreach=True),
    "Muon": lambda params: Muon(params, ns_steps=1),
}
# Of several optimizers, each steps a parameter group with a limit of its own.
OPTIMIZERS: dict[str, list[Make]] = {name: [make] for name, make in MAKE.items()} | {
    "two groups: AdamW, fused, both": [MAKE["AdamW, fused"]] * 2,
    "two groups: Muon; AdamW, fused": [MAKE["Muon"], MAKE["AdamW, fused"]],
}
NUM_TOKENS = 4.0  # of all micro-batches, by which the sum of their gradients is divided
WIDTH = 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TITLE = "From loss-scaled gradients to the step: bytes and time"
LEGEND = """\
torch: scaler.unscale_, torch._foreach_div_ by the number of tokens, clip_grad_norm_, scaler.step.
clip_: clipper.clip_(optimizer, scaler, scale=1 / num_tokens), scaler.step.
step: clipper.step(optimizer, scaler, scale=1 / num_tokens). Muon has one Newton-Schulz step here.
Bytes: read + written of a gradient element, counted by operator. Every step clips.
Times: median (p20 to p80) of the rounds, and the ratio of the medians to torch's."""


class Work:
    """Gradients that are scaled and too large, and one step with them."""

    def __init__(self, optimizer: str, dtype: str, way: str, sizes: list[int]) -> None:
        shapes = [(n // WIDTH, WIDTH) for n in sizes]  # Muon takes matrices only
        self.params = [nn.Parameter(torch.ones(shape, dtype=DTYPES[dtype])) for shape in shapes]
        makes = OPTIMIZERS[optimizer]
        self.groups = [self.params[i :: len(makes)] for i in range(len(makes))]
        self.optimizers = [make(g) for make, g in zip(makes, self.groups, strict=True)]
        self.scaler = GradScaler("cpu", init_scale=256.0)
        self.clipper = distclip.Clipper([{"params": group} for group in self.groups])
        self.way = way

    def prepare(self) -> None:
        self.scaler.scale(torch.zeros(()))
        for param in self.params:
            param.grad = torch.full_like(param, 256.0 * NUM_TOKENS)

    def run(self) -> Tensor:
        """The norm before clipping."""
        if self.way == "step":
            norm = self.clipper.step(self.optimizers, self.scaler, scale=1 / NUM_TOKENS).total_norm
            self.scaler.update()
            return norm
        if self.way == "clip_":
            norm = self.clipper.clip_(self.optimizers, self.scaler, scale=1 / NUM_TOKENS).total_norm
        else:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            torch._foreach_div_([p.grad for p in self.params if p.grad is not None], NUM_TOKENS)
            norms = [nn.utils.clip_grad_norm_(group, 1.0) for group in self.groups]
            norm = torch.stack(norms).norm()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        return norm


def bytes_per_element(optimizer: str, dtype: str, way: str, sizes: list[int]) -> list[float]:
    """Read and written of a gradient element in the second step; the first makes the states."""
    work = Work(optimizer, dtype, way, sizes)
    work.prepare()
    work.run()
    work.prepare()
    with Traffic([p.grad for p in work.params if p.grad is not None]) as traffic:
        norm = work.run()
    assert norm > 1, "nothing was clipped"
    return [traffic.read / sum(sizes), traffic.written / sum(sizes)]


def times(optimizer: str, dtype: str, sizes: list[int], rounds: int) -> list[Row]:
    """One row for each way, which take turns."""
    works = {way: Work(optimizer, dtype, way, sizes) for way in WAYS}
    timers = {way: timeit.Timer(work.run, work.prepare, timer) for way, work in works.items()}
    taken = in_turn(timers, rounds)
    return [Row(optimizer, dtype, way, seconds) for way, seconds in taken.items()]


def table(num_elements: int, rounds: int) -> list[list[str]]:
    columns = [f"{way}: {what}" for what in ("bytes", "ms") for way in WAYS]
    lines = [["optimizer", "gradients", *columns, "ratios"]]
    for optimizer, dtype in product(OPTIMIZERS, DTYPES):
        counts = [bytes_per_element(optimizer, dtype, way, [4096, 4096]) for way in WAYS]
        rows = times(optimizer, dtype, [num_elements // 8] * 8, rounds)
        found = [(row.baseline, ratio(row, rows[0])) for row in rows[1:]]
        ratios = ", ".join(f"{way} {r.p50:.2f}" for way, r in found if r is not None)
        cells = [f"{read:g} + {written:g}" for read, written in counts]
        lines.append([optimizer, dtype, *cells, *map(str, map(milliseconds, rows)), ratios])
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = tables.parser("passes", __doc__)
    parser.add_argument("--save", action="store_true", help="write results/passes-DATE.md")
    parser.add_argument("--elements", type=int, default=1 << 23, help="of the timed gradients")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(argv)
    began = time.perf_counter()
    lines = table(options.elements, options.rounds)
    timed = f"{options.elements:,} elements in 8 tensors, {options.rounds} rounds"
    about = tables.run_facts(began) | {"work": f"{timed}, {torch.get_num_threads()} threads"}
    print(tables.plain(lines), LEGEND, tables.listed(about), sep="\n\n")
    if options.save:
        print(tables.save("passes", TITLE, about, tables.markdown(lines), LEGEND))


if __name__ == "__main__":
    main()
