"""The Triton kernels give the numbers of the loops: under Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import distclip
from distclip import kernels
from distclip.kernels import foreach
from distclip.kernels import naive as loops
from distclip.kernels import tensor_table as tables
from tests.support.tolerances import NORM

triton = pytest.importorskip("triton")
kernel = pytest.importorskip("distclip.kernels.cuda")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = tables.DTYPES
POWERS = [1.0, 2.0, 3.0, 0.5, math.inf]
EXACT = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}


@pytest.fixture(autouse=True, scope="module")
def _as_on_a_device() -> Iterator[None]:
    """The interpreter computes with numpy, which warns where a device does not."""
    with np.errstate(all="ignore"):
        yield


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=DEVICE)


def gradients(sizes: list[int], seed: int = 0) -> list[Tensor]:
    """Of every size and dtype, and each once more without its first element, and so not aligned."""
    generator = torch.Generator().manual_seed(seed)
    whole = [torch.randn(n, generator=generator).to(DEVICE, dtype) for n in sizes for dtype in DTYPES]
    return whole + [t[1:] for t in whole if t.numel()]


def check_sums(tensors: list[Tensor], norm_type: float) -> None:
    """To half a unit of float32 in the norm: DESIGN.md, Numbers."""
    found = kernel.power_sums(tensors, norm_type)
    assert found.dtype == torch.float64
    expected = loops.power_sums(tensors, norm_type)
    power = 1 if math.isinf(norm_type) else norm_type
    torch.testing.assert_close(found, expected, rtol=NORM["rtol"] * power, atol=0, equal_nan=True)


@pytest.mark.parametrize("norm_type", POWERS)
def test_sums_of_every_dtype_in_one_list(norm_type: float) -> None:
    check_sums(gradients([0, 1, 7, 1500]), norm_type)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_sums_of_several_chunks(dtype: torch.dtype, norm_type: float) -> None:
    buffer = torch.randn(2 * tables.CHUNK + 20).to(DEVICE, dtype)
    check_sums([buffer[3 : 2 * tables.CHUNK + 9], buffer[: tables.CHUNK], buffer[8 : tables.CHUNK + 8]], norm_type)


def check_norms(tensors: list[Tensor], norm_type: float) -> None:
    found, expected = kernel.norms(tensors, norm_type), loops.norms(tensors, norm_type)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("norm_type", [2.0, 6.5, 20.0, 300.0, math.inf])
def test_norms_whose_powers_have_no_float64(norm_type: float) -> None:
    """A chunk has its own maximum: here the first chunk's is far below, or far above, that of its tensor."""
    sizes = [*gradients([0, 3, 1030]), torch.zeros(5, device=DEVICE)]
    sizes += [torch.full((9,), value, device=DEVICE) for value in (1e-45, 1e-30, 1e30, 3e38)]
    rising = torch.linspace(1e-3, 50, 2 * tables.CHUNK + 20).to(DEVICE)
    check_norms(
        [*sizes, rising, rising.flip(0), rising.bfloat16(), rising[1:].half(), rising.double() * 1e200], norm_type
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_norms_of_what_is_not_finite(value: float) -> None:
    tensors = [torch.ones(tables.CHUNK + 9, device=DEVICE, dtype=dtype) for dtype in DTYPES]
    for i, tensor in enumerate(tensors):
        tensor[(0, -1)[i % 2]] = value
    both = torch.tensor([math.inf, value, 1.0], device=DEVICE)
    check_norms([*tensors, both, torch.ones(3, device=DEVICE)], 8.0)


@pytest.mark.parametrize("norm_type", POWERS)
@pytest.mark.parametrize("value", [1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_sums_of_any_magnitude(value: float, norm_type: float) -> None:
    """A block's float32 sum of bfloat16 squares under- or overflows here."""
    long = torch.full((tables.CHUNK,), value, device=DEVICE).bfloat16()
    mixed = torch.tensor([value, 1.0, -value], device=DEVICE)
    check_sums([long, mixed, mixed.bfloat16(), torch.full((1030,), value, device=DEVICE)], norm_type)


def test_sums_of_equal_values_do_not_drift() -> None:
    """Where every rounding goes the same way, they add up."""
    for value in (0.1, 1 / 3, 0.7):
        check_sums([torch.full((tables.CHUNK + 5,), value, device=DEVICE).to(dtype) for dtype in DTYPES], 2.0)


@pytest.mark.parametrize("norm_type", POWERS)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_kept(value: float, norm_type: float) -> None:
    """At the ends of a tensor and of what is read at a time."""
    tensors = [torch.ones(1500, device=DEVICE, dtype=dtype) for dtype in DTYPES]
    for i, tensor in enumerate(tensors):
        tensor[(0, 1023, 1024, -1)[(i + POWERS.index(norm_type)) % 4]] = value
    both = torch.tensor([math.inf, value, math.inf], device=DEVICE)
    check_sums([*tensors, both, torch.ones(3, device=DEVICE)], norm_type)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 2500), max_size=4),
    offset=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    norm_type=st.sampled_from([1.0, 2.0, 2.5, math.inf]),
    exponent=st.integers(-40, 38),
)
def test_sums_of_views(sizes: list[int], offset: int, dtype: torch.dtype, norm_type: float, exponent: int) -> None:
    """Neighbours in the buffer are never counted."""
    buffer = torch.full((sum(sizes) + 20,), math.nan)
    buffer[offset : offset + sum(sizes)] = torch.randn(sum(sizes)) * 10.0**exponent
    views = list(buffer.to(DEVICE, dtype)[offset : offset + sum(sizes)].split(sizes))
    check_sums(views, norm_type)


@pytest.mark.parametrize("largest", [False, True])
def test_many_partial_sums_are_joined(largest: bool) -> None:
    counts = [9001, 0, 1, 4096]
    partials = torch.rand(sum(counts), dtype=torch.float64, device=DEVICE)
    partials[8500] = math.nan
    rows = torch.zeros(len(counts) + 1, tables.COLUMNS, dtype=torch.int64, device=DEVICE)
    rows[1:, 4] = torch.tensor(counts).cumsum(0)
    sums = torch.full((len(counts),), math.nan, dtype=torch.float64, device=DEVICE)
    kernel._device.finish[(len(counts),)](rows, partials, sums, math.inf if largest else 1.0)
    parts = partials.split(counts)
    expected = [part.max() if largest and len(part) else part.sum() for part in parts]
    torch.testing.assert_close(sums, torch.stack(expected), equal_nan=True)


def test_sums_beyond_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that says so: these chunks begin 2.5e9 elements after the address in their row."""
    tensor = torch.randn(tables.CHUNK + 100, device=DEVICE)
    table = tables.table([tensor])
    skipped = 2_500_000_000 // tables.CHUNK + 1
    rows = table.rows.clone()
    rows[0, 0] -= skipped * tables.CHUNK * 4
    rows[0, 1:3] += skipped * tables.CHUNK
    rows[0, 4] = -skipped
    monkeypatch.setattr(tables, "table", lambda tensors: table._replace(rows=rows))
    partials = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    kernel._device.partial_sums[(2,)](rows, table.owners, partials, 2.0, True)
    torch.testing.assert_close(partials.sum(), tensor.double().square().sum())
    expected = tensor * 0.5
    kernel.scale_([tensor], number(0.5))
    assert torch.equal(tensor, expected)


def test_other_layouts_and_dtypes() -> None:
    tensors = [
        torch.randn(30, 40, device=DEVICE).t(),  # dense, in another order
        torch.randn(4, 5, 6, device=DEVICE).permute(2, 0, 1).bfloat16(),
        torch.randn(30, 40, device=DEVICE)[:, ::3],  # with gaps
        torch.randn(1, device=DEVICE).expand(7),
        torch.randn(9, dtype=torch.complex64, device=DEVICE),
        torch.randn((), device=DEVICE),
    ]
    assert tables.table(tensors).others == [2, 3, 4]
    for norm_type in POWERS:
        check_sums(tensors, norm_type)
    check_norms(tensors, 8.0)
    tensors.pop(3)  # not to be written
    expected = [t.clone() for t in tensors]
    kernel.scale_(tensors, number(0.3))
    loops.scale_(expected, number(0.3))
    torch.testing.assert_close(tensors, expected)


def test_no_tensors() -> None:
    assert kernel.power_sums([], 2.0).shape == (0,)
    kernel.scale_([], number(0.5))
    empty = [torch.zeros(0, device=DEVICE)]
    assert kernel.power_sums(empty, math.inf).tolist() == [0]
    kernel.clamp_(empty, number(1.0))


def test_each_by_a_coefficient_of_its_own() -> None:
    buffers = [t.clone() for t in gradients([7, 4100])]
    expected = [b.clone() for b in buffers]
    coefficients = torch.rand(len(buffers), dtype=torch.float64, device=DEVICE)
    coefficients[3:6] = 1
    kernel.scale_each_([b[::2] if len(b) == 7 else b[1:] for b in buffers], coefficients)
    loops.scale_each_([b[::2] if len(b) == 7 else b[1:] for b in expected], coefficients)
    torch.testing.assert_close(buffers, expected, **EXACT)


REWRITES = {
    "scale_": [0.3, 1e-9, 3.0, 0.0, math.nan, 1.0],
    "clamp_": [0.5, 1e-9, 0.0, 1e6, math.inf],
    "zero_": [True, False],
}


@pytest.mark.parametrize(("name", "argument"), [(name, a) for name, many in REWRITES.items() for a in many])
def test_rewritten_as_by_the_loops(name: str, argument: float) -> None:
    """The same bits, and not one element of a neighbour."""
    buffers = [t.clone() for t in gradients([7, 4100]) if t.numel() > 6]
    for buffer in buffers:
        buffer[2:5] = torch.tensor([math.nan, math.inf, -math.inf])
    if name == "scale_":
        buffers += [torch.full((9,), v, device=DEVICE).to(d) for v in (1e-30, 65000.0, 1e30) for d in DTYPES]
    expected = [b.clone() for b in buffers]
    given_ = torch.tensor(argument, device=DEVICE) if name == "zero_" else number(argument)
    getattr(kernel, name)([b[1:-1] for b in buffers], given_)
    getattr(loops, name)([b[1:-1] for b in expected], given_)
    torch.testing.assert_close(buffers, expected, **EXACT)


def test_autograd_learns_that_a_tensor_was_written() -> None:
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    y = x.exp()
    z = y.square()
    kernel.scale_([y.detach()], number(0.5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_several_chunks_are_rewritten() -> None:
    buffers = [torch.randn(2 * tables.CHUNK + 9).to(DEVICE, dtype) for dtype in DTYPES]
    expected = [b.clone() for b in buffers]
    kernel.scale_([b[3:] for b in buffers], number(0.3))
    loops.scale_([b[3:] for b in expected], number(0.3))
    torch.testing.assert_close(buffers, expected, **EXACT)


SIGNALLING = {torch.float32: (torch.int32, 0x7F800001), torch.float64: (torch.int64, 0x7FF0000000000001)}
SIGNALLING |= {torch.float16: (torch.int16, 0x7C01), torch.bfloat16: (torch.int16, 0x7F81)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_coefficient_of_one_writes_nothing(dtype: torch.dtype) -> None:
    """Arithmetic would make a signalling NaN a quiet one, whatever the factor."""
    bits, pattern = SIGNALLING[dtype]
    values = torch.full((1500,), pattern, dtype=bits, device=DEVICE)
    kernel.scale_([values.view(dtype)], number(1.0))
    assert (values == pattern).all()
    kernel.scale_([values.view(dtype)], number(1 - 2**-53))
    assert (values != pattern).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_clamping_writes_only_what_lies_beyond_the_bound(dtype: torch.dtype) -> None:
    bits, pattern = SIGNALLING[dtype]
    values = torch.full((1500,), pattern, dtype=bits, device=DEVICE)
    values.view(dtype)[7] = 3.0
    kernel.clamp_([values.view(dtype)], number(2.0))
    assert values.view(dtype)[7] == 2
    assert (values == pattern).sum() == 1499


def test_a_table_is_kept_while_addresses_stay() -> None:
    tensors = [torch.randn(5, device=DEVICE), torch.randn(7, device=DEVICE).bfloat16()]
    first = tables.table(tensors)
    assert tables.table([t.view(-1) for t in tensors]) is first
    moved = [tensors[0], torch.randn(7, device=DEVICE).bfloat16()]
    assert tables.table(moved) is not first
    assert tables.table([tensors[0][:4], tensors[1]]) is not first
    assert tables.table([tensors[0], tensors[1].view(torch.float16)]) is not first
    check_sums(moved, 2.0)
    check_sums(tensors, 2.0)


def test_a_table_is_made_on_the_host_whatever_the_default_device() -> None:
    tensors = [torch.randn(5, device=DEVICE)]
    with torch.device("meta"):
        sums = kernel.power_sums(tensors, 2.0)
    torch.testing.assert_close(sums, loops.power_sums(tensors, 2.0))


def test_tables_are_few_and_hold_no_gradient() -> None:
    tensors = [torch.randn(5, device=DEVICE) for _ in range(40)]
    for tensor in tensors:
        tables.table([tensor])
    assert tables._kept.cache_info().currsize <= 32
    dead = weakref.ref(tensors[0])
    del tensors[0]
    gc.collect()
    assert dead() is None


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 10**10), st.integers(0, 3)), min_size=1, max_size=3))
def test_chunks_cover_every_element_once(places: list[tuple[int, int, int]]) -> None:
    """Of tensors too large for this machine."""
    places = [
        (at * DTYPES[code].itemsize, numel % 10**8 if i else numel, code) for i, (at, numel, code) in enumerate(places)
    ]
    rows, owners, _ = tables._made(torch.device("cpu"), tuple(places), capturing=False)
    for i, (address, numel, code) in enumerate(places):
        base, head, end, coded, first, _ = rows[i].tolist()
        assert base % 16 == 0
        assert coded == code
        assert end - head == numel
        assert base + head * DTYPES[code].itemsize == address
        num_chunks = int((owners == i).sum())
        assert rows[i + 1, 4] - first == num_chunks
        assert (num_chunks - 1) * tables.CHUNK < end <= num_chunks * tables.CHUNK or numel == num_chunks == 0
        assert (owners[first : first + num_chunks] == i).all()


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 9, dtype=torch.bfloat16)).to(DEVICE)
    for param in layers.parameters():
        param.grad = torch.randn_like(param)
    return layers


@pytest.mark.parametrize(
    "policy",
    [
        distclip.ClipNorm(0.5),
        distclip.ClipNorm(0.5, 8.0),
        distclip.ClipNorm(0.5, math.inf),
        distclip.ClipTensorNorm(0.5),
        distclip.ClipValue(0.5),
    ],
    ids=repr,
)
def test_a_call_takes_three_launches(policy: distclip.Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    for name in ("partial_sums", "finish", "partial_norms", "finish_norms", "rewrite"):
        function = getattr(kernel._device, name)

        def run(*args: object, name: str = name, original: Any = function.run, **kwargs: object) -> None:
            launched.append(name)
            original(*args, **kwargs)

        monkeypatch.setattr(function, "run", run)
    plain, by_triton = model(), model()
    monkeypatch.setattr(kernels, "_best", lambda tensors: loops)
    expected = distclip.Clipper(plain, policy).clip_()
    monkeypatch.setattr(kernels, "_best", lambda tensors: kernel)
    monkeypatch.setattr(kernels, "pieces", lambda tensors: [list(tensors)] if tensors else [])  # as on one GPU
    report = distclip.Clipper(by_triton, policy).clip_()
    assert expected.clipped
    torch.testing.assert_close(report.total_norm, expected.total_norm, **NORM)
    grads = [p.grad for p in by_triton.parameters()]
    torch.testing.assert_close(grads, [p.grad for p in plain.parameters()], rtol=2e-7, atol=0)
    end = "_norms" if policy.norm_type == 8 else ""
    assert launched == ["partial_norms" if end else "partial_sums", f"finish{end}", "rewrite"]


def test_the_fallback_where_triton_fails() -> None:
    if DEVICE == "cuda":
        assert kernels._on(torch.device("cuda", 0)) is kernel
        return
    with pytest.warns(UserWarning, match="Triton does not run on cuda"):
        assert kernels._on(torch.device("cuda")) is foreach


COMPILED = """
import re, subprocess, sys, pathlib, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from distclip.kernels import cuda_triton as device

tables = {"rows": "*i64", "owners": "*i64"}
sums = {**tables, "partials": "*fp64", "P": "constexpr", "QUICK": "constexpr"}
norms = {"maxima": "*fp64", "sums": "*fp64"}
power = {"P": "constexpr"}
for kernel, signature, constants in [
    (device.partial_sums, sums, {"P": 2.0, "QUICK": True}),
    (device.partial_sums, sums, {"P": float("inf"), "QUICK": True}),
    (device.partial_norms, {**tables, **norms, **power}, {"P": 8.0}),
    (device.finish, {"rows": "*i64", "partials": "*fp64", "sums": "*fp64", "P": "constexpr"}, {"P": 1.0}),
    (device.finish_norms, {"rows": "*i64", **norms, "norms": "*fp64", **power}, {"P": 8.0}),
    (device.rewrite, {**tables, "number": "*fp64", "HOW": "constexpr"}, {"HOW": device.SCALE.value}),
    (device.rewrite, {**tables, "number": "*i1", "HOW": "constexpr"}, {"HOW": device.ZERO.value}),
]:
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(kernel, signature, constants, aligned)
    ptx = compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32)).asm["ptx"]
    wide = [len(re.findall(rf"{way}[.]global[.](?:v4[.]b32|v2[.]b64)", ptx)) for way in ("ld", "st")]
    print(kernel.__name__, constants, *wide, bool(re.search(r"\\b(atom|red)[.]", ptx)))
"""


def test_compiled_for_a_gpu(tmp_path: Path) -> None:
    """Without one: loads and stores are 16 bytes wide, and there are no atomics, whose order would vary."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-c", COMPILED, "90"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [line.split()[-3:] for line in run.stdout.splitlines()]
    reads, writes = ([int(line[i]) for line in found] for i in (0, 1))
    assert [r > 0 for r in reads] == [True, True, True, False, False, True, False], run.stdout
    assert [w > 0 for w in writes] == [False, False, False, False, False, True, True], run.stdout
    assert {line[2] for line in found} == {"False"}
