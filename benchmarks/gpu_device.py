"""What each section of `benchmarks.gpu` has: the device, clocks and counters, a place for results.

Device time is that of the device alone: all calls are queued behind a sleep of the device, and each
lies between two events. Host time is what the host needs to queue them, and waits for nothing.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import distclip.kernels

Run = Callable[[], Any]
Record = dict[str, Any]
CYCLES = 2e9  # of the device in a second, about; it sleeps in cycles
WAIT = "synchronizing CUDA operation"


class Time(NamedTuple):
    """Microseconds of one call, medians. `queued`: no call began before all were queued."""

    device_us: float
    host_us: float
    queued: bool

    def facts(self, num_bytes: int = 0) -> Record:
        """For a record; with the bytes that must be moved, the bandwidth."""
        facts: Record = {"device_us": self.device_us, "host_us": self.host_us}
        if num_bytes:
            facts["gb_s"] = num_bytes / self.device_us / 1e3
        if not self.queued:
            facts["note"] = "the host waits, so the device time holds host time"
        return facts


class Launches(NamedTuple):
    """What one call starts on the device."""

    triton: int
    torch: int
    copies: int  # and fills


@dataclass
class Session:
    """One section on one device, in a process of its own; `num_ranks` of them share a section.

    Attributes:
        tiny: small shapes and few cases, to see that it works.
        store: the path of the ranks' `FileStore`.
        send: takes the records.
    """

    section: str
    device: torch.device
    tiny: bool
    send: Callable[[Record], None]
    rank: int = 0
    num_ranks: int = 1
    store: str = ""

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def say(self, **facts: Any) -> None:
        """One record, of rank 0."""
        if self.rank == 0:
            self.send({"section": self.section, **facts})

    def check(self, what: str, right: bool, **facts: Any) -> None:
        """One that is not right makes the exit code 1, and is said by whichever rank finds it."""
        if self.rank == 0 or not right:
            rank = {"rank": self.rank} if self.num_ranks > 1 else {}
            record = {"section": self.section, **rank, "check": what, "right": bool(right)}
            self.send(record | facts)

    def goal(self, what: str, found: float, at_most: float) -> None:
        """A device's number against a goal; in a dry run there is none."""
        if self.is_cuda and not self.tiny:
            self.say(goal=what, found=found, at_most=at_most, reached=found <= at_most)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def number(self, value: float) -> torch.Tensor:
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def pick(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full

    def time(self, run: Run, prepare: Run = lambda: None, times: int = 10) -> Time:
        """`prepare` runs before each call and is not timed."""
        times = self.pick(times, 1)
        for _ in range(self.pick(2, 1)):
            prepare()
            run()
        self.synchronize()
        if not self.is_cuda:
            prepare()
            seconds = _seconds(run)
            return Time(1e6 * seconds, 1e6 * seconds, True)
        seconds = 0.005 + 2 * times * (_seconds(prepare) + _seconds(run))
        while True:
            self.synchronize()
            found = self._queued(run, prepare, times, seconds)
            if found.queued or times == 1:
                return found
            # The sleep was too short, or the device's queue of about a thousand launches was full,
            # or the call reads numbers of four calls before.
            seconds, times = 3 * seconds, times // 2

    def _queued(self, run: Run, prepare: Run, times: int, seconds: float) -> Time:
        def event() -> torch.cuda.Event:
            return torch.cuda.Event(enable_timing=True)

        events = [(event(), event()) for _ in range(times)]
        host: list[float] = []
        torch.cuda._sleep(int(CYCLES * min(seconds, 2.0)))
        for begin, end in events:
            prepare()
            begin.record()
            host.append(_seconds(run))
            end.record()
        queued = not events[0][0].query()
        torch.cuda.synchronize()
        device = [1e3 * begin.elapsed_time(end) for begin, end in events]
        return Time(median(device), 1e6 * median(host), queued)

    def host_waits(self, run: Run) -> int | None:
        """How often the host waits for the device in one call; None where nothing can tell."""
        if not self.is_cuda:
            run()
            return None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum(WAIT in str(each.message) for each in caught)

    def launches(self, run: Run) -> Launches | None:
        """None on a CPU."""
        if not self.is_cuda:
            run()
            return None
        self.synchronize()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Profiler clears events")
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
                run()
                self.synchronize()
        events = profiled.events() or []
        return count_launches([e.name for e in events if "CUDA" in str(e.device_type)])


def count_launches(names: list[str]) -> Launches:
    """By the names that a profile gives to what ran on the device."""
    ours = tuple(triton_kernels())
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    triton = sum(name.startswith(ours) for name in names)
    return Launches(triton, len(names) - triton - copies, copies)


def triton_kernels() -> set[str]:
    """The names of distclip's Triton functions, in the modules that are loaded."""
    modules = [m for name, m in sys.modules.items() if name.startswith("distclip.kernels.")]
    members = (member for module in modules for member in vars(module).values())
    compiled = [m for m in members if type(m).__module__.startswith("triton.runtime")]
    return {member.__name__ for member in compiled if hasattr(member, "__name__")}


def use_triton_on_cpu() -> None:
    """For a dry run: distclip's Triton kernels for CPU tensors too, in Triton's interpreter."""
    from distclip.kernels import cuda

    warnings.simplefilter("ignore", RuntimeWarning)  # numpy computes, and warns as no device does
    distclip.kernels.backend = lambda device: cuda


def _seconds(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
