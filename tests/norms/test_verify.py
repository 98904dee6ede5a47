"""`plan.verify()` finds what ranks disagree on; `print(plan)` says who counts what."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip.norms import verify
from distclip.sharding.rank_group import Line, RankGroup
from tests.support.layouts import LAYOUTS, lay_out, random_wholes
from tests.support.ranks import Ranks, mesh
from tests.support.wrapped import WRAPPERS, with_gradients

GATHERS_PER_OBJECT = 2  # all_gather_object: of the sizes, of the contents


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(6))
        self.head = nn.Linear(5, 2)


def agreeing(device: str) -> None:
    for kind in WRAPPERS:
        _verified(with_gradients(kind, device))
    for placed in LAYOUTS.values():
        _verified(lay_out(random_wholes(placed, seed=2), placed, device))
    _verified(_same_names_in_two_groups())


def _verified(parameters: Any) -> None:
    plan = distclip.Clipper(parameters).plan
    with CommDebugMode() as comms:
        plan.verify()
    assert comms.get_total_counts() == GATHERS_PER_OBJECT


def _same_names_in_two_groups() -> list[dict[str, Any]]:
    model = Small()
    return [{"name": str(i), "params": layer} for i, layer in enumerate(model.layers)]


def test_plans_that_agree_pass(four_ranks: Ranks) -> None:
    four_ranks.run(agreeing, four_ranks.device)


def _perturbed() -> distclip.Clipper:
    model = Small()
    if dist.get_rank() == 2:
        model.layers[3].weight.data[1, 4] += 1e-6
    return distclip.Clipper(model)


def _perturbed_twice() -> distclip.Clipper:
    model = Small()
    if dist.get_rank() == 2:
        model.layers[5].bias.data += 1
        model.layers[1].bias.data += 1
    return distclip.Clipper(model)


def _perturbed_under_a_name_of_two() -> distclip.Clipper:
    groups = _same_names_in_two_groups()
    if dist.get_rank() == 3:
        groups[4]["params"].bias.data += 1
    return distclip.Clipper(groups)


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


def _other_limit_and_values() -> distclip.Clipper:
    model = Small()
    model.head.bias.data += dist.get_rank()
    return distclip.Clipper(model, distclip.ClipNorm(1.0 if dist.get_rank() else 2.0))


def _other_dtype() -> distclip.Clipper:
    return distclip.Clipper(Small().to(torch.float64 if dist.get_rank() == 1 else torch.float32))


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


def _other_rule() -> distclip.Clipper:
    return distclip.Clipper(Small(), on_nonfinite="zero" if dist.get_rank() == 1 else "skip")


def _other_number_of_skips() -> distclip.Clipper:
    return distclip.Clipper(Small(), max_consecutive_skips=3 if dist.get_rank() == 1 else 20)


DISAGREEING: dict[str, tuple[Callable[[], distclip.Clipper], str]] = {
    "a copy differs by one bit": (
        _perturbed,
        r"'layers\.3\.weight'.*ranks \[0, 1, 3\]: .*; ranks \[2\]: .*Broadcast",
    ),
    "two copies differ": (_perturbed_twice, r"'layers\.1\.bias'.*ranks \[0, 1, 3\]: "),
    "a copy differs, two have its name": (
        _perturbed_under_a_name_of_two,
        r"'bias'.*ranks \[0, 1, 2\]: .*; ranks \[3\]: .*Broadcast",
    ),
    "a rank lacks a parameter": (
        _lacking,
        r"'layers\.4\.bias'.*ranks \[3\]: it is missing.*Build and wrap",
    ),
    "another name": (_renamed, r"'(other|layers\.1\.weight)'.*it is missing"),
    "another dtype": (
        _other_dtype,
        r"ranks \[0, 2, 3\]: .*\(torch\.float32\); ranks \[1\]: .*\(torch\.float64\)",
    ),
    "another max_norm": (
        _other_limit,
        r"ranks \[0\]: .*max_norm=2\.0.*; ranks \[1, 2, 3\]: .*max_norm=1\.0",
    ),
    "another max_norm and other values": (_other_limit_and_values, r"ranks \[0\]: .*max_norm=2\.0"),
    "another on_nonfinite": (
        _other_rule,
        r"ranks \[0, 2, 3\]: .*on_nonfinite=skip.*; ranks \[1\]: .*on_nonfinite=zero",
    ),
    "another number of skips": (
        _other_number_of_skips,
        r"ranks \[1\]: .*max_consecutive_skips=3",
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
        r"'#0'.*copies, but they differ: ranks \[[01]\]: .*; ranks \[[23]\]: ",
    ),
}


def disagreeing(name: str) -> str:
    make, message = DISAGREEING[name]
    clipper = make()
    with CommDebugMode() as comms, pytest.raises(distclip.LayoutError) as caught:
        clipper.plan.verify()
    assert re.search(message, str(caught.value)), str(caught.value)
    assert comms.get_total_counts() == 2 * GATHERS_PER_OBJECT  # digests, then names
    return str(caught.value)


@pytest.mark.parametrize("name", DISAGREEING)
def test_plans_that_disagree_raise_the_same_on_every_rank(four_on_cpus: Ranks, name: str) -> None:
    assert len(set(four_on_cpus.run(disagreeing, name))) == 1


def ranks_stay_away(missing: list[int], earlier_calls: int) -> float:
    group = dist.new_group(list(range(4)), timeout=timedelta(seconds=2))
    clipper = distclip.Clipper(Small(), mesh=mesh((4,), ("pp",)))
    # as the world, but with a short timeout
    short = RankGroup((Line(group, tuple(range(4))),), torch.device("cpu"))
    object.__setattr__(clipper.plan.reduce_mesh, "rank_group", short)
    for _ in range(earlier_calls):
        clipper.plan.verify()
    started = time.monotonic()
    if dist.get_rank() not in missing:
        names = re.escape(f"the ranks {missing} have not called `verify()`")
        with pytest.raises(distclip.LayoutError, match=names):
            clipper.plan.verify()
    return time.monotonic() - started


@pytest.mark.parametrize(("missing", "earlier_calls"), [([1], 0), ([0, 2], 3)])
def test_ranks_that_do_not_verify_are_named(
    four_on_cpus: Ranks, missing: list[int], earlier_calls: int
) -> None:
    assert max(four_on_cpus.run(ranks_stay_away, missing, earlier_calls)) < 10


def test_one_process_has_nothing_to_compare() -> None:
    distclip.Clipper(Small()).plan.verify()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float8_e4m3fn", "complex128"])
def test_a_checksum_changes_with_any_bit_and_place(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_CHUNK", 5)  # words
    values = torch.arange(12.0).to(getattr(torch, dtype))
    found = {verify._checksum(values)}
    for index in range(values.numel() * values.element_size()):
        for bit in range(8):
            other = values.clone()
            other.view(torch.uint8)[index] ^= 1 << bit
            found.add(verify._checksum(other))
    assert len(found) == 1 + 12 * values.element_size() * 8
    found |= {verify._checksum(values.roll(shift)) for shift in range(1, 12)}
    assert len(found) == 12 + 12 * values.element_size() * 8
    transposed = values.view(3, 4).t()
    assert verify._checksum(transposed) == verify._checksum(transposed.contiguous())
    negative = torch.arange(12.0).neg().to(values.dtype)  # an even number of signs
    assert verify._checksum(negative) != verify._checksum(values)


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
    assert first[-1] == "one all-reduce of 8 float64 (64 bytes) over dp=2 x tp=2, on cpu"
    assert "no collective" in str(distclip.Clipper(Small()).plan)
