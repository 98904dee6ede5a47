"""The Triton kernels against `naive`: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip import kernels
from distclip.kernels import naive, tensor_table
from tests.support.drawn import given, settings
from tests.support.drawn import strategies as st
from tests.support.tolerances import NORM
from tests.support.triton_launches import wrap_launches

triton = pytest.importorskip("triton")
cuda = pytest.importorskip("distclip.kernels.cuda")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = tensor_table.DTYPES
CHUNK = tensor_table.SMALL_CHUNK  # of lists as small as these
POWERS = [1.0, 2.0, 3.0, 0.5, math.inf]
EXACT = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}


@pytest.fixture(autouse=True, scope="module")
def _as_on_a_device() -> Iterator[None]:
    """The interpreter computes with numpy, which warns where a device does not."""
    if DEVICE == "cuda":
        yield
        return
    import numpy as np

    with np.errstate(all="ignore"):
        yield


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=DEVICE)


def gradients(sizes: list[int], seed: int = 0) -> list[Tensor]:
    """Tensors of every size and dtype, and the same without the first element, thus not aligned."""
    generator = torch.Generator().manual_seed(seed)
    whole = [
        torch.randn(n, generator=generator).to(DEVICE, dtype) for n in sizes for dtype in DTYPES
    ]
    return whole + [t[1:] for t in whole if t.numel()]


def check_sums(tensors: list[Tensor], norm_type: float) -> None:
    """To half a unit of float32 in the norm: DESIGN.md, Numbers."""
    found = cuda.power_sums(tensors, norm_type)
    assert found.dtype == torch.float64
    expected = naive.power_sums(tensors, norm_type)
    power = 1 if math.isinf(norm_type) else norm_type
    torch.testing.assert_close(found, expected, rtol=NORM["rtol"] * power, atol=0, equal_nan=True)


@pytest.mark.parametrize("norm_type", POWERS)
def test_sums_of_every_dtype_in_one_list(norm_type: float) -> None:
    check_sums(gradients([0, 1, 7, 1500]), norm_type)


def test_what_is_left_out_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor in four is measured; the partial sums of the others stay as they were."""
    tensors = gradients([0, 1, 1500])
    where = torch.arange(len(tensors), device=DEVICE) % 4 == 0
    otherwise = torch.full((len(tensors),), -1.0, dtype=torch.float64, device=DEVICE)
    made: list[Tensor] = []
    empty = torch.empty
    owners = tensor_table.table(tensors).owners

    def filled(*shape: Any, **options: Any) -> Tensor:
        made.append(empty(*shape, **options).fill_(-7.0))
        return made[-1]

    monkeypatch.setattr(torch, "empty", filled)
    found = cuda.power_sums_where(tensors, 2.0, where, otherwise)
    torch.testing.assert_close(
        found, naive.power_sums_where(tensors, 2.0, where, otherwise), rtol=1e-6, atol=0
    )
    partials = made[0]
    assert torch.equal(partials != -7, where[owners])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_sums_of_several_chunks(dtype: torch.dtype, norm_type: float) -> None:
    buffer = torch.randn(2 * CHUNK + 20).to(DEVICE, dtype)
    check_sums(
        [
            buffer[3 : 2 * CHUNK + 9],
            buffer[:CHUNK],
            buffer[8 : CHUNK + 8],
        ],
        norm_type,
    )


def check_norms(tensors: list[Tensor], norm_type: float) -> None:
    found, expected = cuda.norms(tensors, norm_type), naive.norms(tensors, norm_type)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("norm_type", [2.0, 6.5, 20.0, 300.0, math.inf])
def test_norms_whose_powers_have_no_float64(norm_type: float) -> None:
    """Each chunk has its own maximum, here far below or far above that of its tensor."""
    sizes = [*gradients([0, 3, 1030]), torch.zeros(5, device=DEVICE)]
    sizes += [torch.full((9,), value, device=DEVICE) for value in (1e-45, 1e-30, 1e30, 3e38)]
    rising = torch.linspace(1e-3, 50, 2 * CHUNK + 20).to(DEVICE)
    check_norms(
        [
            *sizes,
            rising,
            rising.flip(0),
            rising.bfloat16(),
            rising[1:].half(),
            rising.double() * 1e200,
        ],
        norm_type,
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_norms_of_nan_and_infinity(value: float) -> None:
    tensors = [torch.ones(CHUNK + 9, device=DEVICE, dtype=dtype) for dtype in DTYPES]
    for i, tensor in enumerate(tensors):
        tensor[(0, -1)[i % 2]] = value
    both = torch.tensor([math.inf, value, 1.0], device=DEVICE)
    check_norms([*tensors, both, torch.ones(3, device=DEVICE)], 8.0)


@pytest.mark.parametrize("norm_type", POWERS)
@pytest.mark.parametrize("value", [1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_sums_of_any_magnitude(value: float, norm_type: float) -> None:
    """The float32 sum of a block of bfloat16 squares under- or overflows here."""
    long = torch.full((CHUNK,), value, device=DEVICE).bfloat16()
    mixed = torch.tensor([value, 1.0, -value], device=DEVICE)
    check_sums(
        [long, mixed, mixed.bfloat16(), torch.full((1030,), value, device=DEVICE)], norm_type
    )


def test_sums_of_equal_values_do_not_drift() -> None:
    """Roundings that all go the same way add up."""
    for value in (0.1, 1 / 3, 0.7):
        check_sums(
            [torch.full((CHUNK + 5,), value, device=DEVICE).to(dtype) for dtype in DTYPES],
            2.0,
        )


@pytest.mark.parametrize("norm_type", POWERS)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_kept(value: float, norm_type: float) -> None:
    """At both ends of a tensor and of a block."""
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
def test_sums_of_views(
    sizes: list[int], offset: int, dtype: torch.dtype, norm_type: float, exponent: int
) -> None:
    """Neighbours in the buffer are never counted."""
    buffer = torch.full((sum(sizes) + 20,), math.nan)
    buffer[offset : offset + sum(sizes)] = torch.randn(sum(sizes)) * 10.0**exponent
    views = list(buffer.to(DEVICE, dtype)[offset : offset + sum(sizes)].split(sizes))
    check_sums(views, norm_type)


@pytest.mark.parametrize("largest", [False, True])
def test_many_partial_sums_are_combined(largest: bool) -> None:
    counts = [9001, 0, 1, 4096]
    partials = torch.rand(sum(counts), dtype=torch.float64, device=DEVICE)
    partials[8500] = math.nan
    rows = torch.zeros(len(counts), tensor_table.ROW_SIZE, dtype=torch.int64, device=DEVICE)
    rows[:, 4] = torch.tensor(counts).cumsum(0)
    rows[1:, 3] = rows[:-1, 4]
    sums = torch.full((len(counts),), math.nan, dtype=torch.float64, device=DEVICE)
    cuda._triton.finish[(len(counts),)](rows, partials, sums, math.inf if largest else 1.0)
    parts = partials.split(counts)
    expected = [part.max() if largest and len(part) else part.sum() for part in parts]
    torch.testing.assert_close(sums, torch.stack(expected), equal_nan=True)


def test_sums_beyond_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this table chunks begin 2.5e9 elements after the address in their row."""
    tensor = torch.randn(CHUNK + 100, device=DEVICE)
    table = tensor_table.table([tensor])
    skipped = 2_500_000_000 // CHUNK + 1
    rows = table.rows.clone()
    rows[0, 0] -= skipped * CHUNK * 4
    rows[0, 1:3] += skipped * CHUNK
    rows[0, 3] = -skipped
    monkeypatch.setattr(tensor_table, "table", lambda tensors: table._replace(rows=rows))
    partials = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    stored = cuda._triton.STORED[0]
    cuda._triton.partial_sums[(2,)](rows, table.owners, partials, None, 0, stored, 2.0, False)
    torch.testing.assert_close(partials.sum(), tensor.double().square().sum())
    expected = tensor * 0.5
    cuda.scale_([tensor], number(0.5))
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
    assert tensor_table.table(tensors).others == [2, 3, 4]
    for norm_type in POWERS:
        check_sums(tensors, norm_type)
    check_norms(tensors, 8.0)
    tensors.pop(3)  # not to be written
    expected = [t.clone() for t in tensors]
    cuda.scale_(tensors, number(0.3))
    naive.scale_(expected, number(0.3))
    torch.testing.assert_close(tensors, expected)


def test_no_tensors() -> None:
    assert cuda.power_sums([], 2.0).shape == (0,)
    cuda.scale_([], number(0.5))
    empty = [torch.zeros(0, device=DEVICE)]
    assert cuda.power_sums(empty, math.inf).tolist() == [0]
    cuda.clamp_(empty, number(1.0))


def test_one_coefficient_per_tensor() -> None:
    buffers = [t.clone() for t in gradients([7, 4100])]
    expected = [b.clone() for b in buffers]
    coefficients = torch.rand(len(buffers), dtype=torch.float64, device=DEVICE)
    coefficients[3:6] = 1
    cuda.scale_each_([b[::2] if len(b) == 7 else b[1:] for b in buffers], coefficients)
    naive.scale_each_([b[::2] if len(b) == 7 else b[1:] for b in expected], coefficients)
    torch.testing.assert_close(buffers, expected, **EXACT)


REWRITES = {
    "scale_": [0.3, 1e-9, 3.0, 0.0, math.nan, 1.0],
    "clamp_": [0.5, 1e-9, 0.0, 1e6, math.inf],
    "zero_": [True, False],
}


@pytest.mark.parametrize(
    ("name", "argument"), [(name, a) for name, many in REWRITES.items() for a in many]
)
def test_rewritten_as_by_naive(name: str, argument: float) -> None:
    """The same bits, and no element of a neighbour."""
    buffers = [t.clone() for t in gradients([7, 4100]) if t.numel() > 6]
    for buffer in buffers:
        buffer[2:5] = torch.tensor([math.nan, math.inf, -math.inf])
    if name == "scale_":
        buffers += [
            torch.full((9,), v, device=DEVICE).to(d) for v in (1e-30, 65000.0, 1e30) for d in DTYPES
        ]
    expected = [b.clone() for b in buffers]
    operand = torch.tensor(argument, device=DEVICE) if name == "zero_" else number(argument)
    getattr(cuda, name)([b[1:-1] for b in buffers], operand)
    getattr(naive, name)([b[1:-1] for b in expected], operand)
    torch.testing.assert_close(buffers, expected, **EXACT)


def test_a_write_moves_the_version_of_a_tensor() -> None:
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    y = x.exp()
    z = y.square()
    cuda.scale_([y.detach()], number(0.5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_several_chunks_are_rewritten() -> None:
    buffers = [torch.randn(2 * CHUNK + 9).to(DEVICE, dtype) for dtype in DTYPES]
    expected = [b.clone() for b in buffers]
    cuda.scale_([b[3:] for b in buffers], number(0.3))
    naive.scale_([b[3:] for b in expected], number(0.3))
    torch.testing.assert_close(buffers, expected, **EXACT)


SIGNALLING = {
    torch.float32: (torch.int32, 0x7F800001),
    torch.float64: (torch.int64, 0x7FF0000000000001),
}
SIGNALLING |= {torch.float16: (torch.int16, 0x7C01), torch.bfloat16: (torch.int16, 0x7F81)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_coefficient_of_one_writes_nothing(dtype: torch.dtype) -> None:
    """A product with any factor would make a signalling NaN a quiet one."""
    bits, pattern = SIGNALLING[dtype]
    values = torch.full((1500,), pattern, dtype=bits, device=DEVICE)
    cuda.scale_([values.view(dtype)], number(1.0))
    assert (values == pattern).all()
    cuda.scale_([values.view(dtype)], number(1 - 2**-53))
    assert (values != pattern).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_clamping_writes_only_elements_beyond_the_bound(dtype: torch.dtype) -> None:
    bits, pattern = SIGNALLING[dtype]
    values = torch.full((1500,), pattern, dtype=bits, device=DEVICE)
    values.view(dtype)[7] = 3.0
    cuda.clamp_([values.view(dtype)], number(2.0))
    assert values.view(dtype)[7] == 2
    assert (values == pattern).sum() == 1499


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 9, dtype=torch.bfloat16)).to(DEVICE)
    for param in layers.parameters():
        param.grad = torch.randn_like(param)
    return layers


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched."""
    names: list[str] = []

    def noted(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        if name in KERNELS:
            names.append(name)
        return launch

    wrap_launches(noted, monkeypatch.setattr)
    return names


KERNELS = {"partial_sums", "finish", "partial_norms", "finish_norms"}
KERNELS |= {"total", "coefficients", "rewrite"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_a_clip_by_one_limit_takes_five_launches(
    dtype: torch.dtype, norm_type: float, launched: list[str]
) -> None:
    tensors = [torch.randn(n, device=DEVICE).to(dtype) for n in (7, 0, 3000, 2 * CHUNK)]
    expected = [t.clone() for t in tensors]
    (listed,) = cuda.tensor_lists(tensors)
    norm = cuda.total(cuda.power_sums(listed, norm_type), norm_type).norm
    limit = torch.tensor(0.5, dtype=torch.float64, device="cpu")
    cuda.scale_(listed, cuda.coefficients(norm, limit))
    assert launched == ["partial_sums", "finish", "total", "coefficients", "rewrite"]
    by_definition = naive.total(naive.power_sums(expected, norm_type), norm_type).norm
    torch.testing.assert_close(norm, by_definition, **NORM)
    naive.scale_(expected, naive.coefficients(norm, limit))
    torch.testing.assert_close(tensors, expected, **EXACT)


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
def test_a_call_reads_and_writes_in_one_launch_for_each_dtype(
    policy: distclip.Policy, monkeypatch: pytest.MonkeyPatch, launched: list[str]
) -> None:
    plain, by_triton = model(), model()
    monkeypatch.setattr(kernels, "backend", lambda device: naive)
    expected = distclip.Clipper(plain, policy).clip_()
    monkeypatch.setattr(kernels, "backend", lambda device: cuda)
    clipper = distclip.Clipper(by_triton, policy)
    launched.clear()  # on a GPU, the first Clippers launch all that a call will
    report = clipper.clip_()
    assert expected.clipped
    torch.testing.assert_close(report.total_norm, expected.total_norm, **NORM)
    grads = [p.grad for p in by_triton.parameters()]
    torch.testing.assert_close(grads, [p.grad for p in plain.parameters()], rtol=2e-7, atol=0)
    end = "_norms" if policy.norm_type == 8 else ""
    on_elements = [name for name in launched if name not in {"total", "coefficients"}]
    reads = ["partial_norms" if end else "partial_sums"] * 2
    assert on_elements == [*reads, f"finish{end}", "rewrite", "rewrite"]


@pytest.mark.parametrize("norm_type", [*POWERS, 4.0, 5.0, 6.0, 20.0])
@pytest.mark.parametrize("size", [1, 5000])
def test_the_total_of_sums(norm_type: float, size: int) -> None:
    sums = torch.rand(2 * size, dtype=torch.float64, device=DEVICE)[::2] * 100
    for value in (3.0, 0.0, 1e-320, 1e300, math.inf, math.nan):
        sums[-1] = value
        for found, expected in zip(
            cuda.total(sums, norm_type), naive.total(sums, norm_type), strict=True
        ):
            assert found.shape == ()
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=0, equal_nan=True)
    zeros = cuda.total(torch.zeros(size, dtype=torch.float64, device=DEVICE), norm_type)
    assert [t.item() for t in zeros] == [0, 0]
    sums[0], sums[-1] = math.nan, math.inf
    assert cuda.total(sums, norm_type).norm.isnan() or size == 1


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
def test_roots_of_whole_powers_are_exact(norm_type: float) -> None:
    for base in (1, 3, 5, 7, 10, 64, 100, 999):
        power = torch.tensor([float(base**norm_type)], dtype=torch.float64, device=DEVICE)
        assert cuda.total(power, norm_type).norm == base


NUMBERS = [0.0, 1e-320, 0.3, 1.0, 7.0, 1e300, math.inf, math.nan, -1.0]


def test_coefficients_of_every_pair() -> None:
    """The bits of `naive`, with the limits on either device."""
    norms = torch.tensor(NUMBERS, dtype=torch.float64, device=DEVICE)
    every = torch.cartesian_prod(norms, norms)
    both = every[:, 0], every[:, 1]  # not contiguous
    torch.testing.assert_close(cuda.coefficients(*both), naive.coefficients(*both), **EXACT)
    for limit in NUMBERS:
        on_cpu = torch.tensor(limit, dtype=torch.float64, device="cpu")
        for some in (norms, norms[2], norms.view(3, 3), norms[:0], norms.repeat(300)):
            found = cuda.coefficients(some, on_cpu)
            assert found.shape == some.shape
            torch.testing.assert_close(found, naive.coefficients(some, on_cpu), **EXACT)


@pytest.fixture
def weak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "has_weak_float64", lambda index: True)


WEAK = 2.6e-7  # the largest error of a norm


def check_weak_sums(tensors: list[Tensor], norm_type: float) -> None:
    found, expected = cuda.power_sums(tensors, norm_type), naive.power_sums(tensors, norm_type)
    rtol = 0 if math.isinf(norm_type) else norm_type * WEAK
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.usefixtures("weak")
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_sums_where_float64_is_weak(norm_type: float) -> None:
    """Random; equal, whose roundings go to one side; of any magnitude; NaN and infinity."""
    check_weak_sums([*gradients([0, 1, 1500]), *gradients([CHUNK + 9])], norm_type)
    for value in (0.1, 1 / 3, 0.7, 1.9999999, 5793.6):
        equal = torch.full((CHUNK + 5,), value, device=DEVICE)
        check_weak_sums([equal.to(dtype) for dtype in DTYPES], norm_type)
    for value in (0.0, 1e-45, 1e-40, 1e-30, 1e-20, 1e30, 3e38, math.nan, math.inf, -math.inf):
        long = torch.full((CHUNK,), value, device=DEVICE)
        mixed = torch.tensor([value, 1.0, -value], device=DEVICE)
        one = torch.ones(CHUNK, device=DEVICE)
        one[77] = value
        check_weak_sums([long, long.bfloat16(), mixed, one, one.bfloat16(), one.half()], norm_type)


@pytest.mark.usefixtures("weak")
@pytest.mark.parametrize(("dtype", "rounds"), [(torch.float32, True), (torch.float64, False)])
def test_what_weak_float64_changes(dtype: torch.dtype, rounds: bool) -> None:
    """float32 elements are summed in float32, which shows; float64 elements never are."""
    tensors = [torch.full((CHUNK,), 0.1, device=DEVICE, dtype=dtype)]
    found, expected = cuda.power_sums(tensors, 2.0), naive.power_sums(tensors, 2.0)
    assert ((found / expected - 1).abs() > 1e-9).item() == rounds


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's calls are counted")
@pytest.mark.parametrize(
    ("value", "passes"),
    [
        (0.0, [(True, 2.0), (True, math.inf)]),
        (1.0, [(True, 2.0)]),
        (1e-30, [(True, 2.0), (True, math.inf), (False, 2.0)]),
        (1e-15, [(True, 2.0), (False, 2.0)]),
    ],
)
def test_zeros_are_not_read_in_float64(
    value: float, passes: list[tuple[bool, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only squares that float32 cannot hold are."""
    made: list[tuple[bool, float]] = []
    original: Any = cuda._triton._chunk_sum

    def counted(*args: Any) -> Any:
        fast, norm_type = (getattr(arg, "value", arg) for arg in args[4:6])
        made.append((fast, norm_type))
        return original(*args)

    monkeypatch.setattr(cuda._triton, "_chunk_sum", counted)
    tensor = torch.full((3000,), value).bfloat16()
    check_sums([tensor], 2.0)
    assert made == passes


@pytest.mark.parametrize("norm_type", [3.0, 4.0, 5.0, 6.0])
def test_whole_powers_by_products(norm_type: float) -> None:
    for tensor in gradients([1, 1500]):
        found = cuda.power_sums([tensor], norm_type)
        torch.testing.assert_close(found, naive.power_sums([tensor], norm_type), rtol=2e-15, atol=0)
        found = cuda.norms([tensor], norm_type)
        torch.testing.assert_close(found, naive.norms([tensor], norm_type), rtol=2e-15, atol=0)
