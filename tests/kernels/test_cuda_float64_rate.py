"""How much faster float32 is than float64, as the driver of a card says it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from distclip.kernels import cuda_float64_rate
from distclip.kernels.cuda_float64_rate import has_weak_float64


class Driver:
    """A libcuda of cards with these ratios. `fails` is the name of a function that does."""

    def __init__(self, ratios: dict[int, int], fails: str = "") -> None:
        self._ratios, self._fails = ratios, fails
        self.calls: list[str] = []

    def _result(self, name: str) -> int:
        self.calls.append(name)
        return 999 if name == self._fails else 0

    def cuInit(self, flags: int) -> int:
        return self._result("cuInit")

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = 1000 + index
        return self._result("cuDeviceGet")

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:
        assert attribute == 87
        value._obj.value = self._ratios[device.value - 1000]
        return self._result("cuDeviceGetAttribute")


@pytest.fixture(autouse=True)
def _read_anew() -> Iterator[None]:
    has_weak_float64.cache_clear()
    yield
    has_weak_float64.cache_clear()


def use(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> Driver:
    def load(name: str) -> Driver:
        assert name == "libcuda.so.1"
        return driver

    monkeypatch.setattr(cuda_float64_rate.ctypes, "CDLL", load)
    return driver


def test_by_the_ratio_of_each_card(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = use(monkeypatch, Driver({0: 2, 1: 64, 2: 32, 3: 8}))
    assert [has_weak_float64(index) for index in range(4)] == [False, True, True, False]
    calls = len(driver.calls)
    assert has_weak_float64(1)
    assert len(driver.calls) == calls  # it does not change


@pytest.mark.parametrize("fails", ["cuInit", "cuDeviceGet", "cuDeviceGetAttribute"])
def test_strong_where_the_driver_does_not_tell(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = use(monkeypatch, Driver({0: 64}, fails))
    assert not has_weak_float64(0)
    assert driver.calls[-1] == fails


def test_strong_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(cuda_float64_rate.ctypes, "CDLL", load)
    assert not has_weak_float64(0)


def test_strong_on_rocm_and_off_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = use(monkeypatch, Driver({0: 64}))
    assert not has_weak_float64(-1)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not has_weak_float64(0)
    assert not driver.calls
