"""Ranks that train apart on slices of one mesh: `mesh=` means exactly these ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip.policies import Policy
from tests.support import reference
from tests.support.ranks import Ranks, mesh

AXES = ("worker", "fsdp")
CPU = torch.device("cpu")
POLICIES: tuple[Policy, ...] = (
    distclip.ClipNorm(0.5),
    distclip.ClipTensorNorm(0.1),
    distclip.AGC(0.01),
)


def workers() -> object:
    return mesh((2, 2), AXES)


def bare() -> nn.Module:
    torch.manual_seed(1)  # all workers begin alike
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def with_plain_tensors(model: nn.Module) -> nn.Module:
    return model


WRAP: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fsdp2": lambda m: fully_shard(m, mesh=workers()["fsdp"]),
    "fsdp1 original": lambda m: FullyShardedDataParallel(
        m, process_group=workers()["fsdp"].get_group(), use_orig_params=True, device_id=CPU
    ),
    "fsdp1 flat": lambda m: FullyShardedDataParallel(
        m, process_group=workers()["fsdp"].get_group(), device_id=CPU
    ),
    "ddp": lambda m: DistributedDataParallel(m, process_group=workers()["fsdp"].get_group()),
    "plain": with_plain_tensors,
}


def batch(worker: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(2 * worker + index)
    return torch.randn(4, 5, generator=generator) * (1 + 5 * worker)


def run_backward(model: nn.Module, kind: str) -> None:
    worker, index = (workers()[axis].get_local_rank() for axis in AXES)
    loss = model(batch(worker, index)).square().sum()
    loss.backward()
    for param in model.parameters() if kind == "plain" else ():
        dist.all_reduce(param.grad, group=workers()["fsdp"].get_group())
        param.grad /= 2


def of_own_worker() -> list[Tensor]:
    model, worker = bare().double(), workers()["worker"].get_local_rank()
    sum(model(batch(worker, i).double()).square().sum() / 2 for i in range(2)).backward()
    return [p.grad for p in model.parameters()]


def alone(kind: str, busy_worker: int) -> None:
    """Only one worker clips and verifies, several times. The other does something else."""
    if workers()["worker"].get_local_rank() != busy_worker:
        model = WRAP[kind](bare())  # the groups of torch's wrappers are made by both
        dist.barrier()
        return
    expected = reference.total_norm(of_own_worker()).float()
    model = WRAP[kind](bare())
    run_backward(model, kind)
    where = {"mesh": workers()["fsdp"]}
    for _ in range(2):
        norm = distclip.clip_grad_norm_(model, 1e9, **where)
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        norm = distclip.get_total_norm(model, **where)
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
    for policy in POLICIES:
        clipper = distclip.Clipper(model, policy, **where)
        clipper.plan.verify()
        torch.testing.assert_close(clipper.decide().total_norm.float(), expected, rtol=1e-5, atol=0)
    report = clipper.clip_()
    assert report.clipped
    dist.barrier()


@pytest.mark.parametrize("busy_worker", [0, 1])
@pytest.mark.parametrize("kind", WRAP)
def test_nobody_else_is_waited_for(four_on_cpus: Ranks, kind: str, busy_worker: int) -> None:
    four_on_cpus.run(alone, kind, busy_worker, limit_s=60)


def drifted(kind: str) -> None:
    model = WRAP[kind](bare())
    for param in model.parameters():
        param.data.add_(workers()["worker"].get_local_rank())
    run_backward(model, kind)
    distclip.Clipper(model, mesh=workers()["fsdp"]).plan.verify()
    norm = distclip.clip_grad_norm_(model, 1.0, mesh=workers()["fsdp"])
    everyone: list[float] = [0.0] * 4
    dist.all_gather_object(everyone, norm.item())
    assert everyone[0] == everyone[1] != everyone[2] == everyone[3]
    if kind in ("fsdp2", "plain"):
        with pytest.raises(distclip.LayoutError, match=r"axes \['worker'\].*pass `mesh=`"):
            distclip.Clipper(model, mesh=workers())


@pytest.mark.parametrize("kind", WRAP)
def test_workers_that_have_drifted(four_on_cpus: Ranks, kind: str) -> None:
    four_on_cpus.run(drifted, kind)


def slice_of_two_axes() -> None:
    """A worker with tensor parallelism: its slice has no process group, and gets one alone."""
    root = mesh((2, 2, 2), ("worker", "fsdp", "tp"))
    if dist.get_rank() < 4:
        return
    here = root["fsdp", "tp"]
    whole = torch.arange(1.0, 17.0).view(4, 4)
    param = nn.Parameter(distribute_tensor(whole, here, [Shard(0), Shard(1)], src_data_rank=None))
    param.grad = param.detach().clone()
    clipper = distclip.Clipper([param], distclip.ClipNorm(1.0), mesh=here)
    clipper.plan.verify()
    torch.testing.assert_close(clipper.clip_().total_norm, whole.norm())


def test_a_slice_of_two_axes(eight_ranks: Ranks) -> None:
    eight_ranks.run(slice_of_two_axes, limit_s=60)


def too_small() -> None:
    """The parameters lie on ranks outside of the mesh that was passed."""
    hsdp = fully_shard(bare(), mesh=workers())
    hybrid = FullyShardedDataParallel(
        bare(),
        device_mesh=workers(),
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        use_orig_params=True,
        device_id=CPU,
    )
    whole = fully_shard(bare(), mesh=mesh((4,), ("fsdp",)))
    for model in (hsdp, hybrid, whole):
        for axis in AXES:
            with pytest.raises(distclip.LayoutError, match=r"lies on rank [0-3] as well"):
                distclip.Clipper(model, mesh=workers()[axis])
            with pytest.raises(distclip.LayoutError, match=r"lies on rank [0-3] as well"):
                distclip.get_total_norm(model, mesh=workers()[axis])


def test_a_mesh_that_lacks_ranks_of_a_parameter_is_refused(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(too_small)


def own_reduction_over_the_pipeline() -> None:
    """As torch's docs have it: the norm of a stage, then the trainer's sum over the stages."""
    root = mesh((2, 2), ("pp", "dp"))
    torch.manual_seed(10 + root["pp"].get_local_rank())
    stage = fully_shard(nn.Linear(8, 8), mesh=root["dp"])
    (stage(torch.ones(2, 8)) * (2 + root["pp"].get_local_rank())).square().sum().backward()
    grads = [param.grad for param in stage.parameters()]
    wholes: list[list[Tensor]] = [[]] * 4
    dist.all_gather_object(wholes, [grad.full_tensor() for grad in grads])
    expected = reference.total_norm([*wholes[0], *wholes[2]]).float()
    of_stage = distclip.get_total_norm(grads, mesh=root["dp"])
    squares = of_stage**2
    dist.all_reduce(squares, group=root["pp"].get_group())
    torch.testing.assert_close(squares.sqrt(), expected, rtol=1e-5, atol=0)
    assert not isinstance(of_stage, DTensor)
    torch.testing.assert_close(distclip.get_total_norm(grads), expected, rtol=1e-5, atol=0)


def test_a_trainer_that_reduces_over_the_pipeline(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(own_reduction_over_the_pipeline)


def two_stages_of_plain_tensors() -> None:
    """The smallest pipeline: a mesh of two ranks, of which one may hold nothing."""
    worker, stage = divmod(dist.get_rank(), 2)
    pipeline = mesh((2, 2), ("worker", "pp"))["pp"]
    for sizes in ((3, 4), (3, 0)):
        params = [nn.Parameter(torch.zeros(2)) for _ in range(sizes[stage])]
        for param in params:
            param.grad = torch.full((2,), 1.0 + worker)
        report = distclip.Clipper(params, distclip.ClipNorm(0.5), mesh=pipeline).clip_()
        expected = (1.0 + worker) * (2 * sum(sizes)) ** 0.5
        assert report.total_norm.item() == pytest.approx(expected)
        for param in params:
            torch.testing.assert_close(
                param.grad, torch.full((2,), (1.0 + worker) * 0.5 / expected)
            )


def test_a_pipeline_of_two_ranks_has_one_norm(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(two_stages_of_plain_tensors)
