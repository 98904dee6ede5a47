"""The Triton kernels of units against `naive`: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip import kernels
from distclip.kernels import naive, unit_table
from distclip.kernels.unit_table import BROAD, LONG, MEDIUM, NARROW, SHORT
from tests.support.tolerances import NORM
from tests.support.triton_launches import wrap_launches

triton = pytest.importorskip("triton")
cuda_units = pytest.importorskip("distclip.kernels.cuda_units")
cuda = pytest.importorskip("distclip.kernels.cuda")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
# By shape and dim: the tile, and whether several programs read a unit.
SHAPES: dict[tuple[tuple[int, ...], int | None], tuple[unit_table.Tile, bool]] = {
    ((5, 7), 0): (SHORT, False),
    ((70, 16), 0): (SHORT, False),
    ((9, 4, 3, 3), 0): (SHORT, False),
    ((6, 700), 0): (MEDIUM, False),
    ((3, 1030), 0): (MEDIUM, False),
    ((2, 5000), 0): (LONG, False),
    ((2, 33000), 0): (LONG, True),
    ((40001,), None): (LONG, True),
    ((3, 5), None): (SHORT, False),
    ((), None): (SHORT, False),
    ((9,), 0): (SHORT, False),
    ((40, 8), 1): (NARROW, False),
    ((4100, 3), -1): (NARROW, True),
    ((30, 100), 1): (BROAD, False),
    ((520, 19), 1): (BROAD, True),
    ((2, 3, 24), 2): (BROAD, False),
}


@pytest.fixture(autouse=True, scope="module")
def _as_on_a_device() -> Iterator[None]:
    """The interpreter computes with numpy, which warns where a device does not."""
    with np.errstate(all="ignore"):
        yield


def tensors(
    dtype: torch.dtype, seed: int = 0, device: str = DEVICE
) -> tuple[list[Tensor], list[int | None]]:
    """Of all shapes; not aligned; in other orders of dims; empty; with gaps."""
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    found = [made(*shape) for shape, _ in SHAPES]
    dims = [dim for _, dim in SHAPES]
    found += [made(8 * 24 + 1)[1:].view(8, 24), made(40, 6).t(), made(4, 8, 3, 3).transpose(0, 1)]
    found += [made(0, 3), made(3, 0), made(12, 40)[:, ::3], made(12, 40)[:, :32], made(3, 4, 5)]
    return found, [*dims, 0, 0, 0, 0, 0, 0, 0, 1]


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, norm_type: float) -> None:
    """Sums of a few squares of 16 bits are float32."""
    rtol = 1e-7 if dtype.itemsize == 2 and norm_type in (1, 2) else 1e-12
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_shapes_are_covered(shape: tuple[int, ...], dim: int | None) -> None:
    tensor = torch.ones(shape, device=DEVICE)
    tile, split = SHAPES[shape, dim]
    table = unit_table.unit_table([tensor], [dim])
    assert [launch.tile for launch in table.launches] == [tile]
    assert (len(table.split) > 0) is split


def test_what_a_table_cannot_hold() -> None:
    found, dims = tensors(torch.float32)
    found += [torch.ones(3, 4, dtype=torch.complex64), torch.ones(1, 5).expand(3, 5)]
    table = unit_table.unit_table(found, [*dims, 0, 0])
    others = [found[i].shape for i in table.others]
    assert others == [(8, 4, 3, 3), (12, 14), (3, 4, 5), (3, 4)]


@pytest.mark.parametrize(
    ("dtype", "norm_type"),
    [
        *itertools.product(unit_table.DTYPES, [2.0, math.inf]),
        *itertools.product([torch.bfloat16, torch.float32], [0.5, 1.0]),
    ],
)
def test_sums(dtype: torch.dtype, norm_type: float) -> None:
    found, dims = tensors(dtype)
    sums = cuda_units.unit_power_sums(found, dims, norm_type)
    close(sums, naive.unit_power_sums(found, dims, norm_type), dtype, norm_type)


@pytest.mark.parametrize(
    ("dtype", "norm_type"),
    [(torch.bfloat16, 20.0), (torch.float32, 300.0), (torch.float64, 2.0), (torch.half, math.inf)],
)
def test_norms_whose_powers_have_no_float64(dtype: torch.dtype, norm_type: float) -> None:
    """Each chunk has its own maximum, here far below or far above that of its unit."""
    found, dims = tensors(dtype)
    rising = torch.linspace(1e-3, 50, 33_000)
    found, dims = [*found, torch.stack([rising, rising.flip(0)]).to(DEVICE, dtype)], [*dims, 0]
    norms = cuda_units.unit_norms(found, dims, norm_type)
    close(norms, naive.unit_norms(found, dims, norm_type), torch.float64, norm_type)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_and_infinity(dtype: torch.dtype) -> None:
    """In one unit of each tensor, beside one another too: NaN where the other dtype has -inf."""
    found, dims = tensors(dtype)
    for i, tensor in enumerate(found):
        if tensor.numel() > 3:
            has_nan = i % 2 == (dtype is torch.float32)
            tensor[(0,) * tensor.ndim] = math.nan if has_nan else -math.inf
            tensor[(-1,) * tensor.ndim] = math.inf
    for norm_type in (2.0, math.inf):
        sums = cuda_units.unit_power_sums(found, dims, norm_type)
        close(sums, naive.unit_power_sums(found, dims, norm_type), dtype, norm_type)
    norms = cuda_units.unit_norms(found, dims, 8.0)
    close(norms, naive.unit_norms(found, dims, 8.0), dtype, 8.0)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *[(torch.bfloat16, value) for value in (0.0, 1e-30, 3e38)],
        (torch.float16, 1e-7),
        (torch.float32, 1e30),
    ],
)
def test_units_of_any_magnitude(dtype: torch.dtype, value: float) -> None:
    """Beside units of another magnitude, which one program reads as well."""
    found = [torch.randn(6, 700), torch.randn(40, 24), torch.randn(2, 5000)]
    found = [t.to(DEVICE, dtype) for t in found] + [torch.randn(24, 40).to(DEVICE, dtype).t()]
    for tensor in found:
        tensor[1] = value
    dims = [0] * len(found)
    for norm_type in (1.0, 2.0):
        sums = cuda_units.unit_power_sums(found, dims, norm_type)
        close(sums, naive.unit_power_sums(found, dims, norm_type), dtype, norm_type)


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("dtype", unit_table.DTYPES)
def test_scaled_as_by_naive(dtype: torch.dtype, tiny: bool) -> None:
    """The same bits, and no element beside the tensors."""
    found, dims = tensors(dtype)
    expected, _ = tensors(dtype, device="cpu")
    if tiny:
        for tensor in [*found, *expected]:
            tensor.mul_(6e4 if dtype is torch.float16 else 6e37)
    num_units = sum(1 if dim is None else t.shape[dim] for t, dim in zip(found, dims, strict=True))
    coefficients = torch.rand(num_units, dtype=torch.float64).to(DEVICE)
    coefficients[::3], coefficients[1], coefficients[2] = 1, 0, math.nan
    if tiny:
        coefficients[1::5] = -3e-40
    cuda_units.scale_units_(found, dims, coefficients)
    naive.scale_units_(expected, dims, coefficients.cpu())
    # What no table can hold is left to `naive`, which on a GPU rounds factors below 1e-38.
    others = set(unit_table.unit_table(found, dims).others) if DEVICE == "cuda" and tiny else set()
    for i, (tensor, other) in enumerate(zip(found, expected, strict=True)):
        near = dict(EXACT, rtol=1e-5) if i in others else EXACT
        torch.testing.assert_close(tensor.cpu(), other, **near)
        if tensor._base is not None:
            assert other._base is not None
            torch.testing.assert_close(tensor._base.cpu(), other._base, **near)


@pytest.mark.parametrize("shape", [(9, 24), (9, 700), (2, 5000), (24, 9), (500, 3), (40, 33)])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_coefficient_of_one_changes_no_bit(shape: tuple[int, int], dim: int) -> None:
    """A product with any factor would make a signalling NaN a quiet one."""
    values = torch.full(shape, 0x7F81, dtype=torch.int16, device=DEVICE)
    coefficients = torch.ones(shape[dim], dtype=torch.float64, device=DEVICE)
    coefficients[1] = 0.5
    cuda_units.scale_units_([values.view(torch.bfloat16)], [dim], coefficients)
    of_units = values.movedim(dim, 0)
    assert (of_units[1] != 0x7F81).all()
    assert (of_units[0] == 0x7F81).all()
    assert (of_units[2:] == 0x7F81).all()


def test_a_write_moves_the_version_of_a_tensor() -> None:
    x = torch.ones(3, 4, device=DEVICE, requires_grad=True)
    y = x.exp()
    z = y.square()
    half = torch.full((3,), 0.5, dtype=torch.float64, device=DEVICE)
    cuda_units.scale_units_([y.detach()], [0], half)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_tables_are_kept_and_keep_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[Tensor] = []
    upload = unit_table.upload
    monkeypatch.setattr(
        unit_table, "upload", lambda host, device: uploads.append(host) or upload(host, device)
    )
    found = [torch.randn(40, 50, device=DEVICE), torch.randn(9, device=DEVICE)]
    for _ in range(3):
        cuda_units.unit_power_sums(found, [0, None], 2.0)
    assert len(uploads) == 1
    # The same memory with other units.
    sums = cuda_units.unit_power_sums([found[0].view(50, 40), found[1]], [0, None], 2.0)
    expected = naive.unit_power_sums([found[0].view(50, 40), found[1]], [0, None], 2.0)
    torch.testing.assert_close(sums, expected)
    cuda_units.unit_power_sums(found, [1, None], 2.0)
    assert len(uploads) == 3


def test_no_tensors() -> None:
    assert cuda_units.unit_power_sums([], [], 2.0).shape == (0,)
    assert cuda_units.unit_norms([], [], 8.0).shape == (0,)
    cuda_units.scale_units_([], [], torch.ones(0, dtype=torch.float64))
    cuda_units.prepare_units([], [], 2.0)


KERNELS = ("partial_sums", "partial_norms", "finish", "finish_norms", "scale")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[object, ...]]]:
    """The kernels that are launched, with their compile-time arguments."""
    launches: list[tuple[str, tuple[object, ...]]] = []

    def noted(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> None:
            if name in KERNELS:
                launches.append((name, tuple(a for a in args if not isinstance(a, Tensor))))
            launch(*args, **options)

        return run

    wrap_launches(noted, monkeypatch.setattr)
    return launches


@pytest.mark.parametrize("norm_type", [2.0, 8.0])
def test_a_plan_compiles_what_its_steps_call(
    launched: list[tuple[str, tuple[object, ...]]], norm_type: float
) -> None:
    found = [torch.randn(5, 7).bfloat16().to(DEVICE), torch.randn(520, 19).to(DEVICE)]
    dims = [0, 1]
    before = [t.clone() for t in found]
    cuda_units.prepare_units(found, dims, norm_type)
    prepared = set(launched)
    launched.clear()
    assert all(map(torch.equal, found, before))
    sums = cuda_units.unit_power_sums(found, dims, norm_type)
    if norm_type == 8:
        cuda_units.unit_norms(found, dims, norm_type)
    cuda_units.scale_units_(found, dims, torch.ones_like(sums))
    assert launched
    assert set(launched) <= prepared


@pytest.mark.parametrize(
    "policy",
    [distclip.AGC(0.01), distclip.AGC(0.01, unit_dim=-1), distclip.AGC(0.01, norm_type=8.0)],
    ids=repr,
)
def test_a_call_takes_one_launch_for_each_shape_of_units(
    policy: distclip.Policy,
    launched: list[tuple[str, tuple[object, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def made() -> nn.ModuleList:
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Linear(12, 9) for _ in range(10)).to(DEVICE)
        for param in layers.parameters():
            param.grad = torch.randn_like(param)
        return layers

    plain, by_triton = made(), made()
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
    numbers = "partial_norms" if policy.norm_type == 8 else "partial_sums"
    shapes = 2 if policy.unit_dim else 1  # columns beside the biases, which are rows
    assert Counter(name for name, _ in launched) == {numbers: 2 * shapes, "scale": shapes}
