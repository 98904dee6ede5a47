"""CUDA graphs: what a step may not do while its launches are recorded."""

from __future__ import annotations

from typing import Any

import torch


def is_capturing(device: torch.device) -> bool:
    """Whether a graph of the current stream is being captured: nothing runs, or can be read."""
    if device.type in ("cpu", "meta"):
        return False
    device_module: Any = torch.get_device_module(device.type)
    return hasattr(device_module, "is_current_stream_capturing") and bool(
        device_module.is_current_stream_capturing()
    )
