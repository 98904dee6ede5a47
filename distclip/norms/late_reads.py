"""Numbers of an accelerator, read on the host some steps later: nothing waits for the device."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from distclip.sharding.rank_group import as_current
from distclip.torch_private import has_values, is_capturing

_LAG = 4  # steps


class Late(NamedTuple):
    """Numbers of an earlier step, and what was said of them then."""

    numbers: list[float]
    about: Any


class _Copy(NamedTuple):
    event: Any
    numbers: Tensor
    about: Any


class LateReads:
    """Copies numbers to the host in each step, and returns those of `_LAG` steps before.

    All ranks read the same step's numbers in the same step, and can act on them together.
    """

    def __init__(self) -> None:
        self._in_flight: deque[_Copy] = deque()

    def read(self, number: Tensor) -> int:
        """One number, as `read_all`; 0 where none has arrived."""
        late = self.read_all(number.reshape(1))
        return 0 if late is None else int(late.numbers[0])

    def read_all(self, numbers: Tensor, about: Any = None) -> Late | None:
        """Those of some steps before; of this step on a CPU; None where none have arrived.

        A step inside a CUDA graph is not read: it could neither copy nor raise.

        Shapes: numbers: [n].
        """
        if not has_values(numbers) or is_capturing(numbers.device):
            return None
        if numbers.is_cpu:
            return Late(_listed(numbers), about)
        copy = numbers.to("cpu", non_blocking=has_events(numbers.device))
        event = recorded_event(numbers.device)
        self._in_flight.append(_Copy(event, copy, about))
        if len(self._in_flight) <= _LAG:
            return None
        earlier = self._in_flight.popleft()
        if earlier.event is not None:
            earlier.event.synchronize()
        return Late(_listed(earlier.numbers), earlier.about)


def has_events(device: torch.device) -> bool:
    """Whether the host can find out that a copy from there has arrived."""
    return device.type != "cpu" and hasattr(torch.get_device_module(device.type), "Event")


def recorded_event(device: torch.device) -> Any:
    """An event after all that the current stream of an accelerator has to do; else None."""
    if not has_events(device):
        return None
    event = torch.get_device_module(device.type).Event()
    with as_current(device):  # an event is recorded on the current device
        event.record()
    return event


def _listed(numbers: Tensor) -> list[float]:
    return cast("list[float]", numbers.tolist())
