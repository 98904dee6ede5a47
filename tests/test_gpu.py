"""What only a GPU can show: no synchronisation, CUDA graphs, few launches, tensors beyond 2**31
elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import distclip
from distclip import kernels
from distclip.kernels import naive as loops
from distclip.kernels import tensor_table as tables
from tests.support import reference
from tests.support.tolerances import NORM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
KERNELS = ("partial_sums", "partial_norms", "finish", "rewrite")


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 9, dtype=torch.bfloat16)).cuda()
    for param in layers.parameters():
        param.grad = torch.randn_like(param)
    return layers


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def warm() -> distclip.Clipper:
    clipper = distclip.Clipper(model(), distclip.ClipNorm(0.5))
    clipper.clip_()
    return clipper


def test_no_call_waits_for_the_device(warm: distclip.Clipper) -> None:
    """Neither where addresses stay nor where they change."""
    for param in warm.plan.params[0].param, warm.plan.params[-1].param:
        param.grad = torch.ones_like(param)
    with no_sync():
        warm.clip_()
        warm.clip_()


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, 8.0, torch.inf])
@pytest.mark.parametrize("on_nonfinite", ["propagate", "zero"])
def test_at_most_four_launches(norm_type: float, on_nonfinite: str) -> None:
    clipper = distclip.Clipper(
        model(), distclip.ClipNorm(0.5, norm_type), on_nonfinite=on_nonfinite
    )
    clipper.clip_()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        clipper.clip_()
        torch.cuda.synchronize()
    launches = [
        event for event in found.events() if any(event.name.startswith(name) for name in KERNELS)
    ]
    assert 3 <= len(launches) <= 4


@pytest.mark.parametrize("new_addresses", [False, True])
def test_captured_in_a_graph(new_addresses: bool, warm: distclip.Clipper) -> None:
    params = [held.param for held in warm.plan.params]
    if new_addresses:
        for param in params:
            param.grad = torch.zeros_like(param)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        warm.clip_()
    junk = [
        torch.full((1000,), 7, device="cuda") for _ in range(100)
    ]  # whatever was freed is overwritten
    for seed in (1, 2):
        torch.manual_seed(seed)
        for param in params:
            param.grad.copy_(torch.randn_like(param))
        expected = reference.total_norm([param.grad.clone() for param in params])
        assert expected > 0.5
        graph.replay()
        clipped = reference.total_norm([param.grad for param in params])
        torch.testing.assert_close(
            clipped.cpu().double(), torch.tensor(0.5).double(), rtol=2e-3, atol=0
        )
    assert len(junk) == 100


def test_beyond_two_to_the_31_elements() -> None:
    size = 2**31 + 5000
    try:
        grad = torch.ones(size, dtype=torch.bfloat16, device="cuda")
    except torch.OutOfMemoryError:
        pytest.skip("needs 4.3 GB")
    grad[-1] = 256
    half = torch.tensor(0.5, dtype=torch.float64, device="cuda")
    sums = kernels.power_sums([grad], 2.0)
    assert sums.item() == size - 1 + 256**2
    kernels.scale_([grad], half)
    assert grad[-1] == 128
    assert kernels.power_sums([grad], torch.inf).item() == 128
    assert (grad[:-1] == 0.5).all()


def test_the_same_bits_every_time() -> None:
    grads = [
        torch.randn(1_000_003, device="cuda").bfloat16(),
        torch.randn(5_000_000, device="cuda"),
    ]
    first = kernels.power_sums(grads, 2.0)
    assert all(torch.equal(kernels.power_sums(grads, 2.0), first) for _ in range(20))
    expected = loops.power_sums(grads, 2.0)
    torch.testing.assert_close(first.sqrt(), expected.sqrt(), **NORM)


def test_streams_share_a_table() -> None:
    grads = [torch.randn(1000, device="cuda")]
    first = tables.table(grads)
    expected = kernels.power_sums(grads, 2.0)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert tables.table(grads) is first
        found = kernels.power_sums(grads, 2.0)
    torch.cuda.synchronize()
    assert torch.equal(found, expected)
