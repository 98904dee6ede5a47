"""What only a GPU can show: no host waits, CUDA graphs, few launches, one device of several,
tensors beyond 2**31 elements.

`python -m benchmarks.gpu` checks more, and measures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import distclip
from benchmarks.gpu_checks import policies
from benchmarks.gpu_device import Session
from distclip import kernels
from distclip.kernels import naive as loops
from distclip.kernels import tensor_table as tables
from tests.support import reference
from tests.support.tolerances import NORM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
# Of one call, torch's too, for any number of tensors of one dtype.
MOST_LAUNCHES, MOST_OF_SCALED_NORMS = 5, 41


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 9, dtype=torch.bfloat16)).cuda()
    for param in layers.parameters():
        param.grad = torch.randn_like(param)
    return layers


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.synchronize()
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


# The host waits for nothing -----------------------------------------------------------------------


def test_no_call_waits_for_the_device(warm: distclip.Clipper) -> None:
    """Neither where addresses stay nor where they change."""
    for param in warm.plan.params[0].param, warm.plan.params[-1].param:
        param.grad = torch.ones_like(param)
    with no_sync():
        warm.clip_()
        warm.clip_()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("on_nonfinite", "call"),
    [
        ("propagate", "clip_"),
        ("propagate", "step"),
        ("propagate", "attach"),
        ("zero", "clip_"),
        ("zero", "step"),
        ("skip", "clip_"),  # a step that is not folded is skipped by the host, which must know
    ],
)
@pytest.mark.parametrize("policy", policies(), ids=repr)
def test_no_policy_waits(
    policy: distclip.Policy, on_nonfinite: Any, call: str, overlap: bool
) -> None:
    params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in [(64, 32), (32,)]]
    optimizer = torch.optim.AdamW(params, fused=True)
    clipper = distclip.Clipper(params, policy, on_nonfinite=on_nonfinite, overlap=overlap)
    if call == "attach":
        clipper.attach(optimizer)
    calls: dict[str, Callable[[], object]] = {
        "clip_": clipper.clip_,
        "step": lambda: clipper.step(optimizer),
        "attach": optimizer.step,
    }

    def backward() -> None:
        optimizer.zero_grad()
        torch.stack([(param * param).sum() for param in params]).sum().backward()

    for _ in range(6):  # counts are read four steps late, and waited for if they are not there
        backward()
        calls[call]()
    with no_sync():
        backward()
        calls[call]()


# Launches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, 8.0, torch.inf])
def test_few_launches_for_many_tensors(norm_type: float, dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.ones(64, 32, device="cuda", dtype=dtype)) for _ in range(300)]
    for param in params:
        param.grad = torch.randn_like(param)
    clipper = distclip.Clipper(params, distclip.ClipNorm(0.5, norm_type))
    clipper.clip_()
    found = Session("", torch.device("cuda"), True, print).launches(clipper.clip_)
    assert found is not None
    assert found.triton >= 3
    most = MOST_OF_SCALED_NORMS if norm_type > 6 and norm_type != torch.inf else MOST_LAUNCHES
    assert found.triton + found.torch <= most, found


# CUDA graphs, deterministic mode ------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
@pytest.mark.parametrize("new_addresses", [False, True])
def test_captured_in_a_graph(new_addresses: bool, mode: str, warm: distclip.Clipper) -> None:
    params = [held.param for held in warm.plan.params]
    if new_addresses:
        for param in params:
            param.grad = torch.zeros_like(param)
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph in graphs:
        with torch.cuda.graph(graph, capture_error_mode=mode):
            warm.clip_()
    junk = [
        torch.full((1000,), 7, device="cuda") for _ in range(100)
    ]  # whatever was freed is overwritten
    for seed, graph in enumerate([*graphs, *graphs]):
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


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("policy", policies(), ids=repr)
def test_every_policy_is_deterministic(policy: distclip.Policy) -> None:
    def clipped() -> list[Tensor]:
        params = list(model().parameters())
        norm = distclip.Clipper(params, policy).clip_().total_norm
        return [norm, *(param.grad for param in params)]

    first, second = clipped(), clipped()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Which device -------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_is_that_of_the_parameters() -> None:
    """Without `torch.cuda.set_device`; nothing is put on the current one."""
    before = torch.cuda.memory_allocated(0)
    layers = model().to("cuda:1")
    for param in layers.parameters():
        param.grad = torch.randn_like(param)
    expected = reference.total_norm([param.grad for param in layers.parameters()])
    clipper = distclip.Clipper(layers, distclip.ClipNorm(0.5))
    found = clipper.clip_().total_norm
    assert clipper.plan.device == found.device == torch.device("cuda", 1)
    torch.testing.assert_close(found.cpu().double(), expected.double(), **NORM)
    assert torch.cuda.memory_allocated(0) == before


# One rank -----------------------------------------------------------------------------------------


@pytest.fixture
def one_rank() -> Iterator[None]:
    store = dist.FileStore(tempfile.mktemp(prefix="distclip-one-rank-"), 1)
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("overlap", [False, True])
def test_nccl_with_one_rank_on_two_axes(overlap: bool) -> None:
    mesh = init_device_mesh("cuda", (1, 1), mesh_dim_names=("dp", "tp"))
    whole = torch.full((300, 20), 2.0, device="cuda")
    param = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0), Shard(1)]))
    clipper = distclip.Clipper([param], distclip.ClipNorm(0.5), overlap=overlap)
    for _ in range(3):
        param.grad = None
        (param * param).sum().backward()  # 4 everywhere
        found = clipper.clip_().total_norm
        assert float(found) == pytest.approx(4 * 6000**0.5, rel=1e-6)
        left = reference.total_norm([param.grad.to_local()])
        assert float(left) == pytest.approx(0.5, rel=1e-6)


# Sums ---------------------------------------------------------------------------------------------


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


def test_a_table_that_is_under_way_is_waited_for() -> None:
    """Uploaded behind other work of one stream, and used at once in another."""
    grads = [torch.full((1000 + i,), 1.0, device="cuda") for i in range(50)]
    kernels.power_sums(grads[:1], 2.0)
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    first = kernels.power_sums(grads, 2.0)
    with torch.cuda.stream(torch.cuda.Stream()):
        second = kernels.power_sums(grads, 2.0)
    torch.cuda.synchronize()
    expected = [1000.0 + i for i in range(50)]
    assert first.tolist() == second.tolist() == expected
