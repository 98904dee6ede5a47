"""Sums through symmetric memory are those of the all-reduce; where a rank has none, all reduce."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import torch_private
from distclip.sharding.one_shot import OneShot, SymmetricMemory
from distclip.sharding.rank_group import RankGroup
from tests.support.layouts import LAYOUTS, lay_out, random_wholes
from tests.support.ranks import Ranks
from tests.support.symmetric_memory import SharedFiles

POLICIES: list[Any] = [
    distclip.ClipNorm(0.5),
    distclip.ClipNorm(0.5, 3.0),
    distclip.ClipNorm(0.5, math.inf),
    distclip.ClipTensorNorm(0.5),
    distclip.AGC(0.01),
    distclip.AdaGC(),
    "two norms",
]


def clipper(policy: Any, layout: str = "fsdp x tp", **options: Any) -> distclip.Clipper:
    placed = LAYOUTS[layout]
    params: Any = lay_out(random_wholes(placed, seed=3), placed)
    if policy != "two norms":
        return distclip.Clipper(params, policy, **options)
    groups = [
        {"name": "x", "params": params[:1], "policy": distclip.ClipNorm(0.5)},
        {"name": "y", "params": params[1:], "policy": distclip.ClipNorm(0.5, math.inf)},
    ]
    return distclip.Clipper(groups, **options)


def same_as_the_all_reduce() -> None:
    backend = SharedFiles()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_private, "symmetric_memory", lambda: backend)
        for policy in POLICIES:
            usual, one_shot = clipper(policy), clipper(policy, symmetric_memory=True)
            assert "symmetric" not in str(usual.plan)
            assert str(one_shot.plan).endswith("on cpu, through symmetric memory")
            for step in range(5):
                expected = usual.clip_(step=step)
                with CommDebugMode() as comms:
                    report = one_shot.clip_(step=step)
                barriers = comms.get_comm_counts()
                assert all("barrier" in str(name) for name in barriers), barriers
                torch.testing.assert_close(
                    report.total_norm, expected.total_norm, rtol=1e-7, atol=0
                )
                everyone: list[Any] = [None] * 4
                dist.all_gather_object(everyone, report.total_norm.item().hex())
                assert len(set(everyone)) == 1
    assert sum(handle.barriers for handle in backend.handles) == 5 * len(POLICIES)


def test_sums_are_those_of_the_all_reduce(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(same_as_the_all_reduce)


def other_calls_are_found() -> str:
    odd = dist.get_rank() == 2
    with pytest.MonkeyPatch.context() as patch:
        backend = SharedFiles()
        patch.setattr(torch_private, "symmetric_memory", lambda: backend)
        made = clipper(distclip.ClipNorm(2.0 if odd else 1.0), symmetric_memory=True)
        with pytest.raises(distclip.LayoutError, match=r"ranks \[2\]: .*max_norm=2") as caught:
            made.clip_()
    return str(caught.value)


def test_ranks_that_make_different_calls_are_found(four_on_cpus: Ranks) -> None:
    assert len(set(four_on_cpus.run(other_calls_are_found))) == 1


def at_different_speeds() -> None:
    """Fast ranks run ahead as far as the barriers let them, and slow ones read late."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    with pytest.MonkeyPatch.context() as patch:
        backend = SharedFiles()
        patch.setattr(torch_private, "symmetric_memory", lambda: backend)
        ranks = RankGroup.world(torch.device("cpu"))
        opened = SymmetricMemory().open(ranks, 8)
        assert isinstance(opened, OneShot)
        stack = torch.stack

        def slow(tensors: Any) -> torch.Tensor:
            time.sleep(0.004 * torch.rand((), generator=generator).item() * (rank % 2))
            return stack(tensors)

        patch.setattr(torch, "stack", slow)
        for step in range(100):
            mine = float(10 * step + rank)
            found = opened.all_gather(
                [torch.full((n,), mine, dtype=torch.float64) for n in (2, 6 - step % 3)]
            )
            expected = [float(10 * step + each) for each in range(4)]
            assert found[:, 0].tolist() == found[:, -1].tolist() == expected, step


def test_ranks_of_different_speeds(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(at_different_speeds)


def replays_of_graphs() -> None:
    """Between calls of other steps, and one after the other: the third buffer, two barriers."""
    rank, capturing = dist.get_rank(), [False]
    with pytest.MonkeyPatch.context() as patch:
        backend = SharedFiles()
        patch.setattr(torch_private, "symmetric_memory", lambda: backend)
        patch.setattr(torch_private, "is_capturing", lambda device: capturing[0])
        opened = SymmetricMemory().open(RankGroup.world(torch.device("cpu")), 8)
        assert isinstance(opened, OneShot)
        stack = torch.stack

        def slow(tensors: Any) -> torch.Tensor:
            time.sleep(0.003 * (rank == 1))
            return stack(tensors)

        patch.setattr(torch, "stack", slow)
        for step in range(60):
            capturing[0] = step % 5 < 3
            found = opened.all_gather([torch.full((8,), float(10 * step + rank)).double()])
            assert found[:, -1].tolist() == [float(10 * step + each) for each in range(4)], step


def test_a_graph_has_a_buffer_of_its_own(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(replays_of_graphs)


def without(backend: Any, reason: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_private, "symmetric_memory", lambda: backend)
        made = clipper(distclip.ClipNorm(0.5), symmetric_memory=True)
        text = str(made.plan)
        assert f"not through symmetric memory ({reason}" in text, text
        with CommDebugMode() as comms:
            norm = made.clip_().total_norm
        assert comms.get_total_counts() == 1
        assert norm == clipper(distclip.ClipNorm(0.5)).clip_().total_norm
    return text.splitlines()[-1]


def test_where_one_rank_lacks_it_all_reduce(four_on_cpus: Ranks) -> None:
    for backend, reason in (
        (SharedFiles(lacking=(2,)), "rank 2: torch has no symmetric memory for cpu"),
        (SharedFiles(failing=(1, 3)), "rank 1: no peer-to-peer access"),
    ):
        assert len(set(four_on_cpus.run(without, backend, reason))) == 1


def on_several_machines() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("platform.node", lambda: f"machine {dist.get_rank() // 2}")
        without(SharedFiles(), "the ranks are on 2 machines")


def test_ranks_on_several_machines_reduce(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(on_several_machines)


def torch_without_it() -> None:
    made = clipper(distclip.ClipNorm(0.5), symmetric_memory=True)
    assert "not through symmetric memory (rank 0: torch has no symmetric memory" in str(made.plan)
    assert made.clip_().total_norm == clipper(distclip.ClipNorm(0.5)).clip_().total_norm


def test_cpus_have_none(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(torch_without_it)


def a_rank_does_not_ask() -> None:
    asks = dist.get_rank() != 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_private, "timeout", lambda *_: timedelta(seconds=1))
        if asks:
            with pytest.raises(distclip.LayoutError, match=r"ranks \[3\] have not asked for it"):
                clipper(distclip.ClipNorm(0.5), symmetric_memory=True)
        else:
            clipper(distclip.ClipNorm(0.5))
    dist.barrier()


def test_a_rank_that_does_not_ask_is_named(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(a_rank_does_not_ask)
    four_on_cpus.stop()  # the count of calls is another on rank 3


def the_model_changes() -> None:
    """The buffers are kept where they are large enough; the ranks make others together."""
    placed = LAYOUTS["fsdp"]
    params = lay_out(random_wholes(placed, seed=3), placed)
    with pytest.MonkeyPatch.context() as patch:
        backend = SharedFiles()
        patch.setattr(torch_private, "symmetric_memory", lambda: backend)
        model = nn.Module()
        model.first = params[0]
        for policy, num_opened in ((distclip.ClipNorm(0.5), 1), (distclip.ClipTensorNorm(0.5), 2)):
            backend.handles.clear()
            model.second = None
            made = distclip.Clipper(model, policy, symmetric_memory=True)
            made.clip_()
            opened = made.plan.one_shot
            assert opened is not None
            model.second = params[1]
            made.clip_()
            assert (made.plan.one_shot is opened) == (num_opened == 1)
            assert made.plan.one_shot is not None
            assert made.plan.one_shot.size >= made.plan.message_size
            assert len(backend.handles) == num_opened


def test_a_model_that_changes(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(the_model_changes)


def test_one_process_needs_none() -> None:
    made = distclip.Clipper([nn.Parameter(torch.ones(2))], symmetric_memory=True)
    assert "no collective" in str(made.plan)


@pytest.mark.parametrize("given", [1, "yes", None])
def test_the_option_is_a_flag(given: Any) -> None:
    with pytest.raises(TypeError, match="symmetric_memory"):
        distclip.Clipper([nn.Parameter(torch.ones(2))], symmetric_memory=given)
