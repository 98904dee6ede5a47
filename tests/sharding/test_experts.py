"""Experts on their own mesh, and context parallelism, clip as the whole model in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import distclip
from tests.sharding.test_pipeline import backward
from tests.support.parallel_models import (
    EXPERTS,
    Attention,
    Mixture,
    Model,
    check_clip,
    fully_sharded,
    loss_of,
    make_model,
    stage_of,
    tensor_parallel,
    tokens_and_targets,
    verify,
    whole_gradients,
)
from tests.support.ranks import Ranks, mesh
from tests.support.torch_versions import PIPELINE_OVER_GLOO, STRIDED_SHARD
from tests.support.wrapped import Block, local

NORM_TYPES = (1.0, 2.0, 8.0, torch.inf)
DENSE_AXES, EXPERT_AXES = ("dp_replicate", "fsdp", "tp"), ("dp_replicate", "efsdp", "ep")


def blocks() -> list[nn.Module]:
    return [Block(8), Mixture(), Block(8), Mixture()]


def blocks_with_idle_experts() -> list[nn.Module]:
    """In one mixture the second half of the experts gets no token, in the other the first half."""
    half = EXPERTS // 2
    return [Block(8), Mixture(closed=range(half, EXPERTS)), Block(8), Mixture(closed=range(half))]


def mixtures(model: Model) -> list[Mixture]:
    return [block for block in model.blocks.values() if isinstance(block, Mixture)]


def own_experts(weight: Tensor, ep: DeviceMesh) -> Tensor:
    return weight.detach().chunk(ep.size())[ep.get_local_rank()].clone()


def spread_experts(model: Model, ep: DeviceMesh, as_dtensors: bool) -> None:
    for block in mixtures(model):
        block.ep = ep.get_group()
        block.experts.idle = bool(own_experts(block.bias, ep).isinf().all())
        for name, weight in list(block.experts.named_parameters()):
            mine = own_experts(weight, ep)
            kept = DTensor.from_local(mine, ep, [Shard(0)]) if as_dtensors else mine
            setattr(block.experts, name, nn.Parameter(kept))


def expert_parameters(model: Model) -> list[nn.Parameter]:
    return [param for block in mixtures(model) for param in block.experts.parameters()]


def shard_experts(model: Model, data: DeviceMesh) -> None:
    for block in mixtures(model):
        fully_shard(block.experts, mesh=data)


def average(params: list[nn.Parameter], num_batches: int, data: DeviceMesh) -> None:
    """Tokens of several batches meet at an expert: a mean over FSDP's ranks divides too little.

    `set_gradient_divide_factor` divides more than once where the axis that shards has one rank
    (torch 2.13).
    """
    for param in params:
        if param.grad is not None:
            param.grad.mul_(data.size() / num_batches)


def experts_as_dtensors(dense_shape: tuple[int, ...], expert_shape: tuple[int, ...]) -> None:
    dense, expert = mesh(dense_shape, DENSE_AXES), mesh(expert_shape, EXPERT_AXES)
    num_batches = dense_shape[0] * dense_shape[1]
    for make_blocks in (blocks, blocks_with_idle_experts):
        whole = make_model(make_blocks)
        model = tensor_parallel(stage_of(whole, 0, 1), dense["tp"])
        spread_experts(model, expert["ep"], as_dtensors=True)
        shard_experts(model, expert["dp_replicate", "efsdp"])
        fully_sharded(model, dense["dp_replicate", "fsdp"])
        tokens, targets = tokens_and_targets(num_batches, dist.get_rank() // dense_shape[2])
        loss_of(model(tokens), targets).backward()
        average(expert_parameters(model), num_batches, expert["dp_replicate", "efsdp"])

        params = dict(model.named_parameters())
        idle = sum(p.grad is None for p in params.values())
        assert idle == (0 if make_blocks is blocks else 2)
        wholes = whole_gradients(whole)
        verify(params)
        for norm_type in NORM_TYPES:
            check_clip(params, wholes, norm_type)


@pytest.mark.parametrize(
    ("dense_shape", "expert_shape"),
    [
        ((2, 2, 2), (2, 2, 2)),
        ((2, 2, 2), (2, 1, 4)),
        pytest.param((1, 4, 2), (1, 2, 4), marks=STRIDED_SHARD.skips),
    ],
    ids=["ep = tp", "ep over fsdp and tp", "ep over a part of fsdp and tp"],
)
def test_experts_as_dtensors(
    eight_ranks: Ranks, dense_shape: tuple[int, ...], expert_shape: tuple[int, ...]
) -> None:
    eight_ranks.run(experts_as_dtensors, dense_shape, expert_shape)


def over_ep(name: str, param: Tensor) -> distclip.Layout | None:
    return distclip.Layout(sharded=frozenset({"ep"})) if ".experts." in name else None


def mean_over(grad: Tensor | None, meshes: list[DeviceMesh], num_batches: int) -> None:
    """As DDP does. An expert without tokens has no gradient on any of its ranks."""
    for axis in meshes if grad is not None else ():
        dist.all_reduce(local(grad), group=axis.get_group())
    if grad is not None:
        local(grad).div_(num_batches)


def experts_as_plain_tensors() -> None:
    """The dense weights are DTensors on one mesh, the experts plain tensors on that of `mesh=`."""
    dense, expert = mesh((2, 2, 2), DENSE_AXES), mesh((2, 2, 2), EXPERT_AXES)
    for make_blocks in (blocks, blocks_with_idle_experts):
        whole = make_model(make_blocks)
        model = tensor_parallel(stage_of(whole, 0, 1), dense["tp"])
        spread_experts(model, expert["ep"], as_dtensors=False)
        plain = expert_parameters(model)
        fully_shard(model, mesh=dense["dp_replicate", "fsdp"], ignored_params=set(plain))
        tokens, targets = tokens_and_targets(4, dist.get_rank() // 2)
        loss_of(model(tokens), targets).backward()
        for param in plain:
            mean_over(param.grad, [expert["dp_replicate"], expert["efsdp"]], 4)

        params = dict(model.named_parameters())
        idle = sum(p.grad is None for p in params.values())
        assert idle == (0 if make_blocks is blocks else 2)

        def part_of(name: str, whole: Tensor) -> Tensor:
            return own_experts(whole, expert["ep"]) if ".experts." in name else whole

        wholes = whole_gradients(whole)
        verify(params, mesh=expert, layouts=over_ep)
        for norm_type in NORM_TYPES:
            check_clip(params, wholes, norm_type, part_of, mesh=expert, layouts=over_ep)


def test_experts_as_plain_tensors(eight_ranks: Ranks) -> None:
    eight_ranks.run(experts_as_plain_tensors)


def mixture_in_the_last_stage() -> list[nn.Module]:
    return [Block(8), Block(8), Mixture(closed=range(EXPERTS // 2)), Block(8)]


def pipeline_of_experts() -> None:
    """The first stage has no experts. In the last, those on the ranks at ep = 0 get no tokens."""
    dense, expert = mesh((2, 4), ("pp", "fsdp")), mesh((2, 2, 2), ("pp", "efsdp", "ep"))
    whole = make_model(mixture_in_the_last_stage)
    index = dense["pp"].get_local_rank()
    part = stage_of(whole, index, 2)
    spread_experts(part, expert["ep"], as_dtensors=True)
    shard_experts(part, expert["efsdp"])
    fully_sharded(part, dense["fsdp"], reshard_after_forward=False)
    backward({index: part}, 2, dense["pp"], tokens_and_targets(4, dense["fsdp"].get_local_rank()))
    average(expert_parameters(part), 4, expert["efsdp"])

    params = dict(part.named_parameters())
    here = index == 1 and expert["ep"].get_local_rank() == 0
    assert sum(p.grad is None for p in params.values()) == (2 if here else 0)
    wholes = whole_gradients(whole)
    verify(params)  # the ranks find different meshes: the first stage has no experts
    for norm_type in NORM_TYPES:
        check_clip(params, wholes, norm_type)


@PIPELINE_OVER_GLOO.skips
def test_pipeline_x_experts_x_fsdp(eight_ranks: Ranks) -> None:
    eight_ranks.run(pipeline_of_experts)


def attention_blocks() -> list[nn.Module]:
    return [Attention(), Block(8), Attention(), Block(8)]


def context_parallel(flattened: bool) -> None:
    """Each rank along cp has a part of every sequence: only gradients are averaged over cp."""
    root = mesh((2, 2, 2), ("dp", "cp", "tp"))
    whole = make_model(attention_blocks)
    model = tensor_parallel(stage_of(whole, 0, 1), root["tp"])
    for block in model.blocks.values():
        if isinstance(block, Attention):
            block.cp = root["cp"].get_group()
    fully_sharded(model, root["dp", "cp"]._flatten("dp_cp") if flattened else root["dp"])
    data = tokens_and_targets(2, root["dp"].get_local_rank())
    tokens, targets = (part.chunk(2, dim=1)[root["cp"].get_local_rank()] for part in data)
    loss_of(model(tokens), targets).backward()
    params = dict(model.named_parameters())
    if not flattened:
        for param in params.values():
            mean_over(param.grad, [root["cp"]], 2)
    wholes = whole_gradients(whole)
    verify(params)
    for norm_type in NORM_TYPES:
        check_clip(params, wholes, norm_type)


@pytest.mark.parametrize(
    "flattened",
    [False, pytest.param(True, marks=STRIDED_SHARD.skips)],
    ids=["replicated over cp", "sharded over dp and cp"],
)
def test_context_parallel(eight_ranks: Ranks, flattened: bool) -> None:
    eight_ranks.run(context_parallel, flattened)
