"""Numbers of an accelerator arrive some steps later, without a wait for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from distclip.norms.late_reads import Late, LateReads


class Accelerator:
    """A device module whose events say where they were recorded and whether they were awaited."""

    def __init__(self) -> None:
        self.current, self.capturing = 0, False
        self.events: list[Any] = []
        accelerator = self

        class Event:
            def __init__(self) -> None:
                self.recorded_on, self.awaited = None, False
                accelerator.events.append(self)

            def record(self) -> None:
                self.recorded_on = accelerator.current

            def synchronize(self) -> None:
                self.awaited = True

        self.Event = Event

    @contextlib.contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.current = self.current, index
        yield
        self.current = before

    def is_current_stream_capturing(self) -> bool:
        return self.capturing


class OnAccelerator:
    """Numbers on device 3, while device 0 is the current one."""

    device, is_cpu, is_meta = torch.device("cuda", 3), False, False

    def __init__(self, *numbers: float) -> None:
        self.numbers = numbers

    def to(self, device: str, non_blocking: bool) -> torch.Tensor:
        assert (device, non_blocking) == ("cpu", True)
        return torch.tensor(self.numbers)

    def reshape(self, size: int) -> OnAccelerator:
        assert len(self.numbers) == size
        return self


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    made = Accelerator()
    monkeypatch.setattr(torch, "get_device_module", lambda device: made)
    return made


def test_numbers_come_four_steps_late_with_what_was_said_of_them(accelerator: Accelerator) -> None:
    late = LateReads()
    found = [late.read_all(OnAccelerator(step, -step), f"step {step}") for step in range(7)]  # type: ignore[arg-type]
    assert found[:4] == [None] * 4
    assert found[4:] == [Late([step, -step], f"step {step}") for step in range(3)]
    assert [event.awaited for event in accelerator.events] == [True] * 3 + [False] * 4


def test_an_event_is_recorded_on_the_device_of_its_numbers(accelerator: Accelerator) -> None:
    LateReads().read(OnAccelerator(1))  # type: ignore[arg-type]
    assert accelerator.events[0].recorded_on == 3
    assert accelerator.current == 0


def test_nothing_is_read_inside_of_a_graph(accelerator: Accelerator) -> None:
    late, accelerator.capturing = LateReads(), True
    assert [late.read(OnAccelerator(step)) for step in range(9)] == [0] * 9  # type: ignore[arg-type]
    assert not accelerator.events


def test_a_cpu_has_its_numbers_at_once_and_meta_tensors_have_none() -> None:
    assert LateReads().read(torch.tensor(5)) == 5
    assert LateReads().read_all(torch.tensor([1.0, 2.0]), "now") == Late([1.0, 2.0], "now")
    assert LateReads().read_all(torch.zeros(2, device="meta")) is None
