"""Clipping plain tensors in one process on all cores, the baselines in turn.

    python -m benchmarks.clip [--quick] [--rounds N] [--only NAME] [--out DIR]

Exits with 1 where distclip is wrong or missing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks import report
from benchmarks.baselines import AFTER_BACKWARD, IN_ONE_PROCESS
from benchmarks.goals import BACKWARD, BF16, CLIP, FLOAT32, FP16, MANY, SMALL
from benchmarks.gradients import AfterBackward, Shapes, random_gradients
from benchmarks.timing import STATES, Baseline, Row, measure


def gpt2(width: int, layers: int, vocabulary: int, context: int) -> Shapes:
    """Two embeddings, twelve tensors in each layer, the last norm."""
    square, wide = (width, width), (width, 4 * width)
    attention = [(width,), (width,), (width, 3 * width), (3 * width,), square, (width,)]
    feed_forward = [(width,), (width,), wide, (4 * width,), wide[::-1], (width,)]
    ends = [(vocabulary, width), (context, width)], [(width,), (width,)]
    return [*ends[0], *layers * (attention + feed_forward), *ends[1]]


GPT2 = gpt2(768, 12, 50_257, 1024)  # 124,439,808 elements in 148 tensors
SMALL_GPT2 = gpt2(64, 2, 500, 64)


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        times: as many rounds as the other cases; short calls need more of them.
        after_backward: each call comes right after a backward.
    """

    name: str
    shapes: Shapes
    dtype: torch.dtype
    times: int = 1
    after_backward: bool = False

    @property
    def baselines(self) -> Sequence[Baseline]:
        return AFTER_BACKWARD if self.after_backward else IN_ONE_PROCESS


def cases(quick: bool) -> list[Case]:
    model, num_small = (SMALL_GPT2, 200) if quick else (GPT2, 2000)
    num_many = 20 if quick else 384
    return [
        Case(FLOAT32, model, torch.float32),
        Case(BF16, model, torch.bfloat16),
        Case(FP16, model, torch.float16),
        Case(MANY, num_many * [(65_536,)], torch.float32),
        Case(SMALL, num_small * [(100,)], torch.float32, times=1 if quick else 4),
        Case(BACKWARD, num_small * [(100,)], torch.float32, after_backward=True),
    ]


def measure_case(case: Case, rounds: int) -> list[Row]:
    work = random_gradients(case.shapes, case.dtype)
    if case.after_backward:
        work = AfterBackward(work.params, work.values, work.norm)
    rows: list[Row] = []
    for state, factor in STATES.items():
        rows += measure(case.name, state, work, case.baselines, factor, case.times * rounds)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    run = report.Benchmark.parse("clip", "Clipping plain tensors", __doc__, argv)
    # With small shapes several threads would wait for each other, under load for long.
    torch.set_num_threads(1 if run.quick else os.cpu_count() or 1)
    rows, shapes = run.measure(cases(run.quick), measure_case), cases(run.quick)[0].shapes
    size = f"{sum(torch.Size(s).numel() for s in shapes):,} elements in {len(shapes)} tensors"
    return run.publish(rows, CLIP, f"one process, threads: {torch.get_num_threads()}; {size}")


if __name__ == "__main__":
    sys.exit(main())
