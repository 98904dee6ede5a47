"""Small tables from the host to a device, without a wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

# A CUDA graph reads its tables, and uploads them from the host, at each replay. Nothing signals the
# end of a graph.
_captured: list[Tensor] = []


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy of `host` on `device`; `host` itself for a CPU."""
    if device.type == "cpu":
        return host
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Not pinned: the allocator of pinned memory queries events, which capture forbids.
        uploaded = host.to(device, non_blocking=True)
        _captured.extend([host, uploaded])
        return uploaded
    return host.pin_memory().to(device, non_blocking=True)
