"""Ranks of a part of the world communicate over groups that exist: nobody else is waited for."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import torch_private
from distclip.sharding import failures, rank_group
from distclip.sharding.rank_group import Line, RankGroup, combine, with_index
from tests.support import reference
from tests.support.layouts import LAYOUTS, lay_out, random_wholes
from tests.support.ranks import Ranks, mesh
from tests.support.tolerances import NORM

R, S0, S1 = Replicate(), Shard(0), Shard(1)
PLACEMENTS = ((S0, S1), (S1, S0), (S0, R), (R, S0), (R, R))
# The ranks of meshes over a part of a world of eight, in the order of the mesh.
PARTS: dict[str, list[Any]] = {
    "two axes": [[0, 1], [2, 3]],
    "another order": [[5, 0], [2, 4], [1, 3]],
    "three axes": [[[6, 2, 0]], [[3, 1, 7]]],
}


def world_of_groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


@functools.cache
def part(name: str) -> DeviceMesh:
    """All ranks make it: its groups of one axis are made by the whole world."""
    ranks = torch.tensor(PARTS[name])
    axes = ("a", "b", "c")[: ranks.ndim]
    return DeviceMesh("cpu", ranks, mesh_dim_names=axes)


def wholes(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(7, 5, generator=generator) for _ in PLACEMENTS]


def parameters(on: DeviceMesh, seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    found: list[tuple[str, nn.Parameter]] = []
    for i, (whole, placements) in enumerate(zip(wholes(seed), PLACEMENTS, strict=True)):
        placed = (*placements, R)[: on.ndim]
        values = distribute_tensor(whole / 10, on, placed, src_data_rank=None)
        param = nn.Parameter(values.clone())
        param.grad = distribute_tensor(whole, on, placed, src_data_rank=None).clone()
        found.append((f"p{i}", param))
    return found


def same_on(on: DeviceMesh, numbers: list[float]) -> None:
    """All ranks of the world must call."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, numbers)
    texts = {str(everyone[rank]) for rank in on.mesh.flatten().tolist()}
    assert len(texts) == 1


def clip_in_each_way(on: DeviceMesh) -> list[float]:
    expected = reference.total_norm(wholes(0))
    found: list[float] = []
    policies = (
        distclip.ClipNorm(0.5),
        distclip.ClipNorm(0.5, 3.0),
        distclip.ClipNorm(0.5, math.inf),
        distclip.ClipTensorNorm(0.5),
        distclip.AGC(0.01),
        distclip.AdaGC(),
    )
    for policy in policies:
        clipper = distclip.Clipper(parameters(on), policy, mesh=on)
        clipper.plan.verify()
        assert str(clipper.plan).endswith("on cpu, in 2 steps, one along each axis")
        report = clipper.clip_(step=1)
        of_type = reference.total_norm(wholes(0), policy.norm_type)
        torch.testing.assert_close(report.total_norm.double(), of_type, **NORM)
        found += [report.total_norm.item(), clipper.clip_().total_norm.item()]
    named = parameters(on)
    groups = [
        {"name": "x", "params": named[:2], "policy": distclip.ClipNorm(1.0)},
        {"name": "y", "params": named[2:], "policy": distclip.ClipNorm(1.0, math.inf)},
    ]
    report = distclip.Clipper(groups, mesh=on).clip_()
    sums = reference.total_norm(wholes(0)[:2])
    torch.testing.assert_close(report.norms["x"].double(), sums, **NORM)
    assert report.norms["y"] == reference.total_norm(wholes(0)[2:], math.inf).float()
    found.append(report.total_norm.item())
    norm = distclip.clip_grad_norm_([param for _, param in parameters(on)], 1.0, mesh=on)
    torch.testing.assert_close(norm.double(), expected, **NORM)
    return [*found, norm.item()]


def partial_gradient(on: DeviceMesh) -> None:
    """Its ranks say which gradients they have to reduce, along the axes of its mesh too."""
    weight = torch.zeros(4, 3)
    param = nn.Parameter(distribute_tensor(weight, on, [S0, R], src_data_rank=None))
    lines, line = on.get_coordinate()
    addend = torch.full((2, 3), float(1 + lines + 2 * line))
    param.grad = DTensor.from_local(addend, on, [S0, Partial()], run_check=False)
    norm = distclip.Clipper([param], mesh=on).clip_().total_norm
    rows = torch.tensor([1.0 + 3.0, 2.0 + 4.0])
    torch.testing.assert_close(norm.double(), (6 * rows.double().square()).sum().sqrt(), **NORM)


def fail_in_each_way(on: DeviceMesh) -> list[str]:
    """What every rank of the mesh must find, whatever the others know."""
    first, odd = int(on.mesh.flatten()[0]), int(on.mesh.flatten()[-1])
    is_odd = dist.get_rank() == odd
    texts: list[str] = []
    named = parameters(on)
    if is_odd:
        named[0][1].grad.to_local().fill_(math.nan)
    clipper = distclip.Clipper(named, mesh=on, on_nonfinite="skip")
    found = clipper.clip_().nonfinite_parameters()
    assert found == {"p0": [odd]}
    with pytest.raises(distclip.NonFiniteGradientError, match=rf"'p0', whose norm on rank {odd}"):
        distclip.Clipper(named, mesh=on, on_nonfinite="raise").clip_()
    limit = 2.0 if is_odd else 1.0
    other = distclip.Clipper(parameters(on), distclip.ClipNorm(limit), mesh=on)
    with pytest.raises(distclip.LayoutError, match=rf"ranks \[{odd}\]: .*max_norm=2") as caught:
        other.clip_()
    texts.append(str(caught.value))
    with pytest.raises(distclip.LayoutError, match=rf"ranks \[{odd}\]: .*max_norm=2") as caught:
        other.plan.verify()
    texts.append(str(caught.value))
    named = parameters(on)
    if dist.get_rank() == first:
        named[4][1].data.to_local()[0, 0] += 1e-6
    with pytest.raises(distclip.LayoutError, match=rf"'p4'.*ranks \[{first}\]: ") as caught:
        distclip.Clipper(named, mesh=on).plan.verify()
    texts.append(str(caught.value))
    return texts


def on_a_part(name: str, others: str) -> None:
    here, beside = part(name), DeviceMesh("cpu", [[4, 5], [6, 7]], mesh_dim_names=("a", "b"))
    before, found = world_of_groups(), []
    if here.get_coordinate() is not None:
        found += clip_in_each_way(here)
        if name == "two axes":
            partial_gradient(here)
        found += fail_in_each_way(here)
    elif others == "clip":
        for _ in range(2):
            clip_in_each_way(beside)
    assert world_of_groups() == before
    same_on(here, found)


@pytest.mark.parametrize("others", ["nothing", "clip"])
def test_a_part_of_the_world_clips_alone(eight_ranks: Ranks, others: str) -> None:
    eight_ranks.run(on_a_part, "two axes", others, limit_s=120)


@pytest.mark.parametrize("name", ["another order", "three axes"])
def test_the_order_of_ranks_does_not_matter(eight_ranks: Ranks, name: str) -> None:
    eight_ranks.run(on_a_part, name, "nothing", limit_s=120)


def lines_of(on: DeviceMesh) -> RankGroup:
    """As over a part of a larger world."""
    lines = [rank_group._line(on, axis) for axis in range(on.ndim)]
    return RankGroup(tuple(lines), torch.device("cpu"))


def along_three_axes() -> None:
    for order in (range(8), (3, 6, 0, 5, 1, 7, 4, 2)):
        ranks_of = torch.tensor(order).view(2, 2, 2)
        on = DeviceMesh("cpu", ranks_of, mesh_dim_names=("a", "b", "c"))
        ranks = lines_of(on)
        torch.manual_seed(dist.get_rank())
        mine = torch.randn(50, dtype=torch.float64) * 10.0 ** torch.randint(-9, 9, (50,))
        everyone = list(ranks.all_gather_objects(mine.tolist()).items())
        assert [rank for rank, _ in everyone] == list(range(8))
        rows = ranks.all_gather(mine)
        assert sorted(rows.tolist()) == sorted(row for _, row in everyone)
        total, largest = mine.clone(), mine.clone()
        with CommDebugMode() as comms:
            ranks.all_reduce_(total)
        # An all-reduce along each line could add in another order along another line.
        counts = {str(name): count for name, count in comms.get_comm_counts().items()}
        assert counts == {"c10d.allreduce_": 1, "c10d.allgather_": 2}
        ranks.all_reduce_(largest, dist.ReduceOp.MAX)
        torch.testing.assert_close(total, rows.sum(0), rtol=1e-14, atol=1e-30)
        assert largest.equal(rows.amax(0))
        found = [bytes(t.view(torch.uint8).flatten().tolist()) for t in (rows, total, largest)]
        dist.all_gather_object(texts := [None] * 8, found)
        assert all(text == found for text in texts)


def test_three_lines_give_the_same_bits_to_all(eight_ranks: Ranks) -> None:
    eight_ranks.run(along_three_axes)


def some_do_not_verify(missing: list[int]) -> None:
    on = mesh((2, 2), ("a", "b"))
    clipper = distclip.Clipper([nn.Parameter(torch.ones(2))], mesh=on)
    object.__setattr__(clipper.plan.mesh, "rank_group", lines_of(on))
    # No rank of another row is there to say that the last one is missing as well.
    named = rf"the ranks \{missing[:2]} have not called"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_private, "timeout", lambda *_: timedelta(seconds=1.5))
        if dist.get_rank() not in missing:
            with pytest.raises(distclip.LayoutError, match=named):
                clipper.plan.verify()
    dist.barrier()
    if dist.get_rank() in missing and len(missing) < 3:  # comes when the others have given up
        with pytest.raises(distclip.LayoutError, match=r"the ranks \[[0-9, ]+\] have not called"):
            clipper.plan.verify()
    dist.barrier()
    if len(missing) < 3:
        clipper.plan.verify()


@pytest.mark.parametrize("missing", [[3], [0, 3], [0], [1, 2, 3]])
def test_every_rank_names_those_that_do_not_verify(four_on_cpus: Ranks, missing: list[int]) -> None:
    four_on_cpus.run(some_do_not_verify, missing)
    if len(missing) == 3:
        four_on_cpus.stop()  # their next calls would not meet


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8, 13])
def test_sums_take_the_same_steps_whatever_is_beside_them(num_ranks: int) -> None:
    """`sum` adds columns in another order where there are more of them."""
    torch.manual_seed(0)
    rows = torch.randn(num_ranks, 67, dtype=torch.float64)
    alone = torch.cat([combine(column, is_max=False) for column in rows.split(1, dim=1)])
    assert combine(rows, is_max=False).equal(alone)
    torch.testing.assert_close(alone, rows.sum(0), rtol=1e-13, atol=1e-15)


class Device:
    """A tensor, as far as `with_index` looks at it."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


class Group:
    def __init__(self, bound: str | None) -> None:
        self.bound_device_id = None if bound is None else torch.device(bound)


@pytest.mark.parametrize(
    ("tensors", "bound", "expected"),
    [
        (["cpu", "meta", "cuda:3", "cuda:4"], "cuda:2", "cuda:3"),
        (["cpu"], "cuda:2", "cuda:2"),
        ([], "cpu", "cuda:7"),
        (["cpu"], None, "cuda:7"),
    ],
)
def test_the_device_is_that_of_the_parameters(
    monkeypatch: pytest.MonkeyPatch, tensors: list[str], bound: str | None, expected: str
) -> None:
    """Without `torch.cuda.set_device` the current device is 0 on every rank."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 7)
    lines: Any = [Line(Group(None), ()), Line(Group(bound), ())]  # type: ignore[arg-type]
    held: Any = [Device(each) for each in tensors]
    assert with_index(torch.device("cuda"), held, lines) == torch.device(expected)
    assert with_index(torch.device("cpu"), held, lines) == torch.device("cpu")
    assert with_index(torch.device("cuda", 5), held, lines) == torch.device("cuda", 5)


def test_an_accelerator_that_is_not_there_has_no_index() -> None:
    if not torch.cuda.is_available():
        for device in (torch.device("cuda"), torch.device("cuda", 0)):
            assert with_index(device) == torch.device("cuda")


def connected() -> None:
    on_cpu = lines_of(mesh((2, 2), ("a", "b")))
    assert not on_cpu.connects_late
    assert replace(on_cpu, device=torch.device("cuda", 0)).connects_late
    assert not replace(on_cpu, device=torch.device("cuda")).connects_late  # it is not there
    with CommDebugMode() as comms:
        on_cpu.connect()
    assert comms.get_total_counts() == 2  # one for each communicator
    layout = LAYOUTS["fsdp"]
    params = lay_out(random_wholes(layout, seed=1), layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankGroup, "connects_late", True)
        distclip.get_total_norm(params)  # compares copies, once
        with CommDebugMode() as comms:
            distclip.clip_grad_norm_(params, 1.0, 3.0)  # a new plan, which others may know
        assert comms.get_total_counts() == 1
        with CommDebugMode() as comms:
            clipper = distclip.Clipper(params)
            distclip.Clipper([nn.Parameter(torch.ones(1))])
        assert comms.get_total_counts() == 1
        with CommDebugMode() as comms:
            clipper.clip_()
        assert comms.get_total_counts() == 1
        patch.setattr(torch_private, "timeout", lambda *_: timedelta(seconds=1))
        if dist.get_rank() != 2:
            with pytest.raises(distclip.LayoutError, match=r"ranks \[2\] of its mesh have not"):
                distclip.Clipper(params)
    dist.barrier()


def test_a_clipper_connects_its_ranks_before_the_first_step(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(connected)
    four_on_cpus.stop()  # the count of calls is another on rank 2


def the_last_work_is_kept() -> None:
    group = RankGroup.of_group(dist.group.WORLD, torch.device("cpu"))
    works = []
    for _ in range(2):
        group.all_reduce_(torch.ones(2), doing="testing")
        works += failures._kept
    assert len(works) == 2
    assert all(work.is_completed() for work in works)


def test_no_thread_of_gloo_lets_tensors_go_where_the_process_ends(four_on_cpus: Ranks) -> None:
    """It aborted in one of four runs of a training that ends right after its last step."""
    four_on_cpus.run(the_last_work_is_kept)
