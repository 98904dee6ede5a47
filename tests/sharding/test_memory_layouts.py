"""Gradients whose elements do not lie in memory one by one: negated or conjugated by a bit of the
tensor, expanded, overlapping, or the gradient of several parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distclip
from distclip.sharding.local_tensors import has_overlap
from tests.support import reference
from tests.support.ranks import Ranks, mesh
from tests.support.tolerances import NORM, TOLERANCES

MAX_NORM = 0.5
LARGE = 70_000  # elements: the CPU backend sums so many in another way


def seeded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def complex_(*shape: int) -> Tensor:
    return seeded(*shape, dtype=torch.complex64)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "conjugated": lambda: complex_(6, 4).conj(),
    "conjugated, transposed": lambda: complex_(6, 4).mH,
    "conjugated, with gaps": lambda: complex_(6, 4).conj()[:, ::2],
    "conjugated, large": lambda: complex_(LARGE).conj(),
    "imaginary part of a conjugate": lambda: complex_(6, 4).conj().imag,
    "imaginary part of one number": lambda: complex_(1).conj().imag,
    "negated": lambda: torch._neg_view(seeded(6, 4)),
    "negated, float64": lambda: torch._neg_view(seeded(6, 4).double()),
    "negated, 16 bits": lambda: torch._neg_view(seeded(6, 4).bfloat16()),
    "negated, large": lambda: torch._neg_view(seeded(LARGE)),
    "negated and conjugated": lambda: torch._neg_view(complex_(6, 4).conj()),
    "dims of size 1": lambda: seeded(6, 4).as_strided((6, 1, 4), (4, 0, 1)),
}


SHARED: dict[str, Callable[[], Tensor]] = {
    "expanded": lambda: torch.full((1,), 3.0).expand(10, 10),
    "expanded in one dim": lambda: seeded(1, 7).expand(5, 7),
    "expanded in the last dim": lambda: seeded(5, 1).expand(5, 7),
    "expanded, large": lambda: seeded(7, 1).expand(7, LARGE),
    "expanded, 16 bits": lambda: seeded(5, 1).bfloat16().expand(5, 7),
    "expanded and conjugated": lambda: complex_(1, 4).conj().expand(6, 4),
    "overlapping windows": lambda: seeded(9).as_strided((6, 4), (1, 1)),
}


@pytest.fixture(params=LAYOUTS)
def grad(request: pytest.FixtureRequest) -> Tensor:
    return LAYOUTS[request.param]()


def beside(grad: Tensor) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Parameters that have `grad` and ordinary gradients, and what these are before."""
    grads = [seeded(5), grad, seeded(3, 2)]
    params = [nn.Parameter(torch.zeros(g.shape, dtype=g.dtype)) for g in grads]
    for param, each in zip(params, grads, strict=True):
        param.grad = each
    return params, [g.clone() for g in grads]


def check(params: list[nn.Parameter], wanted: list[Tensor]) -> None:
    for param, want in zip(params, wanted, strict=True):
        assert param.grad is not None
        tolerance = TOLERANCES[param.grad.dtype]
        torch.testing.assert_close(param.grad, want.to(param.grad.dtype), **tolerance)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, 8.0, math.inf])
@pytest.mark.parametrize("name", [*LAYOUTS, *SHARED])
def test_the_norm_counts_what_the_tensor_shows(name: str, norm_type: float) -> None:
    grad = {**LAYOUTS, **SHARED}[name]()
    expected = reference.total_norm([grad], norm_type)
    found = distclip.get_total_norm([grad], norm_type)
    torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grads_with_norm_", "clip_", "step"])
def test_one_limit_for_all(grad: Tensor, name: str) -> None:
    params, before = beside(grad)
    norm = reference.total_norm(before)
    assert norm > MAX_NORM
    if name == "clip_grad_norm_":
        found = distclip.clip_grad_norm_(params, MAX_NORM)
        torch.testing.assert_close(found.double(), norm, **NORM)
    elif name == "clip_grads_with_norm_":
        distclip.clip_grads_with_norm_(params, MAX_NORM, norm)
    else:
        clipper = distclip.Clipper(params, distclip.ClipNorm(MAX_NORM))
        optimizer = torch.optim.SGD(params, lr=1.0)
        clipper.clip_() if name == "clip_" else clipper.step(optimizer)
    eps = 0.0 if name in ("clip_", "step") else 1e-6
    wanted = reference.clip_norm(before, MAX_NORM, eps=eps)
    check(params, wanted)
    if name == "step":
        for param, want in zip(params, wanted, strict=True):
            torch.testing.assert_close(param.detach(), -want.to(param.dtype), rtol=4e-3, atol=0)


def test_a_limit_for_each_tensor(grad: Tensor) -> None:
    params, before = beside(grad)
    distclip.Clipper(params, distclip.ClipTensorNorm(MAX_NORM)).clip_()
    check(params, reference.clip_tensor_norm(before, MAX_NORM))


def test_a_limit_for_each_unit(grad: Tensor) -> None:
    if grad.is_complex():
        pytest.skip("the reference knows real units")
    params, before = beside(grad)
    weights = [param.detach() for param in params]
    distclip.Clipper(params, distclip.AGC(0.3)).clip_()
    check(params, reference.agc(weights, before, 0.3))


@pytest.mark.parametrize("name", ["clip_grad_value_", "clip_"])
def test_values(grad: Tensor, name: str) -> None:
    if grad.is_complex():
        pytest.skip("complex numbers have no order")
    params, before = beside(grad)
    if name == "clip_grad_value_":
        distclip.clip_grad_value_(params, 0.3)
    else:
        distclip.Clipper(params, distclip.ClipValue(0.3)).clip_()
    check(params, [g.clamp(-0.3, 0.3) for g in before])


@pytest.mark.parametrize("mode", ["skip", "zero", "propagate"])
def test_what_is_not_finite(grad: Tensor, mode: str) -> None:
    params, before = beside(grad)
    params[0].grad[0] = math.nan
    distclip.Clipper(params, on_nonfinite=mode).clip_()
    for param, was in zip(params[1:], before[1:], strict=True):
        want = {"skip": was, "zero": torch.zeros_like(was), "propagate": was * math.nan}[mode]
        torch.testing.assert_close(param.grad, want, rtol=0, atol=0, equal_nan=True)


def test_scale_and_a_second_step(grad: Tensor) -> None:
    """The second step finds what the first has put into `.grad`."""
    params, before = beside(grad)
    clipper = distclip.Clipper(params, distclip.ClipNorm(math.inf))
    clipper.clip_(scale=0.5)
    report = clipper.clip_(scale=0.5)
    expected = reference.total_norm(before) / 4
    torch.testing.assert_close(report.total_norm.double(), expected, rtol=4e-3, atol=0)
    check(params, [g * 0.25 for g in before])


def test_functions_out_of_place(grad: Tensor) -> None:
    before = grad.clone()
    norm = reference.total_norm([before])
    assert norm > 0.1
    clipped = distclip.functional.clip_by_norm(grad, 0.1)
    tolerance = TOLERANCES[grad.dtype]
    wanted = reference.clip_norm([before], 0.1)[0].to(grad.dtype)
    torch.testing.assert_close(clipped, wanted, **tolerance)
    (clipped, none), found = distclip.functional.clip_by_global_norm([grad, None], 0.1)
    torch.testing.assert_close(found.double(), norm, rtol=2e-7, atol=0)
    torch.testing.assert_close(clipped, wanted, **tolerance)
    assert none is None
    if grad.ndim > 1:
        clipped = distclip.functional.clip_by_norm(grad, 0.1, axes=[1])
        wanted = reference.clip_by_norm(before, 0.1, [1]).to(grad.dtype)
        torch.testing.assert_close(clipped, wanted, rtol=5e-3, atol=0)
    if not grad.is_complex():
        clipped = distclip.functional.clip_by_value(grad, -0.1, 0.2)
        torch.testing.assert_close(clipped, before.clamp(-0.1, 0.2), rtol=0, atol=0)
    torch.testing.assert_close(grad, before, rtol=0, atol=0)  # out of place


def test_whether_elements_share_memory() -> None:
    base = torch.zeros(4, 6, 8)
    for apart in (base, base.mT, base[:, ::2], base[1:1], base[0]):
        assert not has_overlap(apart)
    assert not has_overlap(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    assert not has_overlap(torch.zeros(1).expand(1, 1, 1))
    for shared in (torch.zeros(1).expand(2), base[:1].expand(3, 6, 8), base.unfold(2, 3, 1)):
        assert has_overlap(shared)


def test_what_lies_in_memory_is_scaled() -> None:
    """A buffer whose conjugate is the gradient."""
    buffer = complex_(6, 4)
    param = nn.Parameter(torch.zeros(6, 4, dtype=torch.complex64))
    param.grad = buffer.conj()
    before, kept = buffer.clone(), param.grad
    distclip.clip_grad_norm_(param, MAX_NORM)
    assert param.grad is kept
    assert param.grad.is_conj()
    wanted = reference.clip_norm([before], MAX_NORM, eps=1e-6)[0].to(torch.complex64)
    torch.testing.assert_close(buffer, wanted)


WRITING: dict[str, Callable[[list[nn.Parameter]], object]] = {
    "clip_grad_norm_": lambda params: distclip.clip_grad_norm_(params, 1e9),
    "clip_grad_value_": lambda params: distclip.clip_grad_value_(params, 1e-3),
    "clip_grads_with_norm_": lambda params: distclip.clip_grads_with_norm_(
        params, 1e-3, torch.tensor(1.0)
    ),
    "norm": lambda params: distclip.Clipper(params, distclip.ClipNorm(1e-3)).clip_(),
    "tensors": lambda params: distclip.Clipper(params, distclip.ClipTensorNorm(1e-3)).clip_(),
    "units": lambda params: distclip.Clipper(params, distclip.AGC()).clip_(),
    "statistics": lambda params: distclip.Clipper(params, distclip.ZClip()).clip_(),
    "zero": lambda params: distclip.Clipper(params, on_nonfinite="zero").clip_(),
    "overlap": lambda params: distclip.Clipper(params, overlap=True).clip_(),
    "step": lambda params: distclip.Clipper(params).step(torch.optim.SGD(params, lr=0.1)),
    "groups": lambda params: distclip.Clipper([{"params": [p]} for p in params]).clip_(),
}


@pytest.mark.parametrize("call", WRITING)
@pytest.mark.parametrize("name", SHARED)
def test_elements_that_share_memory_are_an_error_before_anything_is_written(
    name: str, call: str
) -> None:
    params, before = beside(SHARED[name]())
    if call == "clip_grad_value_" and params[1].is_complex():
        pytest.skip("complex numbers have no order")
    weights = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match="refers to a single memory location"):
        WRITING[call](params)
    for param, was, weight in zip(params, before, weights, strict=True):
        assert torch.equal(param.grad, was)
        assert torch.equal(param.detach(), weight)
    assert distclip.clip_grad_norm_(params, math.inf).isfinite()  # nothing is to be written
    params[1].grad = params[1].grad.contiguous()
    WRITING[call](params)


def shared_on_one_rank() -> str:
    """An error that one rank alone can see; the plain parameters are copies on a mesh."""
    import torch.distributed as dist

    one = mesh((4,), ("dp",))
    sharded = nn.Parameter(distribute_tensor(torch.zeros(8, 4), one, [Shard(0)]))
    local = torch.full((2, 4), 2.0)
    if dist.get_rank() == 2:
        local = torch.full((2, 1), 2.0).expand(2, 4)
    sharded.grad = DTensor.from_local(local, one, [Shard(0)], run_check=False)
    for call in ("clip_grad_norm_", "norm", "units"):
        with pytest.raises(ValueError, match="refers to a single memory location") as caught:
            WRITING[call]([sharded])
    assert bool((sharded.grad.to_local() == 2).all())
    return str(caught.value)


def test_elements_that_share_memory_on_one_rank(four_on_cpus: Ranks) -> None:
    assert len(set(four_on_cpus.run(shared_on_one_rank))) == 1


def test_a_gradient_from_a_function_that_shares_memory_is_an_error_before_anything_is_written() -> (
    None
):
    params, _ = beside(torch.ones(1).expand(10, 10))
    grads = {id(p): p.grad for p in params}
    kept = [g.clone() for g in grads.values()]
    clipper = distclip.Clipper(params, distclip.ClipNorm(MAX_NORM), gradient=lambda p: grads[id(p)])
    with pytest.raises(ValueError, match=r"'#1': elements of the gradient .* share memory"):
        clipper.clip_()
    assert all(map(torch.equal, grads.values(), kept))
    grads[id(params[1])] = complex_(10, 10).conj().imag
    before = [g.clone() for g in grads.values()]
    clipper.clip_()
    for found, want in zip(grads.values(), reference.clip_norm(before, MAX_NORM), strict=True):
        torch.testing.assert_close(found, want.float())


def test_memory_that_a_function_returns_for_two_parameters_is_an_error() -> None:
    params = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    grad = torch.full((3,), 4.0)
    clipper = distclip.Clipper(params, distclip.ClipNorm(MAX_NORM), gradient=lambda p: grad)
    with pytest.raises(ValueError, match="the gradient of several parameters"):
        clipper.clip_()
    assert torch.equal(grad, torch.full((3,), 4.0))


@pytest.mark.parametrize("shape", [(4, 3), (1, 4, 3), (12,)])
@pytest.mark.parametrize("policy", [distclip.ClipNorm(MAX_NORM), distclip.ClipTensorNorm(0.2)])
def test_memory_that_is_the_gradient_of_two_parameters(
    policy: distclip.ClipNorm, shape: tuple[int, ...]
) -> None:
    """torch multiplies it twice."""
    params = [nn.Parameter(torch.ones(each)) for each in ((4, 3), shape, (4, 3), (0, 3), (0,))]
    added = params[0] + params[1].view(4, 3)
    grads = torch.autograd.grad((added * seeded(4, 3)).sum(), params[:2])
    assert grads[0].data_ptr() == grads[1].data_ptr()
    for param in params[3:]:
        param.grad = torch.zeros_like(param)
    for param, grad in zip(params, grads, strict=False):
        param.grad = grad
    params[2].grad = seeded(4, 3) * 2
    before = [p.grad.clone() for p in params]
    distclip.Clipper(params, policy).clip_()
    if policy.scope is distclip.Scope.MODEL:
        check(params, reference.clip_norm(before, MAX_NORM))
    else:
        check(params, reference.clip_tensor_norm(before, 0.2))
    assert params[0].grad is not params[1].grad


def test_sparse_values() -> None:
    index = torch.tensor([[0, 2]])
    for values in (complex_(2).conj(), torch._neg_view(seeded(2))):
        param = nn.Parameter(torch.zeros(3, dtype=values.dtype))
        param.grad = torch.sparse_coo_tensor(
            index, values, (3,), is_coalesced=True, check_invariants=False
        )
        before = param.grad.to_dense().clone()
        found = distclip.clip_grad_norm_(param, MAX_NORM)
        torch.testing.assert_close(found.double(), reference.total_norm([before]), **NORM)
        wanted = reference.clip_norm([before], MAX_NORM, eps=1e-6)[0]
        torch.testing.assert_close(param.grad.to_dense(), wanted.to(values.dtype))


LOCAL: dict[str, Callable[[], Tensor]] = {
    "conjugated": lambda: complex_(8, 4).conj(),
    "negated": lambda: torch._neg_view(seeded(8, 4)),
}


def clip_dtensors(name: str, kind: str) -> None:
    """The local tensor has the bit, or shares memory; in FSDP2's layout and in one to be summed."""
    one = mesh((4,), ("dp",))
    local = LOCAL[name]()
    placement = {"sharded": Shard(0), "partial": Partial(), "moved": Shard(1)}[kind]
    grad = DTensor.from_local(local, one, [placement], run_check=False)
    whole = grad.clone().full_tensor() if kind != "partial" else local.clone() * 4
    wanted_placement = Replicate() if kind == "partial" else Shard(0)
    zeros = torch.zeros(whole.shape, dtype=whole.dtype)
    param = nn.Parameter(distribute_tensor(zeros, one, [wanted_placement]))
    if kind == "sharded":
        grad._spec = param._spec  # as FSDP2 makes it
    param.grad = grad
    plain = nn.Parameter(torch.zeros(3))
    plain.grad = seeded(3)
    before = [whole, plain.grad.clone()]
    found = distclip.clip_grad_norm_([param, plain], MAX_NORM)
    torch.testing.assert_close(found.double(), reference.total_norm(before), **NORM)
    wanted = reference.clip_norm(before, MAX_NORM, eps=1e-6)
    assert type(param.grad) is DTensor
    assert param.grad.placements == param.placements
    torch.testing.assert_close(
        param.grad.clone().full_tensor(), wanted[0].to(whole.dtype), rtol=2e-6, atol=1e-9
    )
    torch.testing.assert_close(plain.grad, wanted[1].float())


@pytest.mark.parametrize("kind", ["sharded", "partial", "moved"])
@pytest.mark.parametrize("name", LOCAL)
def test_dtensors(four_ranks: Ranks, name: str, kind: str) -> None:
    four_ranks.run(clip_dtensors, name, kind)
