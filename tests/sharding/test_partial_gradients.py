"""Gradients that are yet to be reduced, of which every rank has others: experts that are copied to
all ranks, each used where its tokens went.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

import distclip
from distclip import AGC, AdaGC, ClipNorm, Clipper, ClipTensorNorm, ClipValue, LayoutError
from tests.support import reference
from tests.support.layouts import whole
from tests.support.ranks import Ranks, device_of, mesh, same_bits_everywhere

R, P, S0 = Replicate(), Partial(), Shard(0)
SHAPE = (4, 3)


class Case:
    """Parameters on a mesh, and which ranks have a gradient of each.

    Args:
        placements: of the parameters and of their gradients.
        has: for each parameter the ranks that have a gradient.
        sharded: a parameter sharded over all ranks lies beside them.
    """

    def __init__(
        self,
        has: Sequence[Sequence[int]],
        placements: Sequence[tuple[Placement, ...]] = ((R,), (P,)),
        axes: Sequence[str] = ("dp",),
        sharded: bool = False,
    ) -> None:
        self.has, self.axes, self.sharded = has, axes, sharded
        self.param_placements, self.grad_placements = placements

    def make(self, device: str) -> tuple[list[nn.Parameter], list[Tensor]]:
        """The parameters with their gradients, and the whole gradients."""
        shape = (4,) if len(self.axes) == 1 else (2, 2)
        on, rank, where = mesh(shape, tuple(self.axes), device), dist.get_rank(), device_of(device)
        params: list[nn.Parameter] = []
        wholes: list[Tensor] = []
        for k, ranks in enumerate(self.has):
            start = distribute_tensor(torch.ones(SHAPE, device=where), on, self.param_placements)
            param = nn.Parameter(start)
            addends = [self._addend(k, r).to(where) if r in ranks else None for r in range(4)]
            if (mine := addends[rank]) is not None:
                param.grad = DTensor.from_local(mine, on, self.grad_placements)
            params.append(param)
            wholes.append(self._whole(addends, on, where))
        if self.sharded:
            full = torch.arange(12.0).reshape(SHAPE)
            param = nn.Parameter(
                distribute_tensor(torch.ones(SHAPE, device=where), on, self._shards())
            )
            param.grad = distribute_tensor(full.to(where), on, self._shards())
            params.append(param)
            wholes.append(full)
        return params, wholes

    def _addend(self, k: int, rank: int) -> Tensor:
        if self.grad_placements == (P, R):
            rank //= 2  # the ranks along the second axis have copies
        values = torch.arange(1.0, 13.0).reshape(SHAPE) * (1 + rank) * (10 if k == 1 else 1)
        return values[:2] if S0 in self.grad_placements else values

    def _whole(self, addends: list[Tensor | None], on: Any, where: torch.device) -> Tensor:
        """The gradient after the reduction, with zeros where there is none."""
        like = next((a for a in addends if a is not None), torch.zeros(SHAPE))
        mine = addends[dist.get_rank()]
        zeros = torch.zeros_like(like, device=where)
        return whole(
            DTensor.from_local(zeros if mine is None else mine, on, self.grad_placements)
        ).cpu()

    def _shards(self) -> list[Placement]:
        return [S0, *[Shard(1)] * (len(self.axes) - 1)]


CASES = {
    "one rank": Case([range(4), [0]]),
    "the last rank": Case([range(4), [3]]),
    "each another": Case([[0], [1]]),
    "crossed": Case([[0, 2], [1, 3], [2]]),
    "a rank without any": Case([[1], [1, 2]]),
    "nobody": Case([range(4), []]),
    "nothing at all": Case([[], []]),
    "everybody": Case([range(4), range(4)]),
    "one alone": Case([[2]]),
    "beside shards": Case([[0], [1, 3]], sharded=True),
    "beside shards, nobody": Case([[], []], sharded=True),
    "hybrid": Case([[0, 1], [2, 3]], ((R, S0), (P, S0)), ("dp", "fsdp")),
    "hybrid, one rank": Case([[1], range(4)], ((R, S0), (P, S0)), ("dp", "fsdp"), True),
    "two axes": Case([[0], [3]], ((R, R), (P, P)), ("dp", "tp")),
    "one of two axes": Case([[0, 1], [2, 3]], ((R, R), (P, R)), ("dp", "tp")),
    "reduced and scattered": Case([[0], [1, 2]], ((S0,), (P,))),
}
POLICIES: dict[str, Any] = {
    "2": ClipNorm(0.5),
    "inf": ClipNorm(0.5, math.inf),
    "8": ClipNorm(0.5, 8.0),
    "tensor": ClipTensorNorm(0.25),
    "unit": AGC(0.01),
    "value": ClipValue(0.5),
    "adaptive": AdaGC(max_norm=0.5),
}


def assert_reduced(params: Sequence[nn.Parameter], expected: Sequence[Tensor | None]) -> None:
    """Copies have the same gradient on every rank, also where there was none before."""
    for param, full in zip(params, expected, strict=True):
        if full is None:
            assert param.grad is None
            continue
        assert param.grad is not None
        assert param.grad.placements == param.placements
        torch.testing.assert_close(whole(param.grad), full, rtol=1e-6, atol=1e-9)
        if all(p.is_replicate() for p in param.placements):
            assert same_bits_everywhere(param.grad.to_local().double().pow(3).sum())


def scaled_by_hand(
    wholes: Sequence[Tensor], has: Sequence[Sequence[int]], policy: Any
) -> list[Any]:
    plain = [nn.Parameter(torch.ones(SHAPE)) for _ in wholes]
    for param, full in zip(plain, wholes, strict=True):
        param.grad = full.clone()
    Clipper(plain, policy).clip_()
    nobody = [not len(ranks) for ranks in has] + [False] * (len(wholes) - len(has))
    return [None if no else param.grad for param, no in zip(plain, nobody, strict=True)]


def clips_what_was_reduced(name: str, policy: str, device: str) -> None:
    case = CASES[name]
    params, wholes = case.make(device)
    expected = scaled_by_hand(wholes, case.has, POLICIES[policy])
    report = Clipper(params, POLICIES[policy]).clip_()
    norm = reference.total_norm(wholes, POLICIES[policy].norm_type)
    torch.testing.assert_close(report.total_norm.cpu().double(), norm, rtol=1e-6, atol=0)
    assert same_bits_everywhere(report.total_norm)
    assert_reduced(params, expected)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CASES)
def test_ranks_with_other_gradients_reduce_the_same(
    four_ranks: Ranks, name: str, policy: str
) -> None:
    four_ranks.run(clips_what_was_reduced, name, policy, four_ranks.device)


def by_function(name: str, device: str) -> None:
    case = CASES[name]
    calls: dict[str, Callable[[list[nn.Parameter]], Any]] = {
        "clip_grad_norm_": lambda params: distclip.clip_grad_norm_(params, 0.5),
        "clip_grad_value_": lambda params: distclip.clip_grad_value_(params, 0.5),
        "clip_grads_with_norm_": lambda params: distclip.clip_grads_with_norm_(
            params, 0.5, torch.tensor(5.0)
        ),
    }
    for call_name, call in calls.items():
        params, wholes = case.make(device)
        norm = reference.total_norm(wholes).item()
        got = call(params)
        expected: list[Any] = {
            "clip_grad_norm_": [w * min(1.0, 0.5 / (norm + 1e-6)) for w in wholes],
            "clip_grad_value_": [w.clamp(-0.5, 0.5) for w in wholes],
            "clip_grads_with_norm_": [w * (0.5 / (5 + 1e-6)) for w in wholes],
        }[call_name]
        for k, ranks in enumerate(case.has):
            expected[k] = expected[k] if len(ranks) else None
        assert_reduced(params, expected)
        if got is not None:
            assert same_bits_everywhere(got)
            torch.testing.assert_close(got.item(), norm, rtol=1e-6, atol=0)


# Without an all-reduce of sums the ranks that lack a gradient must know that others may have one; a
# sharded parameter's is never `Partial` after backward.
@pytest.mark.parametrize("name", [n for n in CASES if n != "reduced and scattered"])
def test_functions_reduce_the_same(four_ranks: Ranks, name: str) -> None:
    four_ranks.run(by_function, name, four_ranks.device)


def after_backward(overlap: bool, device: str) -> None:
    """Two experts copied to all ranks; each rank's tokens go to one, in three steps to others."""
    on, rank = mesh((4,), ("dp",), device), dist.get_rank()
    where = device_of(device)
    experts = [
        nn.Parameter(distribute_tensor(torch.full((3, 3), 0.1, device=where), on, [R]))
        for _ in range(2)
    ]
    clipper = Clipper(experts, ClipNorm(1.0), overlap=overlap)
    optimizer = torch.optim.SGD(experts, lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        goes_to = [(r + step) % 2 if r < 3 else None for r in range(4)]  # the last has no tokens
        if (mine := goes_to[rank]) is not None:
            x = torch.full((1, 3), 1.0 + rank, device=where)
            (x @ experts[mine].to_local(grad_placements=[P])).sum().backward()
        totals = [sum(1.0 + r for r, e in enumerate(goes_to) if e == k) for k in range(2)]
        expected = math.sqrt(sum(9 * total**2 for total in totals))
        report = clipper.step(optimizer)
        torch.testing.assert_close(report.total_norm.item(), expected, rtol=1e-6, atol=0)
        assert all(same_bits_everywhere(e.to_local().double().sum()) for e in experts)


@pytest.mark.parametrize("overlap", [False, True])
def test_experts_that_get_no_token_on_some_ranks(four_ranks: Ranks, overlap: bool) -> None:
    four_ranks.run(after_backward, overlap, four_ranks.device)


def laid_out_differently(device: str) -> str:
    on = mesh((4,), ("dp",), device)
    param = nn.Parameter(distribute_tensor(torch.ones(SHAPE).to(device_of(device)), on, [R]))
    beside = nn.Parameter(distribute_tensor(torch.ones(SHAPE).to(device_of(device)), on, [S0]))
    beside.grad = beside.detach().clone()
    placements = [P if dist.get_rank() < 2 else R]
    param.grad = DTensor.from_local(torch.ones(SHAPE).to(device_of(device)), on, placements)
    each = "rank 0: .*Partial.*; rank 1: .*Partial.*; rank 2: laid out as the parameter; rank 3: "
    with pytest.raises(LayoutError, match=f"laid it out differently .*{each}") as caught:
        distclip.clip_grad_norm_([param, beside], 1.0)
    assert torch.equal(beside.grad.to_local(), beside.to_local())
    dist.barrier()
    return str(caught.value)


def test_gradients_that_are_laid_out_differently_are_refused(four_ranks: Ranks) -> None:
    assert len(set(four_ranks.run(laid_out_differently, four_ranks.device))) == 1
