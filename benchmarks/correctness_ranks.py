"""Puts every case to every library, in this process or on the ranks of one process group."""

import multiprocessing as mp
import os
import queue
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module

import torch
import torch.distributed as dist

from benchmarks.correctness_cases import CASES, NUM_RANKS, Answer, Case, ask, right_answer

START_LIMIT = 120.0  # seconds for every rank to import and join, on a machine busy with other tests
ANSWER_LIMIT = 10.0  # seconds of silence from all ranks that count as a hang; an answer takes milliseconds


@dataclass
class Job:
    """One library, one case, and what came back; a rank that hangs is missing from `answers`."""

    library: str
    case: Case
    right: Answer | None = None
    answers: dict[int, Answer] = field(default_factory=dict)
    died: bool = False  # a rank ended by itself, so silence proves nothing

    @property
    def begun(self) -> bool:
        return self.right is not None

    @property
    def complete(self) -> bool:
        return len(self.answers) == self.case.ranks

    @property
    def hangs(self) -> bool:
        return self.begun and not self.complete and not self.died


def ask_all(libraries: list[str]) -> list[Job]:
    jobs = [Job(library, case) for library in libraries for case in CASES]
    alone = [job for job in jobs if job.case.ranks == 1]
    several = [job for job in jobs if job.case.ranks > 1]
    # What may hang comes last, and torch's last of all: a rank that hangs answers nothing more.
    several.sort(key=lambda job: (job.case.may_hang, job.case.may_hang and job.library == "torch"))
    ask_ranks(several)
    ask_here(alone)
    return jobs


def ask_here(jobs: list[Job]) -> None:
    """The cases of one process, without any process group."""
    for job in jobs:
        setup = job.case.build()
        job.right = right_answer(job.case, setup)
        job.answers[0] = ask(job.library, job.case, setup)


def ask_ranks(jobs: list[Job]) -> None:
    """One group of ranks for all cases; every rank is ended before this returns."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the ranks while they start
    context = mp.get_context("forkserver")
    # torch is imported once and not by every rank: 6 seconds of CPU time for the whole run instead of 27.
    context.set_forkserver_preload([ask.__module__])
    questions, outbox = [(job.library, job.case) for job in jobs], context.Queue()
    started = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(NUM_RANKS):
                arguments = (rank, f"{folder}/store", questions, outbox)
                started.append(context.Process(target=rank_main, args=arguments, daemon=True))
                started[-1].start()
            collect(jobs, outbox)
            died = any(process.exitcode is not None for process in started)
        finally:
            end(started)
    for job in jobs:
        job.died = died


def collect(jobs: list[Job], outbox: mp.Queue) -> None:
    limit = START_LIMIT
    while not all(job.complete for job in jobs):
        try:
            index, rank, right, answer = outbox.get(timeout=limit)
        except queue.Empty:
            return
        limit = ANSWER_LIMIT
        if answer is None:
            jobs[index].right = right
        else:
            jobs[index].answers[rank] = answer


def end(processes: list[mp.Process]) -> None:
    # A rank inside a collective that never ends does not react to anything gentler.
    for process in processes:
        if process.pid is not None:
            process.kill()
    for process in processes:
        if process.pid is not None:
            process.join(START_LIMIT)


def rank_main(rank: int, store: str, questions: list[tuple[str, Case]], outbox: mp.Queue) -> None:
    """One rank: answers every question in order, then waits to be ended."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # Should the parent be killed and unable to end it, a rank that hangs gives up after this timeout.
    limit = timedelta(seconds=START_LIMIT)
    address = f"file://{store}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=NUM_RANKS, timeout=limit)
    preload({library for library, _ in questions})
    for index, (library, case) in enumerate(questions):
        setup = case.build()
        # Every rank reaches the question, or none asks it: a job with a right answer has really begun.
        dist.barrier()
        outbox.put((index, rank, right_answer(case, setup), None))
        outbox.put((index, rank, None, ask(library, case, setup)))
    # Leaving now would close sockets that a hanging rank waits on, and turn its hang into an error.
    time.sleep(START_LIMIT)


def preload(libraries: set[str]) -> None:
    """Imports are slow and must not count as silence; a library that fails here shows it in its column."""
    for library in sorted(libraries):
        try:
            import_module(library)
        except Exception as error:
            print(f"cannot import {library}: {error}", file=sys.stderr)
