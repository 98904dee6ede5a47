"""Every backend has the functions of `Backend` and the numbers of `naive`."""

from __future__ import annotations

import inspect
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from distclip import kernels
from distclip.kernels import cpu, foreach, naive
from distclip.kernels.backend import Backend

HAS_GPU = torch.cuda.is_available()
FUNCTIONS = [name for name, _ in inspect.getmembers(Backend, inspect.isfunction) if name[0] != "_"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64]
SIZES = [(0,), (1,), (), (300,), (7, 9), (30, 40)]
LARGE = 70_070  # elements: `cpu` sums so many in float32
POWERS = [0.5, 1.0, 2.0, 3.0, math.inf]
RTOL = 6.2e-7  # of a sum: float32 rows err by up to 3.1e-7 of a norm; see `cpu`


def cuda() -> ModuleType:
    pytest.importorskip("triton")
    return pytest.importorskip("distclip.kernels.cuda")


@pytest.fixture(params=["naive", "foreach", "cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Without a GPU Triton's interpreter runs `cuda` on tensors of the CPU."""
    with np.errstate(all="ignore"):  # the interpreter warns where a device does not
        yield cuda() if request.param == "cuda" else getattr(kernels, request.param)


@pytest.fixture
def device(backend: Backend) -> str:
    return "cuda" if HAS_GPU and backend is not cpu else "cpu"


def gradients(dtype: torch.dtype, backend: Backend, device: str) -> list[Tensor]:
    """Of all sizes; dense in another order of dims; with gaps; neighbours in one storage."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    interpreted = backend not in (naive, foreach, cpu) and not HAS_GPU  # too slow for many elements
    sizes = SIZES if interpreted else [(LARGE,), *SIZES]
    made = [torch.randn(size, generator=generator, dtype=wide) for size in sizes]
    *whole, matrix = [tensor.to(device, dtype) for tensor in made]
    return [*whole, matrix.t(), matrix.clone()[:, ::3], *matrix.clone().view(-1)[:1000].split(500)]


def number(value: float, device: str) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


def parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(function).parameters.values() if p.name != "self"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_functions_of_the_protocol(backend: Backend, name: str) -> None:
    declared, found = getattr(Backend, name), getattr(backend, name)
    assert parameters(found) == parameters(declared)
    returned = inspect.signature(declared).return_annotation
    assert inspect.signature(found).return_annotation == returned
    # The functions of the package dispatch by device and are otherwise the same.
    assert inspect.signature(getattr(kernels, name)) == inspect.signature(found)


def test_the_protocol_has_all_that_a_backend_does() -> None:
    assert {name for name in cpu.__all__} == set(FUNCTIONS) == set(foreach.__all__)
    assert set(cuda().__all__) == set(FUNCTIONS)


def test_lists_hold_each_element_once(backend: Backend, device: str) -> None:
    tensors = [t for dtype in DTYPES[:2] for t in gradients(dtype, backend, device)]
    lists = backend.tensor_lists(tensors)
    assert sum(t.numel() for part in lists for t in part) == sum(t.numel() for t in tensors)
    for part in lists:
        for tensor in part:
            tensor.fill_(1)
    assert all((t == 1).all() for t in tensors)
    assert backend.tensor_lists([]) == []


@pytest.mark.parametrize("norm_type", POWERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_and_norms(
    backend: Backend, device: str, dtype: torch.dtype, norm_type: float
) -> None:
    tensors = gradients(dtype, backend, device)
    expected = naive.power_sums(tensors, norm_type)
    found = [backend.power_sums(part, norm_type) for part in backend.tensor_lists(tensors)]
    together = naive.combine(torch.cat(found), norm_type)
    total = naive.combine(expected, norm_type)
    torch.testing.assert_close(together, total, rtol=RTOL, atol=0)
    per_tensor = backend.power_sums(tensors, norm_type)
    torch.testing.assert_close(per_tensor, expected, rtol=RTOL, atol=0)
    where = torch.arange(len(tensors), device=device) % 3 == 1
    otherwise = -torch.ones(len(tensors), dtype=torch.float64, device=device)
    some = backend.power_sums_where(tensors, norm_type, where, otherwise)
    torch.testing.assert_close(some, torch.where(where, expected, -1.0), rtol=RTOL, atol=0)
    assert some.dtype == torch.float64
    norms, expected = backend.norms(tensors, norm_type), naive.norms(tensors, norm_type)
    torch.testing.assert_close(norms, expected, rtol=RTOL, atol=0)
    assert {together.dtype, per_tensor.dtype, norms.dtype} == {torch.float64}


@pytest.mark.parametrize("norm_type", [2.0, 8.0, math.inf])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_units(backend: Backend, device: str, dim: int, norm_type: float) -> None:
    tensor = torch.randn(5, 7, 3, device=device).bfloat16()
    per_unit = [unit.contiguous() for unit in tensor.unbind(dim)]
    for found, expected in (
        (
            backend.unit_power_sums([tensor], [dim], norm_type),
            naive.power_sums(per_unit, norm_type),
        ),
        (backend.unit_norms([tensor], [dim], norm_type), naive.norms(per_unit, norm_type)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    coefficients = torch.rand(len(per_unit), dtype=torch.float64, device=device)
    naive.scale_each_(per_unit, coefficients)
    backend.scale_units_([tensor], [dim], coefficients)
    assert torch.equal(tensor, torch.stack(per_unit, dim))


OPERATIONS: list[tuple[str, float]] = [
    *[("scale_", value) for value in (0.333712345678901, 1e-9, 3.0, 0.0, 1.0)],
    *[("clamp_", value) for value in (0.5, 0.0, math.inf)],
    *[("zero_", value) for value in (True, False)],
    ("scale_each_", 0.7),
]


@pytest.mark.parametrize(("name", "value"), OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_the_same_bits(
    backend: Backend, device: str, dtype: torch.dtype, name: str, value: float
) -> None:
    if dtype.is_complex and name == "clamp_":
        pytest.skip("complex numbers have no order")
    tensors, expected = gradients(dtype, backend, device), gradients(dtype, backend, device)
    operand = torch.tensor(value, device=device) if name == "zero_" else number(value, device)
    if name == "scale_each_":
        coefficients = value ** torch.arange(len(tensors), dtype=torch.float64, device=device)
        backend.scale_each_(tensors, coefficients)
        naive.scale_each_(expected, coefficients)
    else:
        for part in backend.tensor_lists(tensors):
            getattr(backend, name)(part, operand)
        getattr(naive, name)(expected, operand)
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["scale_", "scale_each_", "scale_units_"])
@pytest.mark.parametrize("value", [1.1e-38, 3e-40, -3e-44, 1e-60, 1e-300])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex128])
def test_coefficients_that_are_no_normal_float32(
    backend: Backend, device: str, dtype: torch.dtype, value: float, name: str
) -> None:
    """The product is rounded, and the coefficient is not."""
    if HAS_GPU and backend in (naive, foreach):
        pytest.skip("they would have to wait for the coefficient")
    if HAS_GPU and (dtype.is_complex or name == "scale_units_"):
        pytest.skip("torch's operators do it")
    wide = torch.complex128 if dtype.is_complex else torch.float64
    tensors = [(t.to(wide) * 6e37).to(dtype) for t in gradients(dtype, backend, device)]
    if dtype is torch.float16:
        tensors = gradients(dtype, backend, device)
    if name == "scale_units_":
        tensors = [t for t in tensors if t.ndim == 2]
    expected = [(t.to(wide) * value).to(dtype) for t in tensors]
    if name == "scale_":
        for part in backend.tensor_lists(tensors):
            backend.scale_(part, number(value, device))
    elif name == "scale_each_":
        backend.scale_each_(tensors, number(value, device).expand(len(tensors)).clone())
    else:
        for tensor in tensors:
            ones = number(1.0, device).expand(len(tensor)).clone()
            kept = tensor[1:].clone()
            ones[0] = value
            backend.scale_units_([tensor], [0], ones)
            assert torch.equal(tensor[1:], kept)
        tensors, expected = [t[0] for t in tensors], [t[0] for t in expected]
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0)


@pytest.mark.parametrize("value", [1e-30, 1e30])
def test_squares_out_of_range(backend: Backend, device: str, value: float) -> None:
    tensors = [t for dtype in DTYPES[:2] for t in gradients(dtype, backend, device)]
    for tensor in tensors:
        tensor.fill_(value)
    found = backend.power_sums(tensors, 2.0).sqrt()
    torch.testing.assert_close(found, naive.norms(tensors, 2.0), rtol=RTOL, atol=0)


@pytest.mark.parametrize("norm_type", [2.0, 8.0])
def test_prepare_writes_nothing(backend: Backend, device: str, norm_type: float) -> None:
    tensors = gradients(torch.bfloat16, backend, device)
    before = [t.clone() for t in tensors]
    backend.prepare(tensors, norm_type)
    backend.prepare([], norm_type)
    assert all(map(torch.equal, tensors, before))


def test_chosen_by_device() -> None:
    assert kernels.backend(torch.device("cpu")) is cpu
    assert kernels.backend(torch.device("meta")) is foreach
    assert kernels.DEFINITION is naive


def test_no_tensors() -> None:
    assert kernels.power_sums([], 2.0).tolist() == kernels.norms([], 2.0).tolist() == []
    assert kernels.tensor_lists([]) == []
    kernels.prepare([], 2.0)


def test_lists_of_several_devices() -> None:
    tensors = [torch.ones(3), torch.ones(3, device="meta"), torch.ones(4), torch.ones(2).half()]
    found = kernels.tensor_lists(tensors)
    assert [[t.numel() for t in part] for part in found] == [[3, 4], [2], [3]]
    assert [part[0].device.type for part in found] == ["cpu", "cpu", "meta"]


@pytest.fixture
def _choose_anew() -> Iterator[None]:
    kernels._choose.cache_clear()
    yield
    kernels._choose.cache_clear()


@pytest.mark.usefixtures("_choose_anew")
@pytest.mark.skipif(HAS_GPU, reason="Triton does not fail on this GPU")
def test_the_fallback_where_triton_fails() -> None:
    cuda()
    with pytest.warns(UserWarning, match="Triton does not run on cuda"):
        assert kernels.backend(torch.device("cuda")) is foreach


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device on this machine")
def test_triton_is_chosen_for_a_gpu() -> None:
    assert kernels.backend(torch.device("cuda", 0)) is cuda()


@pytest.mark.usefixtures("_choose_anew")
def test_without_triton_nobody_is_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distclip.kernels.cuda", None)  # its import fails
    monkeypatch.delattr(kernels, "cuda", raising=False)
    assert kernels.backend(torch.device("cuda", 7)) is foreach


@pytest.mark.usefixtures("_choose_anew")
def test_nothing_is_chosen_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call after it chooses, and is not bound to what failed before."""
    tried: list[Sequence[Tensor]] = []
    monkeypatch.setattr(cuda(), "prepare", lambda tensors, norm_type: tried.append(tensors))
    monkeypatch.setattr(torch, "ones", lambda *shape, device: device)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device = torch.device("cuda", 6)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="during the capture of a CUDA graph"):
            kernels.backend(device)
    assert kernels.backend(torch.device("cpu")) is cpu
    assert not tried
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert kernels.backend(device) is cuda()
    assert tried == [[device]]


@pytest.mark.usefixtures("_choose_anew")
def test_a_failure_because_another_thread_captures_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(tensors: Sequence[Tensor], norm_type: float) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(torch, "ones", lambda *shape, device: device)
    monkeypatch.setattr(cuda(), "prepare", fails)
    with pytest.raises(RuntimeError, match="run one step before"):
        kernels.backend(torch.device("cuda", 6))
    monkeypatch.setattr(cuda(), "prepare", lambda tensors, norm_type: None)
    assert kernels.backend(torch.device("cuda", 6)) is cuda()


@pytest.mark.usefixtures("_choose_anew")
def test_threads_try_triton_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[torch.device] = []

    def slow(device: torch.device) -> None:
        tried.append(device)
        time.sleep(0.05)

    monkeypatch.setattr(kernels, "_triton", slow)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(kernels.backend, [torch.device("cuda", 5)] * 8))
    assert found == [foreach] * 8
    assert tried == [torch.device("cuda", 5)]
