"""The kernels for CPUs against `naive`, and which memory they may touch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import distclip
from distclip import kernels
from distclip.kernels import cpu, cpu_torch, naive

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64]
# Below and above each size at which the kernels change their method: rows, packs, blocks, chunks.
SIZES = [0, 1, 63, 64, 65, 255, 257, 1023, 1024, 4095, 4097, 65535, 65600, 300_001, (1 << 20) + 77]
ANY_WIDTH = 2e-7  # of sums of random numbers, however many of them a CPU adds up at once
SAME_ROUNDING = 6.2e-7  # of a sum of squares, which is 3.1e-7 of the norm

NO_NUMBA: dict[str, Any] = {"_NUMBA_FROM": dict.fromkeys(cpu._NUMBA_FROM, math.inf)}
ALL_NUMBA: dict[str, Any] = {"_NUMBA_FROM": dict.fromkeys(cpu._NUMBA_FROM, 0)}


@pytest.fixture(autouse=True, params=["torch", "numba"])
def _method(request: pytest.FixtureRequest) -> Iterator[None]:
    """With torch's operators alone, and with Numba for any number of elements."""
    if request.param == "numba":
        pytest.importorskip("numba")
        assert cpu._numba() is not None
    with mock.patch.multiple(cpu, **(ALL_NUMBA if request.param == "numba" else NO_NUMBA)):
        yield


def total(tensors: list[Tensor], norm_type: float) -> Tensor:
    """The sum of all, or the largest."""
    zero = torch.zeros(1, dtype=torch.float64)
    return naive.combine(torch.cat([zero, cpu.power_sums(tensors, norm_type)]), norm_type)


def expected_total(tensors: list[Tensor], norm_type: float) -> Tensor:
    zero = torch.zeros(1, dtype=torch.float64)
    return naive.combine(torch.cat([zero, naive.power_sums(tensors, norm_type)]), norm_type)


def random(numel: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(numel, generator=generator, dtype=torch.float64) * scale).to(dtype)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", SIZES)
def test_any_size_and_dtype(numel: int, dtype: torch.dtype, norm_type: float) -> None:
    tensors = [random(numel, dtype), random(7, dtype, seed=1)]
    torch.testing.assert_close(
        total(tensors, norm_type), expected_total(tensors, norm_type), rtol=ANY_WIDTH, atol=0
    )
    per_tensor = cpu.power_sums(tensors, norm_type)
    torch.testing.assert_close(
        per_tensor, naive.power_sums(tensors, norm_type), rtol=ANY_WIDTH, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1.0, 1.9])
def test_equal_elements_whose_roundings_err_to_the_same_side(
    value: float, dtype: torch.dtype
) -> None:
    tensors = [torch.full((300_000,), value).to(dtype), torch.full((5_000,), value).to(dtype)]
    torch.testing.assert_close(
        total(tensors, 2.0), expected_total(tensors, 2.0), rtol=SAME_ROUNDING, atol=0
    )


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-23, 1e-19, 1e-14, 1e15, 1e18, 1e19, 1e30, 1e37])
def test_squares_outside_of_float32(scale: float) -> None:
    tensors = [random(70_000, torch.float32, scale), random(5, torch.float32, scale)]
    torch.testing.assert_close(total(tensors, 2.0), expected_total(tensors, 2.0), rtol=2e-7, atol=0)
    per_tensor = cpu.power_sums(tensors, 2.0)
    torch.testing.assert_close(per_tensor, naive.power_sums(tensors, 2.0), rtol=2e-7, atol=0)


@pytest.mark.parametrize("numel", [10, 5_000, 100_000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_anywhere(
    numel: int, dtype: torch.dtype, norm_type: float, value: float
) -> None:
    for index in (0, numel // 2, numel - 1):
        tensors = [torch.ones(3, dtype=dtype), torch.ones(numel, dtype=dtype)]
        tensors[1][index] = value
        torch.testing.assert_close(
            total(tensors, norm_type), torch.tensor(abs(value)).double(), equal_nan=True
        )


def test_neighbours_are_one_span_in_any_order() -> None:
    storage = random(1000, torch.float32)
    parts = list(storage.split([100, 300, 1, 599]))
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        ((span,),) = kernels.tensor_lists([parts[i].view(-1, 1) for i in order])
        assert span.data_ptr() == storage.data_ptr()
        assert span.shape == (1000,)


def test_a_span_never_contains_a_gap() -> None:
    storage = torch.full((1000,), math.nan)
    parts = [storage[:100], storage[101:500], storage[500:999]]  # elements 100 and 999 are padding
    for part in parts:
        part.fill_(2.0)
    ((first, second),) = kernels.tensor_lists(parts)
    assert (first.numel(), second.numel()) == (100, 898)
    assert total(parts, 2.0) == 998 * 4
    kernels.scale_([first, second], torch.tensor(0.5, dtype=torch.float64))
    assert storage.isnan().nonzero().flatten().tolist() == [100, 999]
    assert all((part == 1).all() for part in parts)


def test_two_storages_that_touch_are_two_spans() -> None:
    memory = bytearray(800)
    views = [
        torch.frombuffer(memory, dtype=torch.float32, count=100, offset=offset)
        for offset in (0, 400)
    ]
    assert views[0].data_ptr() + 400 == views[1].data_ptr()
    assert [len(part) for part in kernels.tensor_lists(views)] == [2]
    first, second = views
    ((joined, other),) = kernels.tensor_lists([first[:50], second, first[50:]])
    assert (joined.numel(), other.numel()) == (100, 100)
    assert joined.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()


def test_a_tensor_with_gaps_has_no_neighbour() -> None:
    """Its elements reach beyond its number of bytes, here over another tensor of the storage."""
    storage = random(10, torch.float32)
    tensors = [storage.view(5, 2)[:, 0], storage[5:6], storage[7:8]]
    ((*spans,),) = kernels.tensor_lists(tensors)
    assert sorted(span.numel() for span in spans) == [1, 1, 5]
    torch.testing.assert_close(total(tensors, 2.0), expected_total(tensors, 2.0), rtol=1e-7, atol=0)


def test_neighbours_of_two_dtypes_and_tensors_in_other_orders_of_dims() -> None:
    storage = torch.zeros(64, dtype=torch.float32)
    storage[:32] = random(32, torch.float32)
    halves = [storage[:32], storage[32:].view(torch.bfloat16)]
    halves[1].copy_(random(64, torch.bfloat16))
    transposed = random(35 * 200, torch.float32).view(35, 200).t()
    strided = random(500, torch.float32)[::5]
    tensors = [*halves, transposed, strided]
    torch.testing.assert_close(total(tensors, 2.0), expected_total(tensors, 2.0), rtol=1e-7, atol=0)
    expected = [(t.double() * 0.25).to(t.dtype) for t in tensors]
    for part in kernels.tensor_lists(tensors):
        kernels.scale_(part, torch.tensor(0.25, dtype=torch.float64))
    assert all(torch.equal(t, e) for t, e in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_rounds_each_element_once(dtype: torch.dtype) -> None:
    coefficient = torch.tensor(0.333712345678901, dtype=torch.float64)
    tensors = [random(10_001, dtype), random(77, dtype, seed=1)]
    wide = torch.promote_types(dtype, torch.float32)
    expected = [(t.to(wide) * coefficient.to(wide.to_real())).to(dtype) for t in tensors]
    for part in kernels.tensor_lists(tensors):
        kernels.scale_(part, coefficient)
    assert all(torch.equal(t, e) for t, e in zip(tensors, expected, strict=True))


def test_a_coefficient_of_one_writes_nothing() -> None:
    params = [torch.zeros(n, requires_grad=True) for n in (10, 5_000, 100_000)]
    for param in params:
        param.grad = torch.ones_like(param)
    report = distclip.Clipper(params, distclip.ClipNorm(1e9)).clip_()
    assert not report.clipped
    kernels.scale_([param.grad for param in params], torch.ones((), dtype=torch.float64))
    assert [param.grad._version for param in params] == [0, 0, 0]
    assert distclip.Clipper(params, distclip.ClipNorm(1.0)).clip_().clipped
    assert [param.grad._version for param in params] == [1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.sampled_from([0, 1, 5, 64, 100, 4096, 5000, 70_000]), min_size=1, max_size=12
    ),
    gaps=st.lists(st.booleans(), min_size=12, max_size=12),
    shuffled=st.randoms(use_true_random=False),
    dtype=st.sampled_from(DTYPES[:4]),
)
def test_any_cut_of_one_buffer(
    sizes: list[int], gaps: list[bool], shuffled, dtype: torch.dtype
) -> None:
    buffer = torch.full((sum(sizes) + len(sizes),), math.nan, dtype=dtype)
    parts, end = [], 0
    for size, gap in zip(sizes, gaps, strict=False):
        parts.append(buffer[end : end + size].copy_(random(size, dtype, seed=size)))
        end += size + gap
    shuffled.shuffle(parts)
    expected = [
        (part.to(torch.promote_types(dtype, torch.float32)) * 0.5).to(dtype) for part in parts
    ]
    torch.testing.assert_close(total(parts, 2.0), expected_total(parts, 2.0), rtol=1e-7, atol=0)
    for part in kernels.tensor_lists(parts):
        kernels.scale_(part, torch.tensor(0.5, dtype=torch.float64))
    assert all(torch.equal(part, e) for part, e in zip(parts, expected, strict=True))
    assert buffer.isnan().sum() == len(buffer) - sum(sizes)


CUTS = [1, 255, 256, 257, 4096, 4097, 0, 5000, 70_000, 100, 3]


def parts_of(kind: str, dtype: torch.dtype) -> list[Tensor]:
    if kind == "apart":
        return [torch.randn(numel).to(dtype) for numel in CUTS]
    if kind == "of other orders":
        return [torch.randn(70, 1000).to(dtype).t(), torch.randn(300, 300).to(dtype)[:, :100]]
    neighbours = list(torch.randn(sum(CUTS)).to(dtype).split(CUTS))
    if kind == "not finite":
        neighbours[8][300], neighbours[5][4] = math.inf, math.nan
    if kind == "far from 1":
        neighbours[8] *= 1e-30 if dtype is not torch.float16 else 1e-4
        neighbours[7].zero_()
    if kind == "twice":
        return [neighbours[8], neighbours[3], neighbours[8]]
    return neighbours[::-2] if kind == "with gaps" else neighbours


@pytest.mark.parametrize(
    "kind",
    ["apart", "neighbours", "with gaps", "of other orders", "not finite", "far from 1", "twice"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("norm_type", [2.0, 3.0, math.inf])
def test_a_number_for_each(kind: str, dtype: torch.dtype, norm_type: float) -> None:
    torch.manual_seed(0)
    parts = parts_of(kind, dtype)
    torch.testing.assert_close(
        cpu.power_sums(parts, norm_type),
        naive.power_sums(parts, norm_type),
        rtol=SAME_ROUNDING,
        atol=0,
        equal_nan=True,
    )


def test_one_call_reads_neighbours_of_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """And as few as possible others; the last of them may have a part of a row."""
    buffer = torch.randn(6 * 5120 + 100_000)
    parts = list(buffer.split([5120, 5120, 5121, 5120, 5120, 5119, 100_000]))
    expected, read = naive.power_sums(parts, 2.0), []
    norms_of_rows = cpu_torch._row_norms

    def spy(values: Sequence[Tensor]) -> Tensor:
        read.extend(map(len, values))
        return norms_of_rows(values)

    monkeypatch.setattr(cpu_torch, "_row_norms", spy)
    for order in ([*range(7)], [3, 6, 0, 5, 1, 4, 2]):
        found = cpu_torch.squares([parts[i] for i in order])
        torch.testing.assert_close(found, expected[order], rtol=SAME_ROUNDING, atol=0)
        whole = [each // 256 * 256 for each in (3 * 5120 + 1, 3 * 5120 - 1, 100_000)]
        assert read == whole
        read.clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", [2.0, 3.0, math.inf])
@pytest.mark.parametrize("sizes", [[7], [7, 7], [7, 9], [5000], [5000, 256]])
def test_measuring_writes_nothing(dtype: torch.dtype, norm_type: float, sizes: list[int]) -> None:
    tensors = [random(numel, dtype, seed=numel).view(-1, 1) for numel in sizes]
    before = [tensor.clone() for tensor in tensors]
    cpu.power_sums(tensors, norm_type)
    assert all(map(torch.equal, tensors, before))
