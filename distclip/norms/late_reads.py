"""Numbers of an accelerator, read on the host some steps later: nothing waits for the device."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from distclip.torch_private import has_values

_LAG = 4  # steps


class LateReads:
    """Copies a number to the host in each step, and returns that of `_LAG` steps before.

    All ranks read the same step's number in the same step, and can act on it together.
    """

    def __init__(self) -> None:
        self._in_flight: deque[tuple[Any, Tensor]] = deque()  # event, copy

    def read(self, number: Tensor) -> int:
        """That of some steps before; of this step on a CPU; 0 where none has arrived.

        A step inside a CUDA graph is not read: it could neither copy nor raise.
        """
        if not has_values(number):
            return 0
        if number.device.type == "cpu":
            return int(number)
        device_module: Any = torch.get_device_module(number.device.type)
        is_capturing = getattr(device_module, "is_current_stream_capturing", None)
        if is_capturing is not None and is_capturing():
            return 0
        event = device_module.Event() if hasattr(device_module, "Event") else None
        self._in_flight.append((event, number.to("cpu", non_blocking=event is not None)))
        if event is not None:
            event.record()
        if len(self._in_flight) <= _LAG:
            return 0
        event, earlier = self._in_flight.popleft()
        if event is not None:
            event.synchronize()
        return int(earlier)
