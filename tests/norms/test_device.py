"""Where a plan combines its sums: the parameters' own device, which must have float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import distclip
from distclip.norms import device
from distclip.norms.device import reduce_device


@pytest.fixture(autouse=True)
def probe_anew() -> None:
    device._check_float64.cache_clear()


def held(where: str) -> Any:
    return SimpleNamespace(param=SimpleNamespace(device=torch.device(where), is_meta=False))


def accelerator(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[str]:
    """Makes a device "cuda" whose float64 tensors raise `error`; returns the probes."""
    probes: list[str] = []
    zeros = torch.zeros

    def make(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
        assert dtype is torch.float64
        probes.append(device)
        if error is not None:
            raise error
        return zeros(*shape)

    monkeypatch.setattr(torch, "zeros", make)
    module = SimpleNamespace(is_available=lambda: True, current_device=lambda: 0)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return probes


@pytest.mark.parametrize("error", [TypeError("no float64 here"), RuntimeError("no float64 here")])
def test_a_device_without_float64_is_refused(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    accelerator(monkeypatch, error)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"type 'cuda'.*no float64 here.*train on a device"):
            reduce_device([held("cpu"), held("cuda:1")], None)


def test_memory_that_is_full_says_nothing_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator(monkeypatch, torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError):
        reduce_device([held("cuda:1")], None)


def test_a_device_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = accelerator(monkeypatch, None)
    for index in (1, 1, 2):
        on = reduce_device([held("cpu"), held(f"cuda:{index}")], None)
        assert on == torch.device("cuda", index)
    assert probes == ["cuda"]


def test_cpus_and_simulations_are_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "zeros", None)
    assert reduce_device([held("cpu")], None) == torch.device("cpu")
    assert reduce_device([held("cuda")], None) == torch.device("cuda")
    assert distclip.Clipper([nn.Parameter(torch.ones(1))]).plan.device == torch.device("cpu")
