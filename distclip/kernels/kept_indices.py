"""Indices on a device, which come again in every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distclip.kernels.upload import upload
from distclip.torch_private import has_values, is_capturing

_MOST = 64  # lists: where the gradients of a step are never the same ones twice


class KeptIndices:
    """Makes each index once, without a wait for the device; the latest ones are kept.

    For one user, whose streams wait for each other: nothing else makes a stream wait for the
    upload, which another has begun.
    """

    def __init__(self, device: torch.device, most: int = _MOST) -> None:
        self._device, self._most = device, most
        self._kept: dict[object, Tensor] = {}

    def on_device(self, indices: Sequence[int]) -> Tensor:
        """`indices`, int64."""
        key = tuple(indices)
        return self.get(
            key, lambda: self.upload(torch.tensor(key, dtype=torch.int64, device="cpu"))
        )

    def get(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """What `make` has returned for `key`."""
        if is_capturing(self._device):
            # It has no values before the graph runs, which goes on reading it at each replay.
            return make()
        if (index := self._kept.get(key)) is None:
            index = make()
            if has_values(index):
                while len(self._kept) >= self._most:
                    self._kept.pop(next(iter(self._kept)), None)
                self._kept[key] = index
        return index

    def upload(self, host: Tensor) -> Tensor:
        """`host` on the device."""
        return host.to("meta") if self._device.type == "meta" else upload(host, self._device)
