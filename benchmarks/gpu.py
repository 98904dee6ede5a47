"""Clipping bf16 gradients of 1B and 8B parameters on one CUDA device, the rivals in turn.

    python -m benchmarks.gpu [--quick] [--rounds N] [--only NAME] [--out DIR]

Exits with 2 without a CUDA device, with 1 where distclip is wrong or missing.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterable

import torch
import tyro
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile

from benchmarks import show
from benchmarks.clip import Case, Shapes, gradients
from benchmarks.correctness import NORM_TOLERANCE
from benchmarks.goals import AtMost, Goal
from benchmarks.models import LLAMA_1B, LLAMA_8B, Model
from benchmarks.rivals import CLIPPER, COPY, IN_ONE_PROCESS, MEASURING, copy, measuring, stepping
from benchmarks.timing import STATES, Clock, Count, Rival, Row, Run, measure

MODELS = (LLAMA_1B, LLAMA_8B)
STEP = "clipping and step"
COPIES = 6  # weights, gradients, what they were, the target of the copy, two states of AdamW


def shapes_of(model: Model) -> Shapes:
    return [weight.shape for unit in model.stage(0, 1) for weight in unit]


def needed_bytes(shapes: Shapes) -> int:
    """In bf16, and the largest tensor twice in float32: a kernel may need it as a temporary."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return COPIES * 2 * sum(sizes) + 2 * 4 * max(sizes)


def device_seconds(run: Run) -> float:
    """Between two events on the device: what the host takes shows where the device waits for it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


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
    return {"launches": num_launches(events), "syncs": num_syncs(str(each.message) for each in caught)}


def num_launches(events: Iterable[tuple[str, int]]) -> int:
    """Of the runtime's cudaLaunchKernel and the driver's cuLaunchKernel, by which Triton launches, in all variants."""
    return sum(count for name, count in events if "LaunchKernel" in name)


def num_syncs(messages: Iterable[str]) -> int:
    return sum("synchronizing CUDA operation" in message for message in messages)


def rows_of(
    case: Case, rounds: int, device: str = "cuda", clock: Clock = device_seconds, count: Count = counted
) -> list[Row]:
    """Measuring alone, `clip_` that does not clip and that does, and with the optimizer's step."""
    work = gradients(case.shapes, case.dtype, device)
    passes = [*IN_ONE_PROCESS, Rival(COPY, copy, None)]
    works = {
        "not clipping": (STATES["not clipping"], [*passes, Rival(MEASURING, measuring, NORM_TOLERANCE)]),
        "clipping": (STATES["clipping"], passes),
        STEP: (STATES["clipping"], stepping(AdamW(work.params, lr=1e-6, fused=True))),
    }
    return [
        row
        for state, (factor, rivals) in works.items()
        for row in measure(case.name, state, factor, work, rivals, rounds, clock=clock, count=count)
    ]


def goals_of(case: str) -> list[Goal | AtMost]:
    return [
        # A copy reads every byte and writes it; measuring reads it.
        Goal(case, "not clipping", 0.85, than=COPY, rival=MEASURING, work=0.5, said="the bandwidth of a device copy"),
        Goal(case, "not clipping", times=2.5),
        Goal(case, "clipping", times=1.0),
        Goal(case, STEP, times=1.0),
        *(AtMost(case, state, CLIPPER, "syncs", 0) for state in (*STATES, STEP)),
        *(AtMost(case, state, CLIPPER, "launches", 4) for state in STATES),
    ]


def rows_if_it_fits(case: Case, rounds: int) -> list[Row]:
    free, needed = torch.cuda.mem_get_info()[0], needed_bytes(case.shapes)
    if needed > free:
        note = f"does not fit: needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        return [Row(case.name, state, "all", note=note) for state in (*STATES, STEP)]
    torch.cuda.reset_peak_memory_stats()
    rows = rows_of(case, rounds)
    gc.collect()  # the next case needs the memory
    torch.cuda.empty_cache()
    return rows


def cases(quick: bool) -> list[Case]:
    if quick:
        return [Case("small, bf16", [(300, 70), (512, 64), (64,)], torch.bfloat16)]
    return [Case(f"{model.name}, bf16", shapes_of(model), torch.bfloat16) for model in MODELS]


def main() -> int:
    options = tyro.cli(show.Options, prog="python -m benchmarks.gpu", description=__doc__)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA device on this machine, so nothing was measured", file=sys.stderr)
        return 2
    began, chosen, rows, peaks = show.Began(), options.chosen(cases(options.quick)), [], []
    for case in chosen:
        show.progress(case.name, began)
        rows += rows_if_it_fits(case, options.num_rounds)
        peaks.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at the peak of {case.name}")
    goals = [goal for case in chosen for goal in goals_of(case.name)]
    work = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; {', '.join(peaks)}"
    return show.publish("gpu", "Clipping on one CUDA device", rows, goals, options, began, work)


if __name__ == "__main__":
    sys.exit(main())
