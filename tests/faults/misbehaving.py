"""Ranks that misbehave while the others clip: what the others find, after how long, what is left.

Every case takes new processes, because some of them end in it. The ranks set up with a long timeout
and get a short one just before the fault: a busy machine may take seconds to set up.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import distclip
from distclip import ClipNorm, Clipper, ClipTensorNorm, Layout
from tests.support.layouts import LAYOUTS, lay_out, random_wholes
from tests.support.ranks import Ranks, mesh
from tests.support.wrapped import local, with_gradients

TIMEOUT_S = 5.0  # of the process groups, from the fault on
LATE_S = 1.0  # how long a rank lets the others wait, in which one of them is killed
ODD = 2
LIMIT = 0.5


@dataclass(frozen=True)
class Case:
    """What happens, in which way of clipping, on which layout."""

    fault: str
    way: str = "clip_"
    layout: str = "list"

    def __str__(self) -> str:
        return f"{self.fault}, {self.way}, {self.layout}"


class Found(NamedTuple):
    """What a rank has to say.

    Attributes:
        error: the name of the error's class; empty without an error.
        cause: that of the error that it is chained from.
        seconds: from the fault until the call ended.
        untouched: gradients and weights have the bits that they had when the fault happened.
        whole: each gradient is as it was, or one factor explains all of its elements; each weight
            is as it was, or made the step that its gradient asks for.
        stepped: which weights were stepped.
    """

    error: str
    text: str
    cause: str
    seconds: float
    untouched: bool
    whole: bool
    stepped: tuple[bool, ...]


class MortalRanks(Ranks):
    """Ranks of which some end, with a store in a file, or one that rank 0 keeps."""

    grace_s = 60.0

    def __init__(self, size: int = 4, has_host: bool = False) -> None:
        super().__init__(size)
        self._has_host = has_host

    def _new_store(self) -> str:
        if not self._has_host:
            return super()._new_store()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            return f"localhost:{free.getsockname()[1]}"


def played(case: Case) -> dict[int, Found | str]:
    """What each rank found; a text of a rank that ended, or failed where it should not."""
    ranks = MortalRanks(5 if case.layout == "part" else 4, "keeps the store" in case.fault)
    try:
        return {rank: found for rank, (_, found) in ranks.answers(play, case).items()}
    finally:
        ranks.stop()


@dataclass
class Run:
    """One rank's parameters, and how they are clipped.

    Attributes:
        call: clips, and steps where the way does; its argument is the number of the step.
    """

    params: list[nn.Parameter]
    call: Callable[[int], Any]
    clipper: Clipper | None
    first: list[Tensor]
    before: list[Tensor] = field(default_factory=list)
    began: float = 0.0

    def mark(self) -> None:
        """From now on nothing may be written; the gradients are large again."""
        with torch.no_grad():
            for param, grad in zip(self.params, self.first, strict=True):
                if param.grad is not None:
                    local(param.grad).copy_(grad)
        self.before = self.now()
        self.began = time.monotonic()

    def now(self) -> list[Tensor]:
        """Weights, and then gradients; zeros for those that a hook has freed."""
        weights = [local(param).detach().clone() for param in self.params]
        zeros = [torch.zeros_like(grad) for grad in self.first]
        each = zip(self.params, zeros, strict=True)
        return weights + [z if p.grad is None else local(p.grad).clone() for p, z in each]


def play(case: Case) -> Found | None:
    """What one rank found."""
    source, params, options = _made(case.layout)
    if dist.get_rank() >= 4:
        return None
    first = [local(param.grad).clone() for param in params]
    run = Run(params, *_way_of(case.way, source, params, options), first)
    run.call(0)
    clipped = [local(p.grad) for p in params if p.grad is not None]
    same = [torch.equal(a, b) for a, b in zip(clipped, first, strict=False) if a.numel()]
    assert not any(same), "nothing was clipped"
    dist.barrier(mesh((4,), ("ranks",)).get_group() if case.layout != "part" else options["all"])
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_S), group)
    run.mark()
    error: Exception | None = None
    try:
        FAULTS[case.fault](run, dist.get_rank())
    except Exception as raised:
        error = raised
    return _found(case, run, error, time.monotonic() - run.began)
