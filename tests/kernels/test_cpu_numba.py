"""What Numba compiles for CPUs. `test_cpu.py` also runs each of its tests with Numba."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.passes import Traffic
from distclip.kernels import cpu, naive
from tests.kernels.test_cpu import ALL_NUMBA
from tests.norms.test_total_norm import clips_as_the_reference
from tests.support.layouts import LAYOUTS
from tests.support.ranks import Ranks

numba = pytest.importorskip("distclip.kernels.cpu_numba")

DTYPES = list(numba.DTYPES)
CHUNK = numba._CHUNK
(NAN_OF_ONES,) = struct.unpack("d", b"\xff" * 8)  # to round it up would give 0


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(numel: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


def patterns(dtype: torch.dtype) -> Tensor:
    """All 16-bit numbers, and as many float32 numbers with all exponents."""
    if dtype is torch.float32:
        words = torch.arange(0, 1 << 32, 65_521, dtype=torch.int64)
        return (words - (1 << 31)).to(torch.int32).view(dtype)
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def same(found: Tensor, expected: Tensor) -> None:
    """Equal in all bits but the payload of NaN."""
    assert torch.equal(found.isnan(), expected.isnan())
    bits = torch.int32 if found.dtype is torch.float32 else torch.int16
    number = ~expected.isnan()
    assert torch.equal(found[number].view(bits), expected[number].view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "coefficient",
    [0.0, 1e-30, 2.0**-8, 0.1, 1 / 3, 0.5, 0.9999999, 1.0, 3.0, math.inf, math.nan, NAN_OF_ONES],
)
def test_every_number_is_scaled_as_torch_scales_it(dtype: torch.dtype, coefficient: float) -> None:
    factor = torch.tensor(coefficient, dtype=torch.float64)
    found, expected = patterns(dtype), patterns(dtype)
    numba.scale_([found], factor)
    naive.scale_([expected], factor)
    same(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_read_as_torch_reads_it(dtype: torch.dtype) -> None:
    """Alone, where sums are float64, and in a block, where they are float32."""
    every = patterns(dtype)
    chosen = every[:: max(1, len(every) // 4096)]
    squares = numba.squares(chosen.split(1))
    expected = chosen.double().square()
    torch.testing.assert_close(squares, expected, rtol=1e-15, atol=0, equal_nan=True)
    usual = every[(every.double().abs() > 1e-15) & (every.double().abs() < 1e15)]
    torch.testing.assert_close(
        numba.squares([usual])[0], usual.double().square().sum(), rtol=2e-7, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "index", [0, 255, 256, 1023, 1024, CHUNK - 1, CHUNK, CHUNK + 300, 2 * CHUNK + 4]
)
def test_every_element_counts_once(dtype: torch.dtype, index: int) -> None:
    """In each lane, after the lanes, and in each chunk."""
    values = torch.zeros(2 * CHUNK + 5, dtype=dtype)
    values[index] = 3.0
    assert numba.squares([values]) == 9
    values.fill_(1)
    assert numba.squares([values]) == len(values)
    numba.scale_([values], torch.tensor(0.5, dtype=torch.float64))
    assert (values == 0.5).all()
    values[index] = math.nan
    assert numba.squares([values]).isnan()
    values[index] = -math.inf
    assert numba.squares([values]) == math.inf


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 5000), min_size=2, max_size=8).map(sorted),
    dtype=st.sampled_from(DTYPES),
)
def test_nothing_beside_a_tensor_is_read_or_written(cuts: list[int], dtype: torch.dtype) -> None:
    buffer = torch.full((5000,), math.nan, dtype=dtype)
    tensors = [
        buffer[begin:end].fill_(2) for begin, end in zip(cuts[::2], cuts[1::2], strict=False)
    ]
    numel = sum(map(len, tensors))
    assert numba.squares(tensors).tolist() == [4 * len(tensor) for tensor in tensors]
    numba.scale_(tensors, torch.tensor(0.25, dtype=torch.float64))
    assert all((tensor == 0.5).all() for tensor in tensors)
    assert buffer.isnan().sum() == len(buffer) - numel


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_the_same_with_any_number_of_threads(dtype: torch.dtype) -> None:
    tensors = [random(5 * CHUNK + 3, dtype), random(1000, dtype, 1), random(CHUNK, dtype, 2)]
    sums = set()
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        sums |= {tuple(numba.squares(tensors).tolist()) for _ in range(5)}
    (found,) = sums
    assert found == pytest.approx([t.double().square().sum().item() for t in tensors], rel=2e-7)


@pytest.mark.usefixtures("_threads")
def test_the_threads_are_those_of_torch() -> None:
    """Another OpenMP would not use the number of threads that torch was set to."""
    for num in (3, 5):
        torch.set_num_threads(num)
        assert numba._openmp().omp_get_max_threads() == num


@pytest.mark.usefixtures("_threads")
def test_no_two_threads_take_the_same_chunk() -> None:
    torch.set_num_threads(4)
    values = torch.ones(100_000)
    tensors = values.split(1)
    for _ in range(5):
        values.fill_(1)
        numba.scale_(tensors, torch.tensor(0.5, dtype=torch.float64))
        assert (values == 0.5).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_used_from_a_number_of_elements(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu._numba()  # calls it once
    calls: list[tuple[str, int]] = []

    def spy(name: str) -> None:
        function = getattr(numba, name)

        def call(tensors: list[Tensor], *rest: Tensor) -> Tensor | None:
            calls.append((name, sum(map(len, tensors))))
            return function(tensors, *rest)

        monkeypatch.setattr(numba, name, call)

    spy("squares")
    spy("scale_")
    half = torch.tensor(0.5, dtype=torch.float64)
    least = cpu._NUMBA_FROM.get(dtype, 1 << 20)
    for numel in (least - 256, least):
        values = [torch.ones(numel, dtype=dtype), torch.ones(100, dtype=dtype)]
        before = values[0]._version
        assert cpu.power_sums(values, 2.0).sum() == numel + 100
        cpu.scale_(values, torch.ones((), dtype=torch.float64))
        assert values[0]._version == before
        cpu.scale_(values, half)
        assert [t._version for t in values] == [before + 1] * 2
        assert cpu.power_sums(values, 2.0).sum() == (numel + 100) / 4
        assert cpu.power_sums(values, 1.0).sum() == (numel + 100) / 2
    expected = [("squares", least + 100), ("scale_", least + 100), ("squares", least + 100)]
    assert calls == ([] if dtype is torch.float64 else expected)


def test_many_short_tensors_do_not_count() -> None:
    """A call for each of them costs more than its elements."""
    assert cpu._numba_for([torch.ones(cpu._SHORT)] * (1 << 11)) is None
    assert cpu._numba_for([torch.ones(cpu._SHORT + 1)] * (1 << 10)) is numba


@pytest.mark.parametrize("dtype", DTYPES)
def test_beside_what_torch_does(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba takes all tensors; those that are not contiguous are copied to be read."""
    monkeypatch.setattr(cpu, "_NUMBA_FROM", dict.fromkeys(cpu._NUMBA_FROM, 0))
    tensors = [random(n, dtype, n) for n in (0, 7, 100_001, 4096, 4097)]
    tensors += [random(70_000, dtype).view(70, 1000).t(), random(30_000, dtype)[::3]]
    expected = [tensor.clone() for tensor in tensors]
    found = cpu.power_sums(tensors, 2.0)
    torch.testing.assert_close(found, naive.power_sums(expected, 2.0), rtol=1e-7, atol=0)
    half = torch.tensor(0.5, dtype=torch.float64)
    cpu.scale_(tensors, half)
    naive.scale_(expected, half)
    assert all(map(torch.equal, tensors, expected))


def test_prepare_compiles_for_each_dtype() -> None:
    loops = numba._loops
    for dtype in DTYPES:
        cpu.prepare([torch.empty(cpu._NUMBA_FROM[dtype], dtype=dtype)], 2.0)
    compiled = loops.worker.cache_info().misses
    for dtype in DTYPES:
        one = torch.ones(1, dtype=dtype)
        numba.scale_([one], numba.squares([one])[0])
    assert loops.worker.cache_info().misses == compiled == 2 * len(DTYPES)


def clips_as_the_reference_with_numba(layout: str, dtype: torch.dtype) -> None:
    with mock.patch.multiple(cpu, **ALL_NUMBA):
        clips_as_the_reference(layout, 2.0, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_clips_as_the_reference(
    four_on_cpus: Ranks, layout: str, dtype: torch.dtype
) -> None:
    four_on_cpus.run(clips_as_the_reference_with_numba, layout, dtype)


def test_profilers_and_dispatch_modes_see_it() -> None:
    values = torch.ones(cpu._NUMBA_FROM[torch.float32])
    with Traffic([values]) as traffic:
        cpu.power_sums([values], 2.0)
        assert (traffic.read, traffic.written) == (values.nbytes, 0)
        cpu.scale_([values], torch.tensor(0.5, dtype=torch.float64))
        assert (traffic.read, traffic.written) == (2 * values.nbytes, values.nbytes)


MISSING = """
import sys, warnings
import torch
warnings.simplefilter("error", UserWarning)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "numba":
            raise {error}
sys.meta_path.insert(0, Finder())
from distclip.kernels import cpu
values = [torch.full((cpu._NUMBA_FROM[torch.float32] + 5,), 2.0)]
assert cpu.power_sums(values, 2.0).sum() == 4 * len(values[0])
cpu.scale_(values, torch.tensor(0.5, dtype=torch.float64))
assert (values[0] == 1).all()
print("distclip.kernels.cpu_numba" in sys.modules)
"""


def without(error: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", MISSING.format(error=error)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_without_numba_nobody_is_warned() -> None:
    done = without("ModuleNotFoundError('No module named numba')")
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_numba_that_fails_is_named() -> None:
    done = without("ImportError('Numba needs NumPy 2.0 or less')")
    assert "Numba does not run here" in done.stderr
    assert "needs NumPy 2.0 or less" in done.stderr
