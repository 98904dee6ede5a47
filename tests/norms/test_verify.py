"""`plan.verify()` finds what ranks disagree on, and every rank raises the same; `print(plan)` says who counts what."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from tests.support.layouts import LAYOUTS, lay_out, random_wholes
from tests.support.ranks import Ranks, mesh
from tests.support.wrapped import WRAPPERS, with_gradients

WORLD = ("world",)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(6))
        self.head = nn.Linear(5, 2)


def agreeing(device: str) -> None:
    for kind in WRAPPERS:
        distclip.Clipper(with_gradients(kind, device)).plan.verify()
    for placed in LAYOUTS.values():
        distclip.Clipper(lay_out(random_wholes(placed, seed=2), placed, device)).plan.verify()


def test_plans_that_agree_pass(four_ranks: Ranks) -> None:
    four_ranks.run(agreeing, four_ranks.device)


def _perturbed() -> distclip.Clipper:
    model = Small()
    if dist.get_rank() == 2:
        model.layers[3].weight.data[1, 4] += 1e-6
    return distclip.Clipper(model)


def _lacking() -> distclip.Clipper:
    model = Small()
    if dist.get_rank() == 3:
        model.layers[4].bias = None
    return distclip.Clipper(model)


def _renamed() -> distclip.Clipper:
    named = list(Small().named_parameters())
    if dist.get_rank() == 1:
        named[2] = ("other", named[2][1])
    return distclip.Clipper(named)


def _other_limit() -> distclip.Clipper:
    return distclip.Clipper(Small(), distclip.ClipNorm(1.0 if dist.get_rank() else 2.0))


def _other_order() -> distclip.Clipper:
    model = Small()
    groups = [{"name": "body", "params": model.layers}, {"name": "head", "params": model.head}]
    return distclip.Clipper(groups[::-1] if dist.get_rank() == 2 else groups)


def _other_mesh() -> distclip.Clipper:
    shape = (2, 2) if dist.get_rank() < 2 else (4, 1)
    return distclip.Clipper(Small(), mesh=_mesh_of(shape), distinct=("a",))


def _mesh_of(shape: tuple[int, int]) -> object:
    meshes = [mesh((2, 2), ("a", "b")), mesh((4, 1), ("a", "b"))]  # every rank makes both
    return meshes[0] if shape == (2, 2) else meshes[1]


def _broken_shard() -> distclip.Clipper:
    placed = LAYOUTS["hsdp"]
    params = lay_out(random_wholes(placed, seed=2), placed)
    for param in params:
        assert isinstance(param.data, DTensor)
        param.data.to_local().fill_(dist.get_rank() // 2 if param is params[0] else 0)
    return distclip.Clipper(params)


def _local_experts() -> distclip.Clipper:
    """Plain tensors that differ from rank to rank, beside sharded ones, and nothing declared."""
    placed = LAYOUTS["beside plain"]
    params = lay_out(random_wholes(placed, seed=2), placed)
    params[1].data.fill_(float(dist.get_rank()))
    return distclip.Clipper(params)


DISAGREEING: dict[str, tuple[Callable[[], distclip.Clipper], str]] = {
    "a copy differs by one bit": (
        _perturbed,
        r"'layers\.3\.weight'.*ranks \[0, 1, 3\]: .*; ranks \[2\]: .*Broadcast",
    ),
    "a rank lacks a parameter": (
        _lacking,
        r"'layers\.4\.bias'.*ranks \[3\]: it is missing.*Build and wrap",
    ),
    "another name": (_renamed, r"'(other|layers\.1\.weight)'.*it is missing"),
    "another max_norm": (
        _other_limit,
        r"ranks \[0\]: .*max_norm=2\.0.*; ranks \[1, 2, 3\]: .*max_norm=1\.0",
    ),
    "another order of groups": (
        _other_order,
        r"ranks \[0, 1, 3\]: body: .*, head: .*; ranks \[2\]: head: ",
    ),
    "another mesh": (
        _other_mesh,
        r"ranks \[0, 1\]: mesh a=2 x b=2.*; ranks \[2, 3\]: mesh a=4 x b=1",
    ),
    "replicas of a shard differ": (
        _broken_shard,
        r"'#0'.*copies.*differ: ranks \[[01], [23]\]|'#0'.*copies",
    ),
    "undeclared experts": (
        _local_experts,
        r"'#1'.*copies, but they differ: ranks \[0\].*`layouts=`",
    ),
}


def disagreeing(name: str) -> str:
    make, message = DISAGREEING[name]
    clipper = make()
    with CommDebugMode() as comms, pytest.raises(distclip.LayoutError) as caught:
        clipper.plan.verify()
    assert re.search(message, str(caught.value)), str(caught.value)
    assert comms.get_total_counts() < 70  # whatever the number of parameters
    return str(caught.value)


@pytest.mark.parametrize("name", DISAGREEING)
def test_plans_that_disagree_raise_the_same_on_every_rank(four_on_cpus: Ranks, name: str) -> None:
    assert len(set(four_on_cpus.run(disagreeing, name))) == 1


def one_rank_stays_away() -> float:
    group = dist.new_group(list(range(4)), timeout=timedelta(seconds=2))
    clipper = distclip.Clipper(Small(), mesh=mesh((4,), ("pp",)))
    object.__setattr__(
        clipper.plan.reduce_mesh, "group", group
    )  # as the world, but with a short timeout
    started = time.monotonic()
    if dist.get_rank() != 1:
        with pytest.raises(
            distclip.LayoutError, match=r"the ranks \[1\] have not called `verify\(\)`"
        ):
            clipper.plan.verify()
    return time.monotonic() - started


def test_a_rank_that_does_not_verify_is_named(four_on_cpus: Ranks) -> None:
    assert max(four_on_cpus.run(one_rank_stays_away)) < 10


def test_one_process_has_nothing_to_compare() -> None:
    distclip.Clipper(Small()).plan.verify()


def printed(layout: str) -> str:
    placed = LAYOUTS[layout]
    return str(distclip.Clipper(lay_out(random_wholes(placed, seed=2), placed)).plan)


def test_the_plan_prints_who_counts_what(four_on_cpus: Ranks) -> None:
    texts = four_on_cpus.run(printed, "fsdp x tp")
    first, last = texts[0].splitlines(), texts[3].splitlines()
    assert re.split(r"  +", first[1]) == [
        "all",
        "ClipNorm(max_norm=1.0, norm_type=2.0)",
        "sharded over dp, tp",
        *["2", "12", "12", "48"],
    ]
    assert re.split(r"  +", first[2])[2:] == [
        "sharded over dp; copies over tp",
        "1",
        "3",
        "3",
        "12",
    ]
    assert re.split(r"  +", last[2])[2:] == ["sharded over dp; copies over tp", "1", "2", "0", "8"]
    assert first[-1] == "one all-reduce of 1 float64 (8 bytes) over dp=2 x tp=2, on cpu"
    assert "no collective" in str(distclip.Clipper(Small()).plan)
