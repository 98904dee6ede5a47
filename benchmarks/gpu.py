"""Clipping bf16 gradients of 1B and 8B parameters on one CUDA device, the baselines in turn.

    python -m benchmarks.gpu [--quick] [--rounds N] [--only NAME] [--out DIR]

Exits with 2 without a CUDA device, with 1 where distclip is wrong or missing. Needs only torch;
without matplotlib there is no picture.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile

from benchmarks import baselines, report
from benchmarks.baselines import CLIPPER, COPY, MEASURING
from benchmarks.clip import Case
from benchmarks.goals import AtMost, Goal
from benchmarks.gradients import Shapes, random_gradients
from benchmarks.timing import STATES, Count, Row, Run, measure
from tests.benchmarks.models import LLAMA_1B, LLAMA_8B

NO_DEVICE = "torch sees no CUDA device on this machine, so nothing was measured"
SMALL = ("small", [(300, 70), (512, 64), (64,)])
MODELS = [(model.name, [w.shape for w in model.weights]) for model in (LLAMA_1B, LLAMA_8B)]
STEP = "clipping and step"
COPIES = 6  # weights, gradients, the original gradients, the target of the copy, AdamW's two states


def needed_bytes(shapes: Shapes) -> int:
    """In bf16, and the largest tensor twice in float32: a kernel may need it as a temporary."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return COPIES * 2 * sum(sizes) + 2 * 4 * max(sizes)


def counted(run: Run, prepare: Run) -> dict[str, int]:
    """Kernels that one call launches, and how often the host waits for the device in it."""
    prepare()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    prepare()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    events = ((event.key, event.count) for event in profiled.key_averages())
    messages = (str(each.message) for each in caught)
    return {"launches": num_launches(events), "syncs": num_syncs(messages)}


def num_launches(events: Iterable[tuple[str, int]]) -> int:
    """All variants of the runtime's cudaLaunchKernel and of cuLaunchKernel, which Triton uses."""
    return sum(count for name, count in events if "LaunchKernel" in name)


def num_syncs(messages: Iterable[str]) -> int:
    return sum("synchronizing CUDA operation" in message for message in messages)


def measure_case(
    case: Case, rounds: int, device: str = "cuda", count: Count = counted
) -> list[Row]:
    """Measuring alone, `clip_` that does not clip and that does, and with the optimizer's step."""
    work, rows = random_gradients(case.shapes, case.dtype, device), []
    stepping = baselines.stepping(AdamW(work.params, lr=1e-6, fused=True))
    for state, ways in (
        ("not clipping", [*baselines.ON_DEVICE, baselines.MEASURING_ALONE]),
        ("clipping", baselines.ON_DEVICE),
        (STEP, stepping),
    ):
        factor = STATES.get(state, STATES["clipping"])
        rows += measure(case.name, state, work, ways, factor, rounds, count)
    return rows


def goals_of(case: str) -> list[Goal | AtMost]:
    # A copy reads every byte and writes it; measuring only reads it.
    bandwidth = {"than": COPY, "work": 0.5, "label": "the bandwidth of a device copy"}
    return [
        Goal(case, "not clipping", 0.85, baseline=MEASURING, **bandwidth),
        Goal(case, "not clipping", 2.5),
        Goal(case, "clipping", 1.0),
        Goal(case, STEP, 1.0),
        *(AtMost(case, state, CLIPPER, "syncs", 0) for state in (*STATES, STEP)),
        *(AtMost(case, state, CLIPPER, "launches", 4) for state in STATES),
    ]


def measure_if_it_fits(case: Case, rounds: int) -> list[Row]:
    free, needed = (n / 2**30 for n in (torch.cuda.mem_get_info()[0], needed_bytes(case.shapes)))
    if needed > free:
        note = f"does not fit: needs {needed:.1f} GiB, {free:.1f} GiB are free"
        return [Row(case.name, state, "all", note=note) for state in (*STATES, STEP)]
    rows = measure_case(case, rounds)
    gc.collect()  # the next case needs the memory
    torch.cuda.empty_cache()
    return rows


def cases(quick: bool) -> list[Case]:
    models = [SMALL] if quick else MODELS
    return [Case(f"{name}, bf16", shapes, torch.bfloat16) for name, shapes in models]


def main(argv: Sequence[str] | None = None) -> int:
    run = report.Benchmark.parse("gpu", "Clipping on one CUDA device", __doc__, argv)
    if not torch.cuda.is_available():
        print(f"benchmarks.gpu: {NO_DEVICE}", file=sys.stderr)
        return 2
    rows = run.measure(cases(run.quick), measure_if_it_fits)
    goals = [goal for case in dict.fromkeys(row.case for row in rows) for goal in goals_of(case)]
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at the peak"
    device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return run.publish(rows, goals, f"{device}; {peak}")


if __name__ == "__main__":
    sys.exit(main())
