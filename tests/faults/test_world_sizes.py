"""One training whose steps are taken by other numbers of ranks, in other layouts, in turn.

The state goes from one to the next by `state_dict`; limits, vetoes and what is remembered are those
of the float64 reference, which knows no ranks.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from distclip import Clipper
from tests.conftest import pool
from tests.faults.comparing import same, same_state, smallest
from tests.faults.drawn_policies import POLICIES
from tests.faults.hostile import drawn
from tests.faults.plain_steps import Group, expected
from tests.support.ranks import mesh

RANKS = ("ddp", "fsdp1", "fsdp2", "hsdp", "tp")
STATEFUL = ("autoclip", "zclip", "zclip, bound", "adagc", "spike and norm", "three", "per tensor")
SIZES = (0.0, 1e-3, 0.3, 0.5, 1.0, 1.0, 40.0, math.nan)


class Taken(NamedTuple):
    """What one step has reported and left; gradients are whole, where a layout can show them."""

    total_norm: Tensor
    limit: Tensor
    skipped: bool
    grads: dict[str, Tensor]


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


def wrapped(layout: str) -> nn.Module:
    model = make_model()
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "fsdp1":
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)
    if layout == "tp":
        out = RowwiseParallel(output_layouts=Replicate())
        return parallelize_module(model, mesh((4,), ("tp",)), {"0": ColwiseParallel(), "2": out})
    if layout in ("fsdp2", "hsdp"):
        on = mesh((4,), ("fsdp",)) if layout == "fsdp2" else mesh((2, 2), ("dp", "shard"))
        fully_shard(model[0], mesh=on)
        return fully_shard(model, mesh=on)
    return model


def backward(model: nn.Module, size: float, seed: int) -> None:
    """The same batch on every rank, and so the same mean."""
    batch = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    (model(batch).square().sum() * size).backward()


def take_steps(
    layout: str, policy: str, steps: list[tuple[float, int]], state: Any
) -> tuple[Any, list[Taken]]:
    """The state after the steps of a new Clipper that has loaded `state`."""
    model = wrapped(layout)
    clipper = Clipper(model, POLICIES[policy], on_nonfinite="skip", max_consecutive_skips=math.inf)
    if state is not None:
        clipper.load_state_dict(state)
    taken = []
    for size, seed in steps:
        model.zero_grad()
        backward(model, size, seed)
        report = clipper.clip_()
        grads = {
            name.removeprefix("module."): whole(param.grad)
            for name, param in model.named_parameters()
            if layout != "fsdp1" and param.grad is not None
        }
        taken.append(Taken(report.total_norm, report.limit, bool(report.skipped), grads))
    return clipper.state_dict(), taken


def whole(grad: Tensor) -> Tensor:
    return (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()


STEPS = st.lists(st.tuples(st.sampled_from(SIZES), st.integers(0, 2)), min_size=1, max_size=4)
LEGS = st.lists(
    st.tuples(st.sampled_from([*RANKS, "fsdp2", "one", "one"]), STEPS), min_size=2, max_size=4
)


@given(policy=st.sampled_from(STATEFUL), legs=LEGS)
@drawn(12)
def test_a_state_goes_from_one_world_size_to_another(
    policy: str, legs: list[tuple[str, list[tuple[float, int]]]]
) -> None:
    plain = make_model()
    weights = {name: p.detach().double() for name, p in plain.named_parameters()}
    group = Group.made("all", POLICIES[policy], [*weights])
    state = None
    for layout, steps in legs:
        if layout == "one":
            answers = [take_steps(layout, policy, steps, copy.deepcopy(state))]
        else:
            answers = pool(4).run(take_steps, layout, policy, steps, state)
        assert len({str(state) for state, _ in answers}) == 1
        for index, (size, seed) in enumerate(steps):
            plain.zero_grad()
            backward(plain, size, seed)
            grads = {n: p.grad.double() for n, p in plain.named_parameters() if p.grad is not None}
            check([taken[index] for _, taken in answers], group, weights, grads)
        state = answers[0][0]
        (found,) = state["groups"]["all"].values()
        same_state(found, group.plain.saved(), group, rtol=1e-4)


def check(
    taken: list[Taken], group: Group, weights: dict[str, Tensor], grads: dict[str, Tensor]
) -> None:
    """Every rank's step is the reference's, which then counts it."""
    want = expected([group], weights, grads, single=True)
    (step,) = want.groups
    first = taken[0]
    vetoed = first.skipped if want.vetoed is None else want.vetoed
    for each in taken:
        assert each.skipped == (vetoed or not want.finite)
        same(each.total_norm, want.total, True, rtol=1e-5)
        if group.policy.scope.name == "MODEL" and want.finite:  # of others no rule says it
            same(each.limit, smallest(step.limits or [math.inf]), True, rtol=1e-4)
        for name, grad in each.grads.items():
            left = grads[name] if each.skipped else want.clipped[name]
            largest = float(grads[name].abs().max().nan_to_num(0.0))
            close = {"rtol": 1e-4, "atol": 1e-5 * largest}
            torch.testing.assert_close(grad.double(), left, equal_nan=True, **close)
    if want.finite and not vetoed:
        group.plain.count(step.seen)
