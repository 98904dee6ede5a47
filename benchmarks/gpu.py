"""The first minutes on one CUDA device: is everything right, does the host wait, how fast is it?

    python -m benchmarks.gpu [--quick] [--only NAME] [--seconds 500] [--out DIR] [--device cpu]

Needs torch, and Triton for the kernels. Each section runs in a process of its own: one that crashes
or hangs takes nothing with it. Every record is a line of JSON on the terminal and in gpu-DATE.jsonl
as soon as it is there; tables follow, in gpu-DATE.md too. A section for which too little time is
left is said to be skipped. `--device cpu` runs all of it on tiny shapes, in Triton's interpreter.

Exits with 1 where something is wrong, raises or hangs, with 2 without a device. A goal that is
missed is no error.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from benchmarks import (
    gpu_checks,
    gpu_counts,
    gpu_kernels,
    gpu_ranks,
    gpu_report,
    gpu_times,
    gpu_training,
    tables,
)
from benchmarks.gpu_device import Record, Session, use_triton_on_cpu

NO_DEVICE = "torch sees no CUDA device on this machine, so nothing was measured"
SECONDS = 500.0  # under the ten minutes that a shared device may give
START_S = 5.0  # a process, torch, the device, kernels from Triton's cache
PRELOADED = ["benchmarks.gpu_times", "benchmarks.gpu_training", "benchmarks.gpu_ranks", "triton"]
SLOWEST = 4  # times the expected seconds: then a section is ended


@dataclass(frozen=True)
class Section:
    """`seconds` is what it takes on a GPU: somewhat more than it took on an H200."""

    run: Callable[[Session], None]
    seconds: float
    num_ranks: int = 1

    @property
    def name(self) -> str:
        return self.run.__name__


# What is most likely to be wrong comes first, then what is compared in public.
SECTIONS = [
    Section(gpu_checks.first_calls, 40),
    Section(gpu_kernels.sums, 10),
    Section(gpu_kernels.rewrites, 6),
    Section(gpu_counts.launches, 20),
    Section(gpu_counts.host_waits, 15),
    Section(gpu_checks.graphs, 5),
    Section(gpu_checks.streams, 5),
    Section(gpu_checks.deterministic, 5),
    Section(gpu_times.public, 25),
    Section(gpu_training.folding, 10),
    Section(gpu_training.scaler, 6),
    Section(gpu_ranks.nccl, 8),
    Section(gpu_ranks.two_ranks, 8, num_ranks=2),
    Section(gpu_times.bandwidth, 5),
    Section(gpu_times.models, 35),
    Section(gpu_training.overlap, 12),
    Section(gpu_training.units, 5),
    Section(gpu_times.compiled, 60),
]


@dataclass(frozen=True)
class Options:
    device: str
    tiny: bool


def work(section: Section, options: Options, rank: int, store: str, to: Connection) -> None:
    """One section in its process."""
    device = torch.device(options.device, 0 if options.device == "cuda" else None)
    session = Session(section.name, device, options.tiny, to.send, rank, section.num_ranks, store)
    try:
        if options.device == "cpu":
            torch.set_num_threads(1)
            use_triton_on_cpu()
        else:
            torch.cuda.set_device(device)
        section.run(session)
        session.synchronize()
    except BaseException:  # SystemExit as well: the section did not come to its end
        to.send({"section": section.name, "rank": rank, "error": traceback.format_exc()[-1500:]})
    finally:
        to.close()
        os._exit(0)  # process groups and CUDA need no orderly end, and can hang in one


def run_section(section: Section, options: Options, limit_s: float) -> Iterator[Record]:
    """Its records as they come, and one that says how it ended."""
    began, ranks = time.monotonic(), range(section.num_ranks)
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder = tempfile.mkdtemp(prefix="distclip-gpu-")
    pipes: dict[Connection, int] = {}
    processes = []
    for rank in ranks:
        ours, theirs = context.Pipe(duplex=False)
        given = (section, options, rank, f"{folder}/store", theirs)
        processes.append(context.Process(target=work, args=given))
        processes[-1].start()
        theirs.close()
        pipes[ours] = rank
    while pipes and (left := began + limit_s - time.monotonic()) > 0:
        for pipe in wait([*pipes], left):
            try:
                record = pipe.recv()
            except EOFError:
                del pipes[pipe]
                continue
            yield record
    for rank, process in zip(ranks, processes, strict=True):
        process.join(0 if pipes else 5)
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode and not pipes:
            yield {"section": section.name, "rank": rank, "error": f"exit code {process.exitcode}"}
    if pipes:
        ended = f"ended after {limit_s:.0f} s; {section.seconds:.0f} s were expected"
        yield {"section": section.name, "error": ended}
    shutil.rmtree(folder, ignore_errors=True)
    yield {"section": section.name, "took_s": time.monotonic() - began}


def run_all(sections: Sequence[Section], options: Options, seconds: float) -> Iterator[Record]:
    """The records of all, and which were left out for want of time."""
    began = time.monotonic()
    for section in sections:
        left = seconds - (time.monotonic() - began)
        if left < START_S + section.seconds:
            needs = f"needs about {section.seconds:.0f} s, and {max(left, 0):.0f} s are left"
            yield {"section": section.name, "skipped": needs}
            continue
        limit = left
        if options.device == "cuda":
            limit = min(left, START_S + SLOWEST * max(section.seconds, 15))
        yield from run_section(section, options, limit)


def facts(options: Options, began: float) -> dict[str, str]:
    """When, on which card, with which versions."""
    about = tables.run_facts(began)
    if options.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        parts = [f"{card.multi_processor_count} multiprocessors", f"sm_{card.major}{card.minor}"]
        parts.append(f"{card.total_memory / 2**30:.0f} GiB")
        about["card"] = ", ".join([card.name, *parts])
        about["driver"] = gpu_report.driver()
        about["versions"] += f", CUDA {torch.version.cuda}"
    else:
        about["card"] = "none: a dry run on the CPU, whose times mean nothing"
    with suppress(PackageNotFoundError):
        about["versions"] += f", Triton {version('triton')}"
    if options.tiny:
        about["work"] = "tiny shapes: a check, not a speed"
    return about


def main(argv: Sequence[str] | None = None) -> int:
    parser, began = tables.parser("gpu", __doc__), time.perf_counter()
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny shapes: a check, not a speed")
    add("--only", default="", metavar="NAME", help="sections whose names contain this")
    add("--seconds", type=float, default=SECONDS, help="for the whole run")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    add("--out", type=Path, metavar="DIR", help="for the results")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        print(f"benchmarks.gpu: {NO_DEVICE}", file=sys.stderr)
        return 2
    if not (chosen := [each for each in SECTIONS if given.only in each.name]):
        names = ", ".join(each.name for each in SECTIONS)
        sys.exit(f"--only {given.only!r}: no such section among {names}")
    # The sections are forked from a process that may not have touched CUDA, nor imported Triton.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if given.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    options = Options(given.device, given.quick or given.device == "cpu")
    part = options.tiny or given.only
    folder = given.out or (Path("runs/benchmarks") if part else tables.RESULTS)
    records: list[Record] = []
    about = facts(options, began)
    path = folder / f"gpu-{about['date']}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file, tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # what one section compiles is there for the next
        gpu_report.write({"section": "facts", **about}, file)
        for record in run_all(chosen, options, given.seconds):
            gpu_report.write(record, file)
            records.append(record)
    about["seconds"] = f"{time.perf_counter() - began:.1f}"
    gpu_report.publish(records, about, folder)
    print(path)
    return int(any(map(gpu_report.is_wrong, records)))


if __name__ == "__main__":
    sys.exit(main())
