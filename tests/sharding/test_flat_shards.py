"""Pieces of flat buffers, declared by `Layout(parts=...)`, clip as the whole tensors do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from tests.support import reference
from tests.support.ranks import Ranks, mesh

SHAPES = {"first": (5, 3), "second": (4,), "third": (2, 7)}
SIZE = 9  # elements per rank: 33 in all, and 3 of padding

POLICIES: dict[
    str, tuple[distclip.Policy, Callable[[list[Tensor], list[Tensor]], list[Tensor]]]
] = {
    "norm": (distclip.ClipNorm(1.0), lambda g, w: reference.clip_norm(g, 1.0)),
    "norm p=inf": (
        distclip.ClipNorm(1.0, torch.inf),
        lambda g, w: reference.clip_norm(g, 1.0, torch.inf),
    ),
    "tensor": (distclip.ClipTensorNorm(1.0), lambda g, w: reference.clip_tensor_norm(g, 1.0)),
    "rms": (distclip.ClipBlockRMS(0.5), lambda g, w: reference.clip_block_rms(g, 0.5)),
    "rows": (distclip.AGC(0.1), lambda g, w: reference.agc(w, g, 0.1)),
    "columns": (distclip.AGC(0.1, unit_dim=-1), lambda g, w: reference.agc(w, g, 0.1, unit_dim=-1)),
}


def wholes(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES.values()]


def flat(tensors: list[Tensor]) -> Tensor:
    joined = torch.cat([t.flatten() for t in tensors])
    return torch.cat([joined, joined.new_zeros(4 * SIZE - len(joined))])


def parts(rank: int) -> tuple[distclip.sharding.ParamShard, ...]:
    """What the piece on this rank holds of each tensor."""
    made: list[distclip.sharding.ParamShard] = []
    begin = 0  # of the tensor in the whole buffer
    for name, shape in SHAPES.items():
        numel, here = torch.Size(shape).numel(), SIZE * rank
        start, end = max(0, here - begin), min(numel, here + SIZE - begin)
        size = max(0, end - start)
        start, offset = (start, max(0, begin - here)) if size else (0, 0)
        boundaries = tuple(SIZE * other - begin for other in range(1, 4))
        shard = distclip.sharding.FlatShard(shape, start, offset, size, boundaries)
        made.append(distclip.sharding.ParamShard(name, numel, shard))
        begin += numel
    return tuple(made)


def in_a_flat_buffer(policy: str) -> None:
    rank = dist.get_rank()
    here = slice(SIZE * rank, SIZE * rank + SIZE)
    param = nn.Parameter(flat(wholes(0))[here].clone())
    param.grad = flat(wholes(1))[here].clone()
    clip, oracle = POLICIES[policy]
    layout = distclip.Layout(sharded=frozenset({"dp"}), parts=parts(rank))
    clipper = distclip.Clipper(
        [("flat", param)], clip, mesh=mesh((4,), ("dp",)), layouts=lambda name, param: layout
    )
    clipper.plan.verify()
    clipper.clip_()
    expected = flat(oracle(wholes(1), wholes(0)))
    assert (expected - flat(wholes(1))).abs().max() > 0.01
    torch.testing.assert_close(param.grad.double(), expected[here].double(), rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_piece_of_a_flat_buffer(four_ranks: Ranks, policy: str) -> None:
    four_ranks.run(in_a_flat_buffer, policy)


def counted_by_hand() -> None:
    """Ranks 1 and 3 hold copies of one tensor, and no axis of the mesh says so."""
    rank = dist.get_rank()
    whole = wholes(1)[0]
    param = nn.Parameter(torch.zeros_like(whole) if rank % 2 else torch.zeros(0))
    param.grad = whole.clone() if rank % 2 else torch.zeros(0)
    layout = distclip.Layout(sharded=frozenset({"dp"}), counted=rank == 3)
    clipper = distclip.Clipper(
        [("copy", param)], mesh=mesh((4,), ("dp",)), layouts=lambda name, param: layout
    )
    torch.testing.assert_close(
        clipper.clip_().total_norm.double(), whole.double().norm(), rtol=1e-7, atol=0
    )


def test_copies_that_no_axis_shows(four_ranks: Ranks) -> None:
    four_ranks.run(counted_by_hand)
