"""Symmetric memory of ranks on one machine without an accelerator: files that all of them map.

The functions are those of `torch.distributed._symmetric_memory` that distclip calls.
"""

from __future__ import annotations

import os
import tempfile
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Handle:
    def __init__(self, files: list[str], group: dist.ProcessGroup) -> None:
        self.files, self.group, self.barriers = files, group, 0

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return mapped(self.files[rank], sizes, dtype)

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        self.barriers += 1
        dist.barrier(self.group)
        if self.barriers == 1:  # all have mapped it
            os.unlink(self.files[dist.get_rank(self.group)])


class SharedFiles:
    """A backend.

    Args:
        lacking: ranks without it.
        failing: ranks whose `rendezvous` raises, once they have met the others.
    """

    def __init__(self, lacking: tuple[int, ...] = (), failing: tuple[int, ...] = ()) -> None:
        self.lacking, self.failing = lacking, failing
        self.handles: list[Handle] = []
        self._files: dict[int, str] = {}

    def get_backend(self, device: Any) -> str | None:
        return None if dist.get_rank() in self.lacking else "FILES"

    def empty(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        handle, name = tempfile.mkstemp(prefix="distclip-symmetric-")
        os.close(handle)
        made = mapped(name, size, dtype)
        self._files[made.data_ptr()] = name
        return made.fill_(torch.nan)

    def rendezvous(self, tensor: Tensor, group: dist.ProcessGroup) -> Handle:
        names: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(names, self._files[tensor.data_ptr()], group=group)
        if dist.get_rank() in self.failing:
            raise RuntimeError("no peer-to-peer access")
        self.handles.append(Handle(names, group))
        return self.handles[-1]


def mapped(name: str, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.from_file(name, shared=True, size=prod(sizes), dtype=dtype).view(sizes)
