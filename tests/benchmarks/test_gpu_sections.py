"""The sections of `benchmarks.gpu` find what is wrong; its clocks and counters, its tables."""

from __future__ import annotations

import importlib
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distclip
from benchmarks import gpu_kernels, gpu_ranks, gpu_report, gpu_times, gpu_training
from benchmarks.baselines import CLIPPER, TORCH
from benchmarks.gpu_device import Launches, Record, Session, count_launches, triton_kernels
from distclip import kernels
from tests.benchmarks.models import LLAMA_8B

# What the sections find ---------------------------------------------------------------------------


@pytest.fixture
def found() -> list[Record]:
    return []


@pytest.fixture
def session(found: list[Record]) -> Session:
    return Session("section", torch.device("cpu"), True, found.append)


def wrong_sums(tensors: list[Tensor], norm_type: float) -> Tensor:
    return kernels.DEFINITION.power_sums(tensors, norm_type) * (1 + 2e-6)


def nan_forgotten(tensors: list[Tensor], norm_type: float) -> Tensor:
    return kernels.DEFINITION.power_sums(tensors, norm_type).nan_to_num(nan=0.0)


@pytest.mark.parametrize(("wrong", "what"), [(wrong_sums, "p = 1,"), (nan_forgotten, "nan among")])
def test_wrong_sums_are_found(
    wrong: Any, what: str, session: Session, found: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_kernels.sums(session)
    assert all(record["right"] for record in found)
    found.clear()
    monkeypatch.setattr(kernels, "power_sums", wrong)
    gpu_kernels.sums(session)
    assert any(what in record["check"] for record in found if not record["right"])


def scales_a_neighbour(tensors: list[Tensor], factor: Tensor) -> None:
    for tensor in tensors:
        begin = max(tensor.storage_offset() - 1, 0)
        size = tensor.storage_offset() + tensor.numel() - begin
        tensor.as_strided((size,), (1,), begin).mul_(factor)


def rounds_the_factor(tensors: list[Tensor], factor: Tensor) -> None:
    for tensor in tensors:
        tensor.mul_(factor.to(tensor.dtype).double() * (1 + 1e-2))


@pytest.mark.parametrize(
    ("wrong", "what"), [(scales_a_neighbour, "neighbour"), (rounds_the_factor, "scale_ by 0.3")]
)
def test_wrong_products_are_found(
    wrong: Any, what: str, session: Session, found: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_kernels.rewrites(session)
    assert all(record["right"] for record in found)
    found.clear()
    monkeypatch.setattr(kernels, "scale_", wrong)
    gpu_kernels.rewrites(session)
    assert any(what in record["check"] for record in found if not record["right"])


def test_a_wrong_answer_has_no_time(
    session: Session, found: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "scale_", lambda tensors, factor: None)
    gpu_times.public(session)
    wrong = [record["check"] for record in found if record.get("right") is False]
    assert wrong
    assert all("clipping, distclip" in check for check in wrong)
    timed = {(r["state"], r["by"]) for r in found if "device_us" in r}
    assert ("clipping", TORCH) in timed
    assert ("not clipping", CLIPPER) in timed
    assert ("clipping", CLIPPER) not in timed


def test_wrong_units_are_found(
    session: Session, found: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_training, "agc", lambda param, policy: param.grad.double())
    gpu_training.units(session)
    assert {record["right"] for record in found if "right" in record} == {False}


def test_gradients_that_do_not_fit_are_said_not_to(
    found: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """8B elements in bf16 fit on 80 GB."""
    session = Session("models", torch.device("cuda"), False, found.append)
    shapes = [weight.shape for weight in LLAMA_8B.weights]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(gpu_times, "random_gradients", lambda *given, **named: made.append(named))
    for free in (78 << 30, 40 << 30):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 0))
        gpu_times.gradients_of(session, "8B", shapes, (torch.bfloat16,))
    assert [named["weights"] for named in made] == [False]
    assert found[0]["note"] == "does not fit: 47.8 GiB of 40.0 that are free"


def test_what_a_rank_alone_finds_wrong_is_said(found: list[Record]) -> None:
    session = Session("ranks", torch.device("cpu"), True, found.append, rank=1, num_ranks=2)
    session.say(what="for rank 0 to say")
    session.check("right", True)
    session.check("wrong", False, norm=2.0)
    assert found == [{"section": "ranks", "rank": 1, "check": "wrong", "right": False, "norm": 2.0}]


def test_what_torch_cannot_do_is_noted_and_what_distclip_raises_is_wrong(
    session: Session, found: list[Record]
) -> None:
    cases = {
        "torch": lambda: torch.ones(2) @ torch.ones(3),
        "distclip": lambda: distclip.ClipNorm(-1.0),
        "neither": lambda: session.check("one", True),
    }
    gpu_ranks.each(session, cases)
    assert found[0]["note"].startswith("torch does not run this: RuntimeError")
    assert found[1]["check"] == "distclip"
    assert not found[1]["right"]
    assert "ValueError" in found[1]["found"]
    assert found[2]["right"]


# Clocks and counters ------------------------------------------------------------------------------


class FakeEvent:
    """On a device that is busy until the host has queued everything, or not."""

    passed = False

    def __init__(self, enable_timing: bool) -> None: ...

    def record(self) -> None: ...

    def query(self) -> bool:
        return self.passed

    def elapsed_time(self, other: FakeEvent) -> float:
        return 0.25  # milliseconds


@pytest.mark.parametrize("waits", [False, True])
def test_a_time_that_holds_host_time_is_said_to(
    waits: bool, found: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[int] = []
    monkeypatch.setattr(FakeEvent, "passed", waits)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls: list[str] = []
    session = Session("models", torch.device("cuda"), False, found.append)
    timed = session.time(lambda: calls.append("run"), lambda: calls.append("prepare"), times=4)
    assert calls[:4] == ["prepare", "run"] * 2
    assert len(slept) == (3 if waits else 1)
    assert slept == sorted(slept)
    assert slept[0] >= 1e7
    facts = timed.facts(num_bytes=10**6)
    assert (facts["device_us"], facts["gb_s"]) == (250.0, 4.0)
    assert ("note" in facts) == waits


def test_waits_of_the_host_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    session = Session("waits", torch.device("cuda"), True, print)

    def call() -> None:
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered)", stacklevel=1)

    assert session.host_waits(call) == 2
    assert modes == ["warn", "default"]


def test_launches_are_counted_by_whose_they_are() -> None:
    pytest.importorskip("triton")
    importlib.import_module("distclip.kernels.cuda")

    ours = triton_kernels()
    assert {"partial_sums", "finish", "rewrite"} <= ours
    assert not any(name.startswith(("Mem", "void")) for name in ours)
    names = [*sorted(ours), "void at::native::vectorized_elementwise_kernel<4>", "Memset (Device)"]
    names += ["Memcpy HtoD (Pinned -> Device)"]
    assert count_launches(names) == Launches(len(ours), 1, 2)


def test_tables_show_goals_and_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        {"section": "sums", "check": "p = 2 | x", "right": False, "worst": 1e-3},
        {"section": "public", "goal": "one tensor, us", "found": 3300.0, "at_most": 3200.0}
        | {"reached": False},
        {"section": "public", "what": "one", "by": "torch", "device_us": 9.0, "host_us": 2.0}
        | {"gb_s": 12.0},
        {"section": "units", "error": "Traceback\n  File\nValueError: no"},
        {"section": "models", "skipped": "needs about 40 s, and 3 s are left"},
    ]
    gpu_report.publish(records, {"date": "today", "card": "a card"}, tmp_path)
    text = next(tmp_path.glob("gpu-*.md")).read_text()
    assert "| sums | 0.0 | 0 | 1 |  |" in text
    assert "| sums | p = 2 / x | worst=0.001 |" in text
    assert "| one tensor, us | 3300 | 3200 | not reached |" in text
    assert "| public | one, torch | 9 | 2 | 12 |  |" in text
    assert "| units | 0.0 | 0 | 0 | ValueError: no |" in text
    assert "skipped: needs about 40 s" in text
    assert "ValueError: no" in capsys.readouterr().out


def test_goals_are_for_a_device_alone(found: list[Record]) -> None:
    for device, tiny in (("cpu", False), ("cuda", True), ("cuda", False)):
        Session("public", torch.device(device), tiny, found.append).goal("us", 2.0, 3.0)
    assert [record["reached"] for record in found] == [True]


def test_the_public_figures_are_of_these_shapes() -> None:
    """Issue 3685 of NeMo Automodel: one tensor of 1.536e9 elements, 500 matrices of 225e6."""
    (_, (one,), dtypes), (_, matrices, mixed) = gpu_times.ONE, gpu_times.MATRICES
    assert (math.prod(one), dtypes) == (1_536_000_000, (torch.bfloat16,))
    assert (len(matrices), sum(map(math.prod, matrices))) == (500, 225_000_000)
    assert len(mixed) == 2


def test_a_test_may_look_for_host_waits() -> None:
    """torch warns of its debug mode when it is switched on, and warnings are errors here."""
    warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
