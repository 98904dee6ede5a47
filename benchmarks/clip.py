"""Clipping plain tensors in one process on all cores, the rivals in turn.

    python -m benchmarks.clip [--quick] [--rounds N] [--only NAME] [--out DIR]

Exits with 1 where distclip is wrong or missing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn

from benchmarks import show
from benchmarks.goals import BACKWARD, BF16, CLIP, FLOAT32, FP16, SMALL
from benchmarks.rivals import AFTER_BACKWARD, IN_ONE_PROCESS
from benchmarks.timing import STATES, Gradients, Rival, Row, float64_norm, measure

Shapes = list[tuple[int, ...]]


def gpt2(width: int, layers: int, vocabulary: int, context: int) -> Shapes:
    """Two embeddings, twelve tensors a layer, the last norm."""
    square, wide = (width, width), (width, 4 * width)
    attention = [(width,), (width,), (width, 3 * width), (3 * width,), square, (width,)]
    feed_forward = [(width,), (width,), wide, (4 * width,), wide[::-1], (width,)]
    return [(vocabulary, width), (context, width), *layers * (attention + feed_forward), (width,), (width,)]


GPT2 = gpt2(768, 12, 50_257, 1024)  # 124,439,808 elements in 148 tensors
SMALL_GPT2 = gpt2(64, 2, 500, 64)


@dataclass(frozen=True)
class Case:
    name: str
    shapes: Shapes
    dtype: torch.dtype
    times: int = 1  # as many rounds as the others: short calls need more of them
    after_backward: bool = False  # each call comes right after one, which leaves nothing of the gradients in the caches

    @property
    def rivals(self) -> Sequence[Rival]:
        return AFTER_BACKWARD if self.after_backward else IN_ONE_PROCESS


def cases(quick: bool) -> list[Case]:
    model, num_small = (SMALL_GPT2, 200) if quick else (GPT2, 2000)
    return [
        Case(FLOAT32, model, torch.float32),
        Case(BF16, model, torch.bfloat16),
        Case(FP16, model, torch.float16),
        Case(SMALL, num_small * [(100,)], torch.float32, times=1 if quick else 4),
        Case(BACKWARD, num_small * [(100,)], torch.float32, after_backward=True),
    ]


def gradients(shapes: Shapes, dtype: torch.dtype, device: str = "cpu") -> Gradients:
    """Random ones, each tensor in memory of its own. Their norm fits into fp16."""
    generator = torch.Generator(device).manual_seed(0)
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)) for shape in shapes]
    for param in params:
        param.grad = torch.empty_like(param).normal_(generator=generator)
    values = [p.grad for p in params if p.grad is not None]
    return Gradients(params, values, float64_norm(values))


class AfterBackward(Gradients):
    """Gradients that a backward makes anew for every call."""

    def restore(self) -> None:
        for param in self.params:
            param.grad = None
        pairs = zip(self.params, self.saved, strict=True)
        torch.stack([(param * grad).sum() for param, grad in pairs]).sum().backward()

    def prepare(self, clipping: bool) -> None:
        self.restore()

    def errors(self, norm: Tensor | float, limit: float) -> tuple[float, float]:
        self.values = [p.grad for p in self.params if p.grad is not None]
        try:
            return super().errors(norm, limit)
        finally:
            self.values = self.saved  # kept alive, these gradients would scatter the next ones over memory


def rows_of(case: Case, rounds: int) -> list[Row]:
    work = gradients(case.shapes, case.dtype)
    if case.after_backward:
        work = AfterBackward(work.params, work.values, work.norm)
    return [
        row
        for state, factor in STATES.items()
        for row in measure(case.name, state, factor, work, case.rivals, case.times * rounds)
    ]


def main() -> int:
    options = tyro.cli(show.Options, prog="python -m benchmarks.clip", description=__doc__)
    # With small shapes several threads would wait for each other, on a busy machine for long.
    torch.set_num_threads(1 if options.quick else os.cpu_count() or 1)
    began = show.Began()
    rows: list[Row] = []
    for case in options.chosen(cases(options.quick)):
        show.progress(case.name, began)
        rows += rows_of(case, options.num_rounds)
    shapes = cases(options.quick)[0].shapes
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    work = f"one process, threads: {torch.get_num_threads()}; plain: {numel:,} elements in {len(shapes)} tensors"
    return show.publish("clip", "Clipping plain tensors", rows, CLIP, options, began, work)


if __name__ == "__main__":
    sys.exit(main())
