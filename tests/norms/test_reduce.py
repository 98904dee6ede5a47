"""One collective or none, and every rank takes part whatever it holds."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from tests.support import reference
from tests.support.layouts import LAYOUTS, lay_out, random_wholes, whole
from tests.support.ranks import Ranks, device_of, mesh, same_bits_everywhere
from tests.support.tolerances import NORM


def parameters_without_gradients(device: str) -> None:
    """The gradients of some ranks are None: of one tensor, of all tensors, in no order."""
    for layout in ("fsdp", "fsdp x tp", "two meshes", "beside plain"):
        placed = LAYOUTS[layout]
        wholes = random_wholes(placed, seed=1)
        for norm_type in (2.0, 8.0, math.inf):
            params = lay_out(wholes, placed, device)
            if dist.get_rank() in (1, 3):  # what they hold counts as zero
                for param in params[dist.get_rank() // 2 :]:
                    param.grad = None
            distclip.get_total_norm(params)  # compares copies, once
            with CommDebugMode() as comms:
                norm = distclip.clip_grad_norm_(params, 0.1, norm_type)
            assert comms.get_total_counts() == 1
            assert same_bits_everywhere(norm)
            assert 0.1 < norm <= reference.total_norm(wholes, norm_type).float().to(norm.device)


def test_ranks_without_gradients_take_part(four_ranks: Ranks) -> None:
    four_ranks.run(parameters_without_gradients, four_ranks.device)


def one_rank_holds_nothing(device: str) -> None:
    """Pipeline stages of one rank each, the third of them without a parameter."""
    stages = mesh((4,), ("pp",), device)
    wholes = [torch.full((3,), float(i + 1)) for i in range(4)]
    param = nn.Parameter(torch.zeros(3, device=device_of(device)))
    param.grad = wholes[dist.get_rank()].to(device_of(device))
    held = [] if dist.get_rank() == 2 else [param]
    expected = reference.total_norm([w for i, w in enumerate(wholes) if i != 2])
    with CommDebugMode() as comms:
        norm = distclip.clip_grad_norm_(held, 1.0, mesh=stages)
    assert comms.get_total_counts() == 1
    torch.testing.assert_close(norm.cpu().double(), expected, **NORM)
    assert same_bits_everywhere(norm)


def test_a_rank_without_parameters_takes_part_by_its_mesh(four_ranks: Ranks) -> None:
    four_ranks.run(one_rank_holds_nothing, four_ranks.device)


def partial_gradients(device: str) -> None:
    both = mesh((2, 2), ("dp", "tp"), device)
    param = nn.Parameter(
        distribute_tensor(torch.zeros(6, device=device_of(device)), both, [Shard(0), Replicate()])
    )
    addend = torch.arange(1.0, 4.0, device=device_of(device)) * (1 + dist.get_rank() % 2)
    param.grad = torch.distributed.tensor.DTensor.from_local(addend, both, [Shard(0), Partial()])
    expected = torch.arange(1.0, 4.0).repeat(2) * 3
    with CommDebugMode() as comms:
        norm = distclip.clip_grad_norm_([param], 1.0)
    assert comms.get_total_counts() == 3  # what is to be reduced, the gradient, the sums
    torch.testing.assert_close(norm.cpu().double(), reference.total_norm([expected]), **NORM)
    assert param.grad.placements == param.placements
    torch.testing.assert_close(whole(param.grad), expected / (norm.item() + 1e-6))
    unreduced = torch.distributed.tensor.DTensor.from_local(addend, both, [Shard(0), Partial()])
    torch.testing.assert_close(distclip.get_total_norm([unreduced]), norm)
    assert unreduced.placements[1].is_partial()


def test_partial_gradients_are_reduced_once_before_they_are_measured(four_ranks: Ranks) -> None:
    four_ranks.run(partial_gradients, four_ranks.device)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 8.0, math.inf])
def test_the_norm_after_clipping_is_the_limit(four_ranks: Ranks, norm_type: float) -> None:
    four_ranks.run(clipping_twice_is_clipping_once, norm_type, four_ranks.device)


def clipping_twice_is_clipping_once(norm_type: float, device: str) -> None:
    for layout, placed in LAYOUTS.items():
        params = lay_out(random_wholes(placed, seed=5), placed, device)
        clipper = distclip.Clipper(params, distclip.ClipNorm(0.25, norm_type))
        first, second = clipper.clip_(), clipper.clip_()
        assert bool(first.clipped), layout
        torch.testing.assert_close(second.total_norm.item(), 0.25, rtol=1e-6, atol=0)
        assert first.limit.item() == 0.25
        torch.testing.assert_close(first.coefficient, first.limit / first.total_norm)
        assert all(
            same_bits_everywhere(r)
            for r in (first.total_norm, first.coefficient, second.total_norm)
        )
