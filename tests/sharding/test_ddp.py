"""DDP and FSDP1 over tensor parallelism: the wrappers keep the layouts of DTensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip.policies import Policy
from distclip.sharding import BlockShard, FlatShard, ParamShard
from distclip.sharding.shard import FlatBlockShard
from distclip.torch_private import spec_of_localized
from tests.support import reference
from tests.support.ranks import Ranks, mesh, same_bits_everywhere
from tests.support.wrapped import (
    Model,
    loss_of,
    make_model,
    tensor_parallel,
    tokens_of_all_ranks,
    whole_gradients,
)

POLICIES: tuple[Policy, ...] = (
    distclip.ClipNorm(0.5),
    distclip.ClipNorm(0.5, 1.0),
    distclip.ClipNorm(0.5, torch.inf),
    distclip.ClipTensorNorm(0.05),
    distclip.ClipBlockRMS(1e-3),
    distclip.AGC(0.01),
)


def both() -> object:
    return mesh((2, 2), ("dp", "tp"))


def ddp() -> nn.Module:
    model = tensor_parallel(make_model(), both()["tp"])
    return DistributedDataParallel(model, device_mesh=both()["dp"])


def fsdp1(strategy: str = "FULL_SHARD", original: bool = True) -> nn.Module:
    return FullyShardedDataParallel(
        tensor_parallel(make_model(), both()["tp"]),
        device_mesh=both()["dp"],
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=original,
        device_id=torch.device("cpu"),
    )


def run_backward(model: nn.Module) -> None:
    tokens = tokens_of_all_ranks().chunk(2)[both()["dp"].get_local_rank()]
    loss_of(model, tokens).backward()


def clipped_in_one_process(policy: Policy) -> tuple[dict[str, Tensor], Tensor]:
    model = make_model(dtype=torch.float64)
    loss_of(model, tokens_of_all_ranks()).backward()
    before = [p.grad.clone() for p in model.parameters()]
    norm = distclip.Clipper(model, policy).clip_().total_norm
    after = {name: p.grad for name, p in model.named_parameters()}
    assert not all(map(torch.equal, before, after.values()))  # it did clip
    return after, norm


def here(of: ParamShard, whole: Tensor) -> Tensor:
    """What of a whole gradient lies on this rank, flat."""
    shard = of.shard
    if isinstance(shard, FlatBlockShard | BlockShard):
        block = shard if isinstance(shard, BlockShard) else shard.block
        for dim, (first, size) in enumerate(zip(block.offsets, block.sizes, strict=True)):
            whole = whole.narrow(dim, first, size)
    flat = whole.reshape(-1)
    if isinstance(shard, BlockShard):
        return flat
    part = shard if isinstance(shard, FlatShard) else shard.flat
    return flat[part.start : part.start + part.numel]


def clips_as_in_one_process(clipper: distclip.Clipper, policy: Policy) -> None:
    want, norm = clipped_in_one_process(policy)
    report = clipper.clip_()
    torch.testing.assert_close(report.total_norm, norm.float(), rtol=1e-5, atol=0)
    assert same_bits_everywhere(report.total_norm)
    names = [param.name for param in clipper.plan.params]
    assert sorted(names) == sorted(want)
    for param in clipper.plan.params:
        (shard,) = param.shards
        wanted = here(shard, want[param.name])
        assert shard.numel == want[param.name].numel()
        grad = param.param.grad
        found = torch.zeros_like(wanted) if grad is None else grad.reshape(-1)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-7)


def ddp_over_tensor_parallel() -> None:
    for policy in POLICIES:
        for when in ("before", "after", "overlap"):  # after: the modules have other attributes
            model = ddp()
            if when != "after":
                clipper = distclip.Clipper(model, policy, overlap=when == "overlap")
            run_backward(model)
            if when == "after":
                clipper = distclip.Clipper(model, policy)
            clips_as_in_one_process(clipper, policy)
            clipper.plan.verify()


def test_ddp_over_tensor_parallel(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(ddp_over_tensor_parallel)


def functions_over_ddp() -> None:
    expected = reference.total_norm(whole_gradients()).float()
    model = ddp()
    params = list(model.parameters())
    assert sum(spec_of_localized(p) is not None for p in params) == 12  # as torch records it
    for step in range(3):
        model.zero_grad()
        for param in params:
            param.grad = None
        run_backward(model)
        for given in (model, params):
            for where in ({}, {"mesh": both()}):
                norm = distclip.clip_grad_norm_(given, torch.inf, **where)
                torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        assert len(list(model.parameters())) < len(params), step  # torch loses them
    before = [param.grad.clone() for param in params]
    distclip.clip_grad_norm_(model, 0.3 * expected.item())
    for param, was in zip(params, before, strict=True):
        torch.testing.assert_close(param.grad, 0.3 * was, rtol=1e-4, atol=1e-9)


def test_functions_over_ddp(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(functions_over_ddp)


def fsdp1_over_tensor_parallel(strategy: str) -> None:
    for policy in POLICIES:
        model = fsdp1(strategy)
        clipper = distclip.Clipper(model, policy)
        run_backward(model)
        clips_as_in_one_process(clipper, policy)
        clipper.plan.verify()
    expected = reference.total_norm(whole_gradients()).float()
    run_backward(model := fsdp1(strategy))
    for where in ({}, {"mesh": both()}):
        norm = distclip.get_total_norm(model, **where)
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP"])
def test_fsdp1_over_tensor_parallel(four_on_cpus: Ranks, strategy: str) -> None:
    four_on_cpus.run(fsdp1_over_tensor_parallel, strategy)


def flat_parameters_of_both_kinds() -> None:
    """A rank counts a flat parameter as a whole, or not at all."""
    with pytest.raises(distclip.LayoutError, match=r"flat parameter.*`use_orig_params=True`"):
        distclip.Clipper(fsdp1(original=False))


def test_a_flat_parameter_of_shards_and_copies_is_refused(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(flat_parameters_of_both_kinds)


class Columns(nn.Module):
    """Tensor parallelism shards all of it."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.up = model.blocks[0].up

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


def flat_parameter_of_shards() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    whole = Columns(make_model(dtype=torch.float64))
    whole(x.double()).square().sum().backward()
    expected = reference.total_norm([p.grad for p in whole.parameters()]).float()
    columns = Columns(make_model())
    torch.distributed.tensor.parallel.parallelize_module(
        columns, both()["tp"], {"up": torch.distributed.tensor.parallel.ColwiseParallel()}
    )
    model = FullyShardedDataParallel(
        columns, device_mesh=both()["dp"], device_id=torch.device("cpu")
    )
    gathered = model(x)
    gathered = gathered.full_tensor() if isinstance(gathered, DTensor) else gathered
    gathered.square().sum().backward()
    torch.testing.assert_close(distclip.clip_grad_norm_(model, 1.0), expected, rtol=1e-5, atol=0)


def test_a_flat_parameter_of_shards(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(flat_parameter_of_shards)
