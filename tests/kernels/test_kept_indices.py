"""Lists of indices on a device, uploaded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distclip.kernels import kept_indices
from distclip.kernels.kept_indices import KeptIndices


def test_each_list_is_uploaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[list[int]] = []

    def record(host: Tensor, device: torch.device) -> Tensor:
        uploaded.append(host.tolist())
        return host

    monkeypatch.setattr(kept_indices, "upload", record)
    kept = KeptIndices(torch.device("cpu"))
    for _ in range(3):
        for indices in ([3, 1], [1], [3, 1, 0], []):
            found = kept.on_device(indices)
            assert found.tolist() == indices
            assert found.dtype is torch.int64
    assert uploaded == [[3, 1], [1], [3, 1, 0], []]


def test_it_does_not_grow_without_end() -> None:
    kept = KeptIndices(torch.device("cpu"))
    for i in range(1000):
        assert kept.on_device([i, i + 1]).tolist() == [i, i + 1]
    assert len(kept._kept) <= 64


def test_a_graph_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph reads it at each replay, also when others have been forgotten."""
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(kept_indices, "upload", lambda host, _: host)
    kept = KeptIndices(torch.device("cuda"))
    first = kept.on_device([1, 2])
    assert kept.on_device([1, 2]) is not first
    capturing = False
    second = kept.on_device([1, 2])
    assert kept.on_device([1, 2]) is second
    capturing = True
    assert kept.on_device([1, 2]) is not second
