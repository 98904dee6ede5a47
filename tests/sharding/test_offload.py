"""Gradients on the CPU while the ranks compute elsewhere: sums are reduced on the mesh's device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffload,
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils import backend_registration

import distclip
from distclip import ClipNorm, Clipper
from tests.support import reference
from tests.support.ranks import Ranks, device_of, mesh, same_bits_everywhere
from tests.support.tolerances import NORM
from tests.support.wrapped import local, loss_of, make_model, tokens_of_all_ranks, whole_gradients


def _fsdp1(original: bool) -> Callable[[nn.Module, str], nn.Module]:
    def wrap(model: nn.Module, device: str) -> nn.Module:
        for index, block in enumerate(model.blocks):
            model.blocks[index] = _fsdp1_unit(block, original, device)
        return _fsdp1_unit(model, original, device)

    return wrap


def _fsdp1_unit(module: nn.Module, original: bool, device: str) -> nn.Module:
    offload = CPUOffload(offload_params=True)
    return FullyShardedDataParallel(
        module, cpu_offload=offload, use_orig_params=original, device_id=device_of(device)
    )


def _fsdp2(model: nn.Module, device: str) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh((4,), ("fsdp",), device), offload_policy=CPUOffloadPolicy())
    return fully_shard(model, mesh=mesh((4,), ("fsdp",), device), offload_policy=CPUOffloadPolicy())


def _fsdp2_in_part(model: nn.Module, device: str) -> nn.Module:
    """The blocks' gradients lie on the CPU, the others on the device."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh((4,), ("fsdp",), device), offload_policy=CPUOffloadPolicy())
    return fully_shard(model, mesh=mesh((4,), ("fsdp",), device))


OFFLOADS = {
    "fsdp1 flat": _fsdp1(False),
    "fsdp1 original": _fsdp1(True),
    "fsdp2": _fsdp2,
    "fsdp2 in part": _fsdp2_in_part,
}


def with_gradients(kind: str, device: str) -> nn.Module:
    model = OFFLOADS[kind](make_model(device), device)
    loss_of(model, tokens_of_all_ranks().to(device_of(device)).chunk(4)[dist.get_rank()]).backward()
    return model


def offloaded_models_clip(device: str) -> None:
    for kind in OFFLOADS:
        for p in (2.0, 8.0):
            expected = reference.total_norm(whole_gradients(), p)
            max_norm = 0.3 * expected.item()
            model = with_gradients(kind, device)
            grads = [local(q.grad) for q in model.parameters() if q.grad is not None]
            wanted = {"cpu", device} if kind == "fsdp2 in part" else {"cpu"}
            assert {
                g.device.type for g in grads
            } == wanted or not grads  # a rank may have no part of FSDP1's
            before = [g.clone() for g in grads]

            clipper = Clipper(model, ClipNorm(max_norm, p))
            assert clipper.plan.device.type == device
            clipper.plan.verify()
            with CommDebugMode() as comms:
                report = clipper.clip_()

            assert comms.get_total_counts() == 1
            assert report.total_norm.device.type == device
            torch.testing.assert_close(
                report.total_norm.cpu().double(), expected, rtol=1e-5, atol=0
            )
            assert same_bits_everywhere(report.total_norm)
            assert report.coefficient < 0.31  # it did clip
            factor = max_norm / report.total_norm.item()
            after = [local(q.grad) for q in model.parameters() if q.grad is not None]
            for grad, was in zip(after, before, strict=True):
                torch.testing.assert_close(grad, was * factor, rtol=2e-7, atol=1e-12)


@contextmanager
def unpinned() -> Iterator[None]:
    """A machine without an accelerator has no pinned memory, and its one stream is always done."""
    pinned = mock.patch.object(Tensor, "pin_memory", lambda tensor, *_: tensor)
    with pinned, mock.patch.object(torch.cpu.Stream, "synchronize", create=True):
        yield


def offloaded_models_clip_without_an_accelerator() -> None:
    with unpinned():
        offloaded_models_clip("cpu")


def test_offloaded_models_clip_as_the_whole_model(four_ranks: Ranks) -> None:
    if torch.accelerator.is_available():
        four_ranks.run(offloaded_models_clip, four_ranks.device)
    else:
        four_ranks.run(offloaded_models_clip_without_an_accelerator)


def sums_of_fsdp1_are_reduced_where_it_computes(original: bool) -> None:
    with unpinned():
        model = _fsdp1(original)(make_model(), "cpu")
    assert {q.device.type for q in model.parameters()} == {"cpu"}
    for unit in FullyShardedDataParallel.fsdp_modules(model):
        unit.compute_device = torch.device(
            "cuda", 0
        )  # as it is on a GPU, where NCCL takes no CPU tensor
    reduce_mesh = Clipper(model).plan.reduce_mesh
    assert reduce_mesh is not None
    assert reduce_mesh.rank_group.device.type == "cuda"


@pytest.mark.parametrize("original", [False, True])
def test_sums_of_offloaded_fsdp1_are_reduced_where_it_computes(
    four_ranks: Ranks, original: bool
) -> None:
    four_ranks.run(sums_of_fsdp1_are_reduced_where_it_computes, original)


def on_a_device_without_values() -> None:
    """Fake tensors have devices but no values: to mix them or to read one on the host is an error.

    Torch's backend in Python (PrivateUse1) gives the device its name and guard, and the process
    group is torch's fake one.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    backend_registration._setup_privateuseone_for_python_backend("chip")
    # Indexing with a list of numbers makes a tensor outside the fake mode.
    empty = torch._C._acc.create_empty_tensor
    torch.library.impl("aten::empty_strided", "privateuseone")(
        lambda size, stride, *, dtype, **_: empty(size, dtype)
    )
    torch.library.impl("aten::_copy_from", "privateuseone")(lambda source, to, *_: to)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    on = init_device_mesh("chip", (4,), mesh_dim_names=("fsdp",))
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def sharded(device: str) -> nn.Parameter:
        with mode:
            shard = torch.empty(2, 3, device=device)
        spec = DTensorSpec(
            on, (Shard(0),), tensor_meta=TensorMeta(torch.Size((8, 3)), (3, 1), torch.float32)
        )
        param = nn.Parameter(DTensor(shard, spec, requires_grad=False))
        param.grad = DTensor(
            shard, spec, requires_grad=False
        )  # as FSDP2 makes one, on whichever device
        return param

    there, here = sharded("chip:0"), sharded("cpu")
    # Gradients on the CPU are scaled by a number on the host, which has no value here: these are
    # only measured.
    for limit, params in (
        (1.0, [there]),
        (math.inf, [here]),
        (math.inf, [there, here]),
        (math.inf, [here, there]),
    ):
        for p in (2.0, 1.0, 8.0, math.inf):
            clipper = Clipper(params, ClipNorm(limit, p))
            with mode, mock.patch.object(dist, "all_reduce") as all_reduce:
                norm = clipper.clip_().total_norm
            ((sums, *_), _) = all_reduce.call_args
            assert sums.device.type == norm.device.type == clipper.plan.device.type == "chip"


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no backends written in Python",
)
def test_sums_are_reduced_on_the_device_of_the_mesh() -> None:
    """In a process of its own, because a backend can be named only once."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        process.submit(on_a_device_without_values).result(timeout=60)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("p", [2.0, 1.0, 8.0, math.inf])
def test_gradients_on_both_devices_in_one_process(p: float) -> None:
    wholes = {"cpu": torch.full((5,), 3.0), "cuda": torch.arange(1.0, 4.0)}
    params = [nn.Parameter(torch.zeros_like(whole, device=at)) for at, whole in wholes.items()]
    for param, whole in zip(params, wholes.values(), strict=True):
        param.grad = whole.clone().to(param.device)
    norm = distclip.clip_grad_norm_(params, 1.0, p)
    assert norm > 1  # it did clip
    assert norm.device.type == "cuda"
    torch.testing.assert_close(
        norm.cpu().double(), reference.total_norm(list(wholes.values()), p), **NORM
    )
    for param, whole in zip(params, wholes.values(), strict=True):
        torch.testing.assert_close(
            param.grad.cpu(), whole / (norm.item() + 1e-6), rtol=2e-7, atol=0
        )
