"""Uploads during the capture of a CUDA graph, which can neither pin memory nor do without."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from distclip.kernels import upload


@pytest.fixture
def arena(monkeypatch: pytest.MonkeyPatch) -> upload._Arena:
    """Of memory that need not be pinned here."""
    unpinned = partial(torch.zeros, dtype=torch.uint8)
    monkeypatch.setattr(upload, "_pinned", unpinned)
    return upload._Arena()


def table(n: int, value: int = 1) -> Tensor:
    return torch.full((n, 2), value)


def test_what_a_graph_reads_is_never_written_again(arena: upload._Arena) -> None:
    kept: list[Tensor] = []
    for value in range(200):
        arena.reserve(table(500 + value).nbytes)  # an eager step between captures
        kept += [arena.keep(table(500 + value, value)), arena.keep(table(1, value))]
    for value in range(200):
        assert torch.equal(kept[2 * value], table(500 + value, value))
        assert torch.equal(kept[2 * value + 1], table(1, value))
        assert kept[2 * value].data_ptr() % upload._ALIGNED == 0


def test_an_eager_step_reserves_for_two_captures(arena: upload._Arena) -> None:
    host = table(100_000)
    arena.reserve(host.nbytes)
    for _ in range(4):
        arena.keep(host)


def test_a_capture_without_a_step_before_it(arena: upload._Arena) -> None:
    with pytest.raises(
        RuntimeError, match="Run one step with these gradients without a capture"
    ) as error:
        arena.keep(table(3))
    assert str(error.value).startswith("cannot upload 48 bytes")
    arena.reserve(48)
    assert torch.equal(arena.keep(table(3)), table(3))


@pytest.mark.parametrize(("size", "wanted"), [(10, 30_000), (100_000, 30)])
def test_many_captures_without_a_step_between(arena: upload._Arena, size: int, wanted: int) -> None:
    """The steps that the error asks for make room for more and more of them."""
    host = table(size)
    steps = 0
    while not has_room(arena, host, wanted):
        arena.reserve(host.nbytes)
        steps += 1
        assert steps <= 4


def has_room(arena: upload._Arena, host: Tensor, times: int) -> bool:
    try:
        for _ in range(times):
            arena.keep(host)
    except RuntimeError:
        return False
    return True


def test_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in it makes the arena, and another writes to it."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda n, dtype, **options: empty(n, dtype=dtype))
    arena = upload._Arena()
    with torch.inference_mode():
        arena.reserve(16)
    assert torch.equal(arena.keep(table(1)), table(1))
    with torch.inference_mode():
        assert torch.equal(arena.keep(table(1)), table(1))


def test_which_memory_is_uploaded(monkeypatch: pytest.MonkeyPatch, arena: upload._Arena) -> None:
    host = table(3)
    assert upload.upload(host, torch.device("cpu")) is host
    monkeypatch.setattr(upload, "_arena", arena)
    uploads: list[tuple[bool, bool]] = []

    def to(tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        in_arena = tensor.untyped_storage().data_ptr() == arena._memory.untyped_storage().data_ptr()
        uploads.append((in_arena, non_blocking))
        return tensor

    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    captures = [False, True, False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures.pop(0))
    for _ in range(3):
        assert torch.equal(upload.upload(host, torch.device("cuda", 0)), host)
    assert uploads == [(False, True), (True, True), (False, True)]
