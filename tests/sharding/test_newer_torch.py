"""Meshes and gradients that newer versions of torch make; each row runs where torch has it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

import distclip
from distclip.policies import Policy
from distclip.torch_private import root_mesh
from tests.support import reference
from tests.support.ranks import Ranks, mesh
from tests.support.torch_versions import TORCH
from tests.support.wrapped import loss_of, make_model, tokens_of_all_ranks, whole_gradients

POLICIES: tuple[Policy, ...] = (
    distclip.ClipNorm(0.5),
    distclip.ClipTensorNorm(0.1),
    distclip.AGC(0.01),
)
KEEPS_RANK_ORDER = "preserve_rank_order" in inspect.signature(DeviceMesh.__init__).parameters


def needs(has_it: bool, what: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not has_it, reason=f"torch {torch.__version__} has no {what}")


# --- Meshes on which the ranks stand in an order of their own ---


def in_own_order(ranks: Sequence[object], axes: tuple[str, ...]) -> DeviceMesh:
    return DeviceMesh("cpu", ranks, mesh_dim_names=axes, preserve_rank_order=True)


def fully_sharded(model: nn.Module, on: DeviceMesh) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=on)
    return fully_shard(model, mesh=on)


def in_own_order_after_backward(ranks: Sequence[object], axes: tuple[str, ...]) -> None:
    expected = whole_gradients()
    for policy in POLICIES:
        model = fully_sharded(make_model(), in_own_order(ranks, axes))
        loss_of(model, tokens_of_all_ranks().chunk(4)[dist.get_rank()]).backward()
        clips_as_one_process(model, policy, expected)


def clips_as_one_process(
    model: nn.Module, policy: Policy, expected: Sequence[Tensor], on: DeviceMesh | None = None
) -> None:
    """The norm, and each clipped gradient, against a model in one process."""
    whole = [param.detach().full_tensor() for param in model.parameters()]
    clipper = distclip.Clipper(model, policy, mesh=on)
    clipper.plan.verify()
    report = clipper.clip_()
    assert report.clipped
    norm = reference.total_norm(expected).float()
    torch.testing.assert_close(report.total_norm.cpu(), norm, rtol=1e-5, atol=0)
    alone = nn.ParameterList([nn.Parameter(tensor.double()) for tensor in whole])
    for param, grad in zip(alone, expected, strict=True):
        param.grad = grad.double().clone()
    distclip.Clipper(alone, policy).clip_()
    for param, right in zip(model.parameters(), alone, strict=True):
        torch.testing.assert_close(
            param.grad.full_tensor().double(), right.grad, rtol=1e-4, atol=1e-7
        )


@needs(KEEPS_RANK_ORDER, "preserve_rank_order")
@pytest.mark.parametrize(
    ("ranks", "axes"),
    [([3, 1, 0, 2], ("fsdp",)), ([[3, 1], [0, 2]], ("replicate", "shard"))],
    ids=["fsdp2", "hsdp"],
)
def test_ranks_in_an_order_of_their_own(
    four_on_cpus: Ranks, ranks: Sequence[object], axes: tuple[str, ...]
) -> None:
    four_on_cpus.run(in_own_order_after_backward, ranks, axes)


def part_of_the_world_in_own_order() -> None:
    """No process group spans the slice: its ranks communicate along one axis after the other."""
    root = in_own_order([[[6, 2], [1, 5]], [[7, 0], [4, 3]]], ("worker", "fsdp", "tp"))
    here = root["fsdp", "tp"]
    whole = torch.arange(1.0, 17.0).view(4, 4) * (1 + root["worker"].get_local_rank())
    param = nn.Parameter(distribute_tensor(whole, here, [Shard(0), Shard(1)], src_data_rank=None))
    param.grad = param.detach().clone()
    clipper = distclip.Clipper([param], distclip.ClipNorm(1.0), mesh=here)
    clipper.plan.verify()
    torch.testing.assert_close(clipper.clip_().total_norm, whole.norm())
    torch.testing.assert_close(param.grad.full_tensor(), whole / whole.norm())


@needs(KEEPS_RANK_ORDER, "preserve_rank_order")
def test_a_part_of_the_world_in_an_order_of_its_own(eight_ranks: Ranks) -> None:
    eight_ranks.run(part_of_the_world_in_own_order)


# --- Meshes made from others ---


def concatenated() -> DeviceMesh:
    """The axes of a mesh in another order, as FSDP2 makes them for HSDP."""
    root = mesh((2, 2, 2), ("replicate", "tp", "shard"))
    return DeviceMesh._concatenate([root["shard"], root["replicate"]])


def unflattened() -> DeviceMesh:
    return mesh((8,), ("world",))._unflatten(0, (2, 2, 2), ("dp", "cp", "tp"))


def unflattened_slice() -> DeviceMesh:
    """Half of the world, whose ranks train apart from the others."""
    return mesh((2, 4), ("worker", "dp"))["dp"]._unflatten("dp", (2, 2), ("replicate", "shard"))


def distributed_parameters(on: DeviceMesh, placements: Sequence[Placement]) -> nn.ParameterList:
    """Two tensors on the mesh, and one on the mesh that it was made from, if of the same ranks."""
    root = root_mesh(on)
    layouts = [(on, placements), (on, placements)]
    layouts += [(root, [Shard(0)] * root.ndim)] if root.size() == on.size() else []
    torch.manual_seed(5)
    params = nn.ParameterList()
    for where, how in layouts:
        whole = torch.randn(9, 8)
        params.append(nn.Parameter(distribute_tensor(whole, where, how, src_data_rank=None)))
        params[-1].grad = distribute_tensor(3 * whole, where, how, src_data_rank=None)
    return params


def clips_on(make: Callable[[], DeviceMesh], placements: Sequence[Placement]) -> None:
    for policy in POLICIES:
        on = make()
        params = distributed_parameters(on, placements)
        expected = [param.grad.full_tensor().double() for param in params]
        clips_as_one_process(params, policy, expected, on if on.size() < 8 else None)


@pytest.mark.parametrize(
    ("method", "make", "placements"),
    [
        ("_concatenate", concatenated, [Shard(0), Replicate()]),
        ("_concatenate", concatenated, [Shard(1), Shard(0)]),
        ("_unflatten", unflattened, [Shard(0), Replicate(), Shard(1)]),
        ("_unflatten", unflattened_slice, [Replicate(), Shard(1)]),
    ],
    ids=["concatenated", "concatenated, sharded twice", "unflattened", "unflattened slice"],
)
def test_a_mesh_made_from_others(
    eight_ranks: Ranks,
    method: str,
    make: Callable[[], DeviceMesh],
    placements: Sequence[Placement],
) -> None:
    if not hasattr(DeviceMesh, method):
        pytest.skip(f"torch {torch.__version__} has no DeviceMesh.{method}")
    if make is unflattened_slice and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 does not find the axis of a slice that it is to unflatten")
    eight_ranks.run(clips_on, make, placements)


# --- FSDP2 on a mesh that has the axes of other parallelism too ---


class Product(nn.Module):
    """A matrix on all axes of the mesh: copies along those of data parallelism, shards along tp."""

    def __init__(self, weight: Tensor, on: DeviceMesh) -> None:
        super().__init__()
        how = [Shard(0) if axis == "tp" else Replicate() for axis in on.mesh_dim_names]
        self.weight = nn.Parameter(distribute_tensor(weight, on, how, src_data_rank=None))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


def on_all_axes(shard: str | tuple[str, ...], replicate: str | None) -> None:
    on = mesh((2, 2, 2), ("a", "b", "tp"))
    torch.manual_seed(2)
    weight, batch = torch.randn(14, 4), torch.randn(8, 4)
    alone = weight.double().requires_grad_()
    (batch.double() @ alone.t()).square().mean().mul(30).backward()
    for policy in POLICIES:
        dims = fsdp.DataParallelMeshDims(shard=shard, replicate=replicate)
        model = fully_shard(Product(weight, on), mesh=on, dp_mesh_dims=dims)
        how = [Replicate() if axis == "tp" else Shard(0) for axis in on.mesh_dim_names]
        loss = model(distribute_tensor(batch, on, how)).square().mean()
        loss.mul(30 * 4).backward()  # FSDP2 divides by the ranks what is a mean over them already
        clips_as_one_process(model, policy, [alone.grad])


@needs(hasattr(fsdp, "DataParallelMeshDims"), "DataParallelMeshDims")
@pytest.mark.parametrize(("shard", "replicate"), [(("a", "b"), None), ("b", "a")])
def test_fsdp2_on_all_axes_of_a_mesh(
    eight_ranks: Ranks, shard: str | tuple[str, ...], replicate: str | None
) -> None:
    eight_ranks.run(on_all_axes, shard, replicate)


# --- Gradients of another dtype than their parameters' ---


def wide_gradients() -> list[torch.dtype]:
    """Parameters in bf16, gradients in float32, set before FSDP2 shards them."""
    for policy in POLICIES:
        model = make_model(dtype=torch.bfloat16)
        for param in model.parameters():
            param.grad_dtype = torch.float32
        fully_sharded(model, mesh((4,), ("fsdp",)))
        assert isinstance(model, FSDPModule)
        loss_of(model, tokens_of_all_ranks().chunk(4)[dist.get_rank()]).backward()
        dtypes = [param.grad.dtype for param in model.parameters()]
        expected = [param.grad.full_tensor().double() for param in model.parameters()]
        clips_as_one_process(model, policy, expected)
        assert dtypes == [param.grad.dtype for param in model.parameters()]
    return dtypes


@needs(TORCH >= (2, 15), "`grad_dtype` under FSDP2 (2.14 drops it)")
def test_gradients_that_are_wider_than_their_parameters(four_on_cpus: Ranks) -> None:
    for dtypes in four_on_cpus.run(wide_gradients):
        assert set(dtypes) == {torch.float32}
