"""Small tables from the host to a device, without a wait for the device."""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

_ALIGNED = 64  # bytes: a cache line


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy of `host` on `device`; `host` itself for a CPU.

    A CUDA graph under capture uploads it at each replay, from memory that is kept until the process
    ends. The device is the current one.

    Raises:
        RuntimeError: too little memory was reserved for the capture.
    """
    if device.type == "cpu":
        return host
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _arena.keep(host).to(device, non_blocking=True)
        reserve(host.nbytes)
    return host.pin_memory().to(device, non_blocking=True)


def reserve(nbytes: int) -> None:
    """Called outside of captures: makes sure that later ones can upload as many bytes, twice over.

    A capture can neither pin memory nor read memory that is not pinned.
    """
    _arena.reserve(nbytes)


class _Arena:
    """Pinned memory of which no byte is written twice, because graphs read it at each replay."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._used = 0
        self._wanted = 1 << 20  # free bytes, outside of captures
        self._full: list[Tensor] = []  # what graphs go on reading

    def reserve(self, nbytes: int) -> None:
        with self._lock:
            # Two tables of each size, with its alignment, for two captures.
            self._wanted = max(self._wanted, 4 * (nbytes + _ALIGNED))
            if self._memory.numel() - self._used < self._wanted:
                if self._used:
                    self._full.append(self._memory)
                self._memory, self._used = _pinned(2 * self._wanted), 0

    def keep(self, host: Tensor) -> Tensor:
        """A copy of `host` that stays as it is."""
        with self._lock:
            begin, end = self._used, self._used + host.nbytes
            if end > self._memory.numel():
                # Where many graphs are captured in turn: enough for twice as many.
                self._wanted = max(self._wanted, 2 * (self._memory.numel() + host.nbytes))
                raise RuntimeError(
                    f"cannot upload {host.nbytes} bytes of addresses during the capture of a CUDA "
                    f"graph: {self._memory.numel() - begin} bytes of pinned memory are left for "
                    "captures, and none can be allocated during one. Run one step with these "
                    "gradients without a capture, then capture the graph."
                )
            self._used = -(-end // _ALIGNED) * _ALIGNED
            copy = self._memory[begin:end].view(host.dtype).view(host.shape)
            return copy.copy_(host)


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


_arena = _Arena()
