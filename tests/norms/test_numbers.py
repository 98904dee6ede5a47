"""The norm is right whenever a float32 can hold it, whatever the dtype, the size and the power; and
a float64 where all gradients are float64.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import distclip
from tests.support import reference
from tests.support.ranks import Ranks, mesh, same_bits_everywhere
from tests.support.tolerances import NORM


def norm_of(*grads: Tensor, norm_type: float = 2.0) -> Tensor:
    return distclip.get_total_norm(grads, norm_type).double()


@pytest.mark.parametrize(
    "norm_type", [0.5, 1.0, 1.5, 2.0, 3.0, 6.0, 6.5, 8.0, 30.0, 1000.0, math.inf]
)
@pytest.mark.parametrize("value", [1e-38, 1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_norm_of_any_magnitude(value: float, norm_type: float) -> None:
    grad = torch.full((2000,), value)
    expected = reference.total_norm([grad], norm_type)
    if expected > torch.finfo(torch.float32).max:
        pytest.skip("the true norm is no float32")
    torch.testing.assert_close(norm_of(grad, norm_type=norm_type), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 8.0, math.inf])
@pytest.mark.parametrize("beside", [0.0, 1.0, math.inf])
def test_a_nan_is_a_nan(norm_type: float, beside: float) -> None:
    """Under a maximum too, and beside an infinity."""
    for grads in ([math.nan, beside], [beside, math.nan]):
        norm = norm_of(*map(torch.tensor, grads), norm_type=norm_type)
        assert norm.isnan(), grads
    assert norm_of(torch.tensor([beside, math.nan]), norm_type=norm_type).isnan()


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 8.0, 50.0])
def test_norm_over_many_magnitudes(norm_type: float) -> None:
    grads = [torch.full((3,), 10.0**k) for k in range(-36, 37, 6)]
    expected = reference.total_norm(grads, norm_type)
    torch.testing.assert_close(norm_of(*grads, norm_type=norm_type), expected, **NORM)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_gradients_are_measured_as_exactly_as_float32(dtype: torch.dtype) -> None:
    grads = [torch.full((1000,), 3000.0).to(dtype), torch.randn(3000, 64).to(dtype)]
    expected = reference.total_norm(grads)
    assert expected > 65504
    torch.testing.assert_close(norm_of(*grads), expected, **NORM)


def test_sixteen_bit_gradients_whose_norm_overflows_their_dtype_are_clipped_not_zeroed() -> None:
    param = nn.Parameter(torch.zeros(1000, dtype=torch.float16))
    param.grad = torch.full((1000,), 3000.0, dtype=torch.float16)
    distclip.clip_grad_norm_(param, 1.0)
    torch.testing.assert_close(
        param.grad.double(), torch.full((1000,), 1000**-0.5).double(), rtol=1e-3, atol=0
    )


def test_fifty_million_elements() -> None:
    grad = torch.randn(50_000_000, generator=torch.Generator().manual_seed(0))
    expected = (
        torch.stack([chunk.double().square().sum() for chunk in grad.split(1 << 20)]).sum().sqrt()
    )
    torch.testing.assert_close(norm_of(grad), expected, rtol=1e-7, atol=0)


def test_layouts_of_memory() -> None:
    base = torch.randn(6, 8, 4)
    for view in (
        base.transpose(0, 2),
        base[:, ::2],
        base[1:1],
        base[..., 0],
        base.permute(1, 0, 2)[2:],
    ):
        param = nn.Parameter(torch.zeros(view.shape))
        param.grad = (
            view.clone(memory_format=torch.preserve_format) if view.is_contiguous() else view
        )
        kept = view.clone()
        norm = distclip.clip_grad_norm_(param, 0.1)
        torch.testing.assert_close(norm.double(), reference.total_norm([kept]), **NORM)
        torch.testing.assert_close(param.grad, kept * min(1.0, 0.1 / (norm.item() + 1e-6)))


def test_gradients_that_are_finite_but_whose_norm_no_float32_holds_are_clipped_all_the_same() -> (
    None
):
    param = nn.Parameter(torch.zeros(4))
    param.grad = torch.full((4,), 3e38)
    norm = distclip.clip_grad_norm_(param, 1.0)
    assert norm.isposinf()
    torch.testing.assert_close(param.grad, torch.full((4,), 0.5))


SMALL_COEFFICIENTS = {
    "clip_grad_norm_": lambda params, limit, scale: distclip.clip_grad_norm_(params, limit),
    "clip_grads_with_norm_": lambda params, limit, scale: distclip.clip_grads_with_norm_(
        params, limit, distclip.get_total_norm([p.grad for p in params])
    ),
    "ClipNorm": lambda params, limit, scale: distclip.Clipper(
        params, distclip.ClipNorm(limit)
    ).clip_(),
    "ClipTensorNorm": lambda params, limit, scale: distclip.Clipper(
        params, distclip.ClipTensorNorm(limit / 2**0.5)
    ).clip_(),
    "AGC": lambda params, limit, scale: distclip.Clipper(
        params, distclip.AGC(limit / 2**0.5, eps=1.0)
    ).clip_(),
    "scale": lambda params, limit, scale: distclip.Clipper(
        params, distclip.ClipNorm(math.inf)
    ).clip_(scale=scale),
    "scale of values": lambda params, limit, scale: distclip.Clipper(
        params, distclip.ClipValue(1.0)
    ).clip_(scale=scale),
}


LONG = {  # Numba's loops begin at 2**22 elements of float32 and 2**20 of 16 bits
    torch.float32: (1 << 20, 4),
    torch.bfloat16: (1 << 18, 4),
    torch.float64: (1 << 16, 4),
    torch.complex64: (1 << 16, 4),
}


@pytest.mark.parametrize(
    ("dtype", "shape"), [*((dtype, (4,)) for dtype in LONG), *LONG.items()], ids=str
)
@pytest.mark.parametrize("name", SMALL_COEFFICIENTS)
def test_coefficients_that_are_no_normal_float32(
    name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """A float32 coefficient of 1e-50 is zero, and one of 1e-41 has lost most of its digits."""
    if dtype.is_complex and name in ("AGC", "scale of values"):
        pytest.skip("complex numbers have no order")
    if name == "AGC":
        shape = (1, math.prod(shape))  # one unit
    for value, limit in ((1e24, 1e-26), (1e20, 1e-21)):
        params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for _ in range(2)]
        for param in params:
            param.grad = torch.full_like(param, value)
        before = params[0].grad.flatten()[:1].clone().to(torch.promote_types(dtype, torch.float64))
        norm = before.abs().item() * (2 * math.prod(shape)) ** 0.5
        SMALL_COEFFICIENTS[name](params, limit, limit / norm)
        wanted = (before * (limit / norm)).to(dtype)
        for param in params:
            found = param.grad.flatten()
            assert bool((found == found[0]).all())
            rtol = 8e-3 if dtype is torch.bfloat16 else 3e-7
            torch.testing.assert_close(found[:1], wanted, rtol=rtol, atol=0)


def test_functions_out_of_place_with_small_coefficients() -> None:
    tensor = torch.full((2, 2), 1e24)
    wanted = torch.full((2, 2), 5e-27)
    clip = distclip.functional
    for found in (
        clip.clip_by_norm(tensor, 1e-26),
        clip.clip_by_norm(tensor, 1e-26, axes=[0, 1]),
        clip.clip_by_global_norm([tensor], 1e-26)[0][0],
        clip.clip_by_global_norm([tensor], 1e-26, use_norm=2e24)[0][0],
    ):
        torch.testing.assert_close(found, wanted, rtol=3e-7, atol=0)


WIDE = {"rtol": 5e-14, "atol": 0.0}  # of a norm in float64: some roundings


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("norm_type", [0.5, 1.0, 1.5, 2.0, 3.5, 6.0, 8.0, 30.0, math.inf])
@pytest.mark.parametrize("value", [1e-300, 1e-200, 1e-20, 1.0, 1e39, 1e150, 1e200, 1e290])
def test_float64_norms_of_any_magnitude(value: float, norm_type: float, dtype: torch.dtype) -> None:
    """torch's squares of 1e200 overflow."""
    grads = [torch.full((2000,), value, dtype=dtype), torch.full((3,), value * 5, dtype=dtype)]
    expected = reference.total_norm(grads, norm_type)
    found = distclip.get_total_norm(grads, norm_type, error_if_nonfinite=True)
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, expected, **WIDE)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, 8.0, math.inf])
def test_float64_norms_over_many_magnitudes(norm_type: float) -> None:
    grads = [torch.full((3,), 10.0**k, dtype=torch.float64) for k in range(-300, 301, 50)]
    for some in (
        grads,
        grads[:7],
        grads[6:7],
        [torch.zeros_like(grads[0])],
        [*grads, grads[0][:0]],
    ):
        expected = reference.total_norm(some, norm_type)
        torch.testing.assert_close(distclip.get_total_norm(some, norm_type), expected, **WIDE)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 8.0, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_float64_norms_that_are_not_finite(bad: float, norm_type: float) -> None:
    grads = [torch.tensor(each, dtype=torch.float64) for each in ([1e200] * 3, [1.0, bad])]
    norm = distclip.get_total_norm(grads, norm_type)
    assert norm.isnan() if math.isnan(bad) else norm.isposinf()
    with pytest.raises(RuntimeError, match="non-finite"):
        distclip.get_total_norm(grads, norm_type, error_if_nonfinite=True)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([torch.float64], torch.float64),
        ([torch.complex128], torch.float64),
        ([torch.float32], torch.float32),
        ([torch.bfloat16, torch.float64], torch.float32),
        ([torch.complex64], torch.float32),
    ],
)
def test_the_dtype_of_the_norm(others: list[torch.dtype], expected: torch.dtype) -> None:
    """That of the narrowest gradient, and never less than float32."""
    params = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in [torch.float64, *others]]
    for param in params:
        param.grad = torch.ones_like(param)
    report = distclip.Clipper(params, distclip.ClipNorm(1e-3)).clip_()
    found = [report.total_norm, report.limit, report.coefficient, *report.norms.values()]
    assert {each.dtype for each in found} == {expected}
    assert distclip.clip_grad_norm_(params, 1e-6).dtype is expected
    assert distclip.get_total_norm([p.grad for p in params]).dtype is expected
    assert distclip.functional.clip_by_global_norm([p.grad for p in params], 1)[1].dtype is expected
    assert distclip.clip_grad_norm_([], 1.0).dtype is torch.float32


@pytest.mark.parametrize("value", [1e200, 1e-200, 1e39, 1.0])
@pytest.mark.parametrize(
    "policy", [distclip.ClipNorm, distclip.ClipTensorNorm, distclip.ClipBlockRMS, distclip.AGC]
)
def test_float64_gradients_are_clipped(value: float, policy: type) -> None:
    limit = value / 100
    wide = {"dtype": torch.float64}
    params = [nn.Parameter(torch.full((n, 5), value, **wide)) for n in (3, 4)]
    for param in params:
        param.grad = torch.full_like(param, 3 * value)
    grads, weights = [p.grad.clone() for p in params], [p.detach().clone() for p in params]
    chosen = policy(0.01, eps=0.0) if policy is distclip.AGC else policy(limit)
    report = distclip.Clipper(params, chosen, on_nonfinite="raise").clip_()
    assert bool(report.finite)
    assert bool(report.clipped)
    wanted = [g / value for g in grads]
    unit = [w / value for w in weights]
    wanted = {
        distclip.ClipNorm: lambda: reference.clip_norm(wanted, 0.01),
        distclip.ClipTensorNorm: lambda: reference.clip_tensor_norm(wanted, 0.01),
        distclip.ClipBlockRMS: lambda: reference.clip_block_rms(wanted, 0.01),
        distclip.AGC: lambda: reference.agc(unit, wanted, 0.01, eps=0.0),
    }[policy]()
    for param, want in zip(params, wanted, strict=True):
        torch.testing.assert_close(param.grad, want * value, **WIDE)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("how", ["step", "attach"])
def test_fused_optimizers_take_no_float64_factor(how: str, fused: bool) -> None:
    """Their factor is float32, in which 1e-200 is zero."""
    param = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    param.grad = torch.full_like(param, 1e200)
    optimizer = torch.optim.SGD([param], lr=1.0, fused=fused)
    clipper = distclip.Clipper([param], distclip.ClipNorm(1.0))
    if how == "step":
        clipper.step(optimizer)
    else:
        clipper.attach(optimizer)
        optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((4,), -0.5).double(), **WIDE)


def float64_on_ranks(value: float, norm_type: float) -> None:
    one = mesh((4,), ("dp",))
    wholes = [torch.full((n, 3), value, dtype=torch.float64) for n in (2, 5, 64)]
    params = [nn.Parameter(distribute_tensor(torch.zeros_like(w), one, [Shard(0)])) for w in wholes]
    for param, whole in zip(params, wholes, strict=True):
        param.grad = distribute_tensor(whole, one, [Shard(0)])
    norm = distclip.clip_grad_norm_(params, value, norm_type, error_if_nonfinite=True)
    assert norm.dtype is torch.float64
    assert same_bits_everywhere(norm)
    torch.testing.assert_close(norm, reference.total_norm(wholes, norm_type), **WIDE)
    wanted = reference.clip_norm([w / value for w in wholes], 1.0, norm_type)
    for param, want in zip(params, wanted, strict=True):
        found = param.grad.full_tensor() / value
        torch.testing.assert_close(found, want, rtol=1e-14 + 1e-6 / value, atol=0)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 8.0, math.inf])
def test_float64_norms_on_ranks(four_ranks: Ranks, norm_type: float) -> None:
    four_ranks.run(float64_on_ranks, 1e200, norm_type)


def stages_of_two_dtypes() -> None:
    """A pipeline: the other stage holds float32. The sums of all ranks have one size."""
    two = mesh((2, 2), ("pp", "dp"))
    dtype = (torch.float64, torch.float32)[two.get_local_rank("pp")]
    param = nn.Parameter(distribute_tensor(torch.zeros(6, dtype=dtype), two["dp"], [Shard(0)]))
    param.grad = distribute_tensor(torch.full((6,), 2.0, dtype=dtype), two["dp"], [Shard(0)])
    norm = distclip.clip_grad_norm_([param], 1.0, mesh=two)
    assert norm.dtype is torch.float32
    assert same_bits_everywhere(norm)
    torch.testing.assert_close(norm.double(), torch.tensor(48.0).double().sqrt(), **NORM)


def test_stages_of_two_dtypes(four_ranks: Ranks) -> None:
    four_ranks.run(stages_of_two_dtypes)


def norms_by_number_of_ranks(norm_type: float) -> list[float]:
    """The same gradients, whole, and sharded over 2 and 4 ranks; on every rank that took part."""
    wholes = [
        torch.randn(n, 7, generator=torch.Generator().manual_seed(n)) * 10.0**e
        for n, e in ((5, 0), (64, -3))
    ]
    norms = [distclip.get_total_norm(wholes, norm_type)]
    for size in (2, 4):
        for dim in (0, 1):
            few = DeviceMesh("cpu", list(range(size)))  # all ranks make it, the first few use it
            if dist.get_rank() < size:
                shards = [
                    distribute_tensor(w.clone(), few, [Shard(dim)], src_data_rank=None)
                    for w in wholes
                ]
                norms.append(distclip.get_total_norm(shards, norm_type))
    return [norm.item() for norm in norms]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, 8.0, math.inf])
def test_the_norm_is_the_same_on_1_2_and_4_ranks(four_ranks: Ranks, norm_type: float) -> None:
    if four_ranks.device != "cpu":
        pytest.skip("the number of ranks matters, not the device")
    norms = torch.tensor(four_ranks.run(norms_by_number_of_ranks, norm_type)[0])
    assert len(norms) == 5
    ulp = torch.nextafter(norms[0], torch.tensor(math.inf)) - norms[0]
    assert (norms - norms[0]).abs().max() <= ulp
