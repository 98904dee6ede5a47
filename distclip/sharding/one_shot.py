"""A message of every rank in one step, where all see each other's memory (one NVLink machine).

Each rank writes its message into its own buffer, waits in a barrier, and reads the buffers of all.
An all-reduce takes more steps, which for a few numbers is all the time that it takes.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distclip import torch_private
from distclip.errors import LayoutError
from distclip.sharding.arrivals import missing_ranks
from distclip.sharding.rank_group import RankGroup, as_current

_OF_GRAPHS = 2  # the buffer behind those in turn


class OneShot:
    """All-gathers through symmetric memory.

    Two buffers in turn need one barrier a call. A rank writes into a buffer again two calls later,
    behind the barrier of the call between; and a rank enters that barrier, on its stream, when it
    has read what the call before had sent. Replays of a CUDA graph have no turns: they share a
    third buffer, and begin with a barrier of their own.

    Args:
        of_each: the memory of every rank, in the order of the process group. Shapes: [3, size].
        mine: that of this rank.
        handle: torch's, with the barriers.
    """

    def __init__(self, mine: Tensor, of_each: Sequence[Tensor], handle: Any) -> None:
        self._mine, self._of_each, self._handle = mine, of_each, handle
        self._calls = 0
        self._stream: Any = None  # of the last call

    @property
    def size(self) -> int:
        """How many numbers a message may have."""
        return self._mine.shape[1]

    def all_gather(self, parts: Sequence[Tensor]) -> Tensor:
        """The messages of all ranks, in the same order on each.

        Args:
            parts: what this rank's message consists of.

        Shapes: parts: n numbers together, at most `size`; the result: [ranks, n].

        Collective: all ranks of the process group.
        """
        if torch_private.is_capturing(self._mine.device):
            turn = _OF_GRAPHS
            self._handle.barrier(channel=turn)  # others may be reading what a replay has sent
        else:
            self._wait_for_last_call()
            turn = self._calls % _OF_GRAPHS
            self._calls += 1
        length = sum(map(len, parts))
        torch.cat([*parts], out=self._mine[turn, :length])
        self._handle.barrier(channel=turn)
        return torch.stack([each[turn, :length] for each in self._of_each])

    def _wait_for_last_call(self) -> None:
        """Two turns are enough for calls one after the other, which may be on other streams."""
        if self._mine.is_cpu:
            return
        device_module: Any = torch.get_device_module(self._mine.device.type)
        stream = device_module.current_stream(self._mine.device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream


class SymmetricMemory:
    """Opens what the plans of one Clipper use: buffers are kept as long as they are large enough.

    Ranks whose models change apart from each other must not wait here, each for the others.
    """

    def __init__(self) -> None:
        self._for: object = None
        self._opened: OneShot | str = ""

    def open(self, ranks: RankGroup, size: int) -> OneShot | str:
        """For messages of up to `size` numbers; the reason where some rank cannot.

        Raises:
            LayoutError: some rank does not call.

        Collective: all ranks, if these are others or `size` is larger than before.
        """
        fits = isinstance(self._opened, str) or size <= self._opened.size
        if self._for != ranks.identity or not fits:
            self._opened, self._for = _open(ranks, size), ranks.identity
        return self._opened


def _open(ranks: RankGroup, size: int) -> OneShot | str:
    if len(ranks.lines) != 1 or ranks.is_fake:
        return "no process group has exactly these ranks"
    if missing := missing_ranks(ranks, "symmetric memory"):
        raise LayoutError(
            f"cannot make a Clipper with symmetric_memory=True: the ranks {missing} have not asked "
            f"for it within the timeout of the process group, and would send their sums in another "
            f"way. Pass it on all ranks."
        )
    (line,) = ranks.lines
    shape = _OF_GRAPHS + 1, size
    made: list[Any] = []

    def allocate() -> None:
        memory = torch_private.symmetric_memory()
        if memory.get_backend(ranks.device) is None:
            raise RuntimeError(f"torch has no symmetric memory for {ranks.device}")
        made.append(memory.empty(shape, dtype=torch.float64, device=ranks.device))

    def meet() -> None:
        (mine,) = made
        handle = torch_private.symmetric_memory().rendezvous(mine, line.group)
        of_each = [handle.get_buffer(i, shape, mine.dtype) for i in range(len(line.ranks))]
        made[:] = [mine, of_each, handle]

    # The second waits for all ranks, and must not begin where one has failed.
    for attempt in (allocate, meet):
        if reason := _why_not(ranks, attempt):
            return reason
    return OneShot(*made)


def _why_not(ranks: RankGroup, attempt: Callable[[], None]) -> str:
    """Why some rank cannot, the same text on all; "" where all can."""
    mine = ""
    try:
        with as_current(ranks.device):
            attempt()
    except (RuntimeError, ImportError, AttributeError) as error:
        mine = str(error).partition("\n")[0][:200] or type(error).__name__
    found = ranks.all_gather_objects((mine, _machine()), doing="opening symmetric memory")
    if reasons := [f"rank {rank}: {reason}" for rank, (reason, _) in found.items() if reason]:
        return reasons[0]
    machines = {machine for _, machine in found.values()}
    return "" if len(machines) == 1 else f"the ranks are on {len(machines)} machines"


def _machine() -> str:
    """Machines may have one name, and containers on one machine several."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot.read_text() if boot.exists() else ''}"
