"""Lists of indices on a device, which come again in every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distclip.kernels.upload import upload
from distclip.torch_private import is_capturing

_MOST = 64  # lists: where the gradients of a step are never the same ones twice


class KeptIndices:
    """Uploads each list once, without a wait for the device.

    For one user, whose streams wait for each other: nothing else makes a stream wait for the
    upload, which another has begun.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def on_device(self, indices: Sequence[int]) -> Tensor:
        """`indices`, int64."""
        key = tuple(indices)
        if (found := self._kept.get(key)) is not None:
            return found
        if self._device.type == "meta":
            return torch.empty(len(key), dtype=torch.int64, device="meta")
        uploaded = upload(torch.tensor(key, dtype=torch.int64, device="cpu"), self._device)
        if is_capturing(self._device):
            return uploaded  # has values only while the graph is replayed
        if len(self._kept) >= _MOST:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = uploaded
        return uploaded
