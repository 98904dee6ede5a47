"""The ranks of `sharded.py`: a transformer after a real backward, so that its gradients lie in memory as FSDP2 puts
them."""

from __future__ import annotations

import logging
import multiprocessing as mp
import os
import queue
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from benchmarks.correctness_ranks import end
from benchmarks.rivals import ON_RANKS
from benchmarks.timing import STATES, Gradients, Row, Together, float64_norm, measure

LIMIT_S = 600.0  # for all cases of one number of ranks
TOKENS = 8  # of a sequence; tensor parallelism shares them out between the ranks of its axis


@dataclass(frozen=True)
class Size:
    num_blocks: int
    width: int

    @property
    def numel(self) -> int:
        return self.num_blocks * sum(p.numel() for p in Block(self.width).parameters())


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]  # of the mesh
    axes: tuple[str, ...]


class Block(nn.Module):
    """A transformer's tensors; what stands for attention has no softmax, since only the gradients matter here."""

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
    """Every parameter becomes a DTensor, without which torch could not clip them together."""
    columns, rows = ColwiseParallel(input_layouts=Shard(1)), RowwiseParallel(output_layouts=Shard(1))
    plan = {"norm1": SequenceParallel(), "norm2": SequenceParallel(), "out": rows, "down": rows}
    parallelize_module(block, tp, plan | dict.fromkeys(("q", "k", "v", "up"), columns))


def gradients(case: Case, size: Size) -> Gradients:
    """Those of one real backward. Collective."""
    mesh = init_device_mesh("cpu", case.shape, mesh_dim_names=case.axes)
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(size.width) for _ in range(size.num_blocks)))
    for block in model:
        if "tp" in case.axes:
            tensor_parallel(block, mesh["tp"])
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    torch.manual_seed(mesh["dp"].get_local_rank())
    x = torch.randn(2, TOKENS, size.width)
    if "tp" in case.axes:
        x = x.chunk(mesh["tp"].size(), 1)[mesh["tp"].get_local_rank()]
    # Large, so that torch's 1e-6 beside the norm is nothing.
    (1e4 * model(x).square().mean()).backward()
    grads = [p.grad for p in model.parameters() if isinstance(p.grad, DTensor)]
    assert len(grads) == 12 * size.num_blocks
    whole = float64_norm([g.full_tensor() for g in grads])
    return Gradients(list(model.parameters()), [g.to_local() for g in grads], whole)


def gather(mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def rank_main(rank: int, num_ranks: int, store: str, cases: Sequence[Case], size: Size, rounds: int, out: Any) -> None:
    """Puts the rows of all cases, or a traceback, into `out`, and waits to be ended."""
    warnings.simplefilter("ignore")
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # advice on meshes
    torch.set_num_threads(1)
    limit, together = timedelta(seconds=LIMIT_S), Together(gather, dist.barrier)
    try:
        address = f"file://{store}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=num_ranks, timeout=limit)
        rows: list[Row] = []
        for case in cases:
            work = gradients(case, size)
            for state, factor in STATES.items():
                rows += measure(case.name, state, factor, work, ON_RANKS, rounds, together)
        out.put((rank, rows, ""))
        dist.barrier()
    except Exception:
        out.put((rank, [], traceback.format_exc()))


def measure_all(cases: Sequence[Case], size: Size, rounds: int) -> list[Row]:
    """The rows of all cases: one process group for each number of ranks."""
    rows = []
    for num_ranks in sorted({torch.Size(case.shape).numel() for case in cases}):
        here = [case for case in cases if torch.Size(case.shape).numel() == num_ranks]
        rows += measure_on(num_ranks, here, size, rounds)
    return rows


def measure_on(num_ranks: int, cases: Sequence[Case], size: Size, rounds: int) -> list[Row]:
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the ranks while they start
    context = mp.get_context("forkserver")
    # Imported once, and not by every rank.
    context.set_forkserver_preload([__name__, "torchtitan.distributed.utils"])
    answers = context.Queue()
    started = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(num_ranks):
                given = (rank, num_ranks, f"{folder}/store", cases, size, rounds, answers)
                started.append(context.Process(target=rank_main, args=given, daemon=True))
                started[-1].start()
            return first_rows(started, answers)
        finally:
            end(started)


def first_rows(started: Sequence[mp.Process], answers: Any) -> list[Row]:
    """Those of whichever rank is done first: all ranks have the same."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        died = [rank for rank, process in enumerate(started) if process.exitcode is not None]
        try:
            rank, rows, failure = answers.get(timeout=0.5)
        except queue.Empty:
            if died:
                raise RuntimeError(f"ranks {died} of {len(started)} ended without an answer") from None
            continue
        if failure:
            raise RuntimeError(f"rank {rank} of {len(started)} failed:\n{failure}")
        return rows
    raise RuntimeError(f"none of {len(started)} ranks answered within {LIMIT_S:g} s")
