"""Per-tensor, per-unit and per-element policies give on every layout what they give on whole
tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import AGC, ClipBlockRMS, Clipper, ClipTensorNorm, ClipValue, Plan, Policy
from distclip.sharding import FlatShard
from tests.support import reference
from tests.support.layouts import LAYOUTS, Placed, lay_out, random_wholes, whole
from tests.support.ranks import Ranks, same_bits_everywhere
from tests.support.wrapped import WRAPPERS, Model, local, make_model, with_gradients

R, S0, S1 = Replicate(), Shard(0), Shard(1)
UNIT_LAYOUTS = {
    **LAYOUTS,
    "dim 1": [Placed((5, 7), (S1,), (4,), ("fsdp",)), Placed((3, 6, 2), (S1,), (4,), ("fsdp",))],
    "conv": [Placed((6, 3, 2, 2), (S0, S1)), Placed((5, 4, 3, 3), (S1, R)), Placed((6,), (S0, R))],
    "both dims twice": [
        Placed((9, 4), (S0, S0)),
        Placed((4, 9), (S1, S1)),
        Placed((3, 3), (S1, S0)),
    ],
}

Reference = Callable[[Tensor, Tensor], Tensor]  # gradient, weight -> clipped gradient
POLICIES: dict[str, tuple[Policy, Reference]] = {
    "tensor": (ClipTensorNorm(0.5), lambda g, w: reference.clip_tensor_norm([g], 0.5)[0]),
    "tensor, p = 1": (
        ClipTensorNorm(0.5, 1.0),
        lambda g, w: reference.clip_tensor_norm([g], 0.5, 1.0)[0],
    ),
    "tensor, p = 8": (
        ClipTensorNorm(0.2, 8.0),
        lambda g, w: reference.clip_tensor_norm([g], 0.2, 8.0)[0],
    ),
    "tensor, p = inf": (
        ClipTensorNorm(0.1, math.inf),
        lambda g, w: reference.clip_tensor_norm([g], 0.1, math.inf)[0],
    ),
    "block rms": (ClipBlockRMS(0.1), lambda g, w: reference.clip_block_rms([g], 0.1)[0]),
    "agc": (AGC(0.05), lambda g, w: reference.agc([w], [g], 0.05)[0]),
    "agc, p = 8": (
        AGC(0.05, norm_type=8.0),
        lambda g, w: reference.agc([w], [g], 0.05, norm_type=8.0)[0],
    ),
    "agc, p = inf": (
        AGC(0.05, norm_type=math.inf),
        lambda g, w: reference.agc([w], [g], 0.05, norm_type=math.inf)[0],
    ),
    "agc, last dim": (
        AGC(0.05, unit_dim=-1),
        lambda g, w: reference.agc([w], [g], 0.05, unit_dim=-1)[0],
    ),
    "value": (ClipValue(0.3), lambda g, w: g.double().clamp(-0.3, 0.3)),
}


def clips_as_the_reference(layout: str, device: str) -> None:
    placed = UNIT_LAYOUTS[layout]
    wholes = random_wholes(placed, seed=7)
    weights = random_wholes(placed, seed=8)
    weights[0] *= 0  # zero-initialised weights learn all the same
    for name, (policy, expected) in POLICIES.items():
        params = lay_out(wholes, placed, device)
        for param, weight in zip(params, lay_out(weights, placed, device), strict=True):
            local(param.data).copy_(local(weight.grad))
        clipper = Clipper(params, policy)
        with CommDebugMode() as comms:
            report = clipper.clip_()
        assert comms.get_total_counts() <= 1, name
        total = reference.total_norm(wholes, policy.norm_type).float()
        torch.testing.assert_close(report.total_norm.cpu(), total, rtol=1e-6, atol=0)
        assert same_bits_everywhere(report.total_norm)
        wants = [expected(g, w) for g, w in zip(wholes, weights, strict=True)]
        assert not all(
            torch.equal(want.float(), g) for want, g in zip(wants, wholes, strict=True)
        ), name
        for param, g, want in zip(params, wholes, wants, strict=True):
            torch.testing.assert_close(
                whole(param.grad).double(), want, rtol=1e-6, atol=1e-12, msg=f"{name}, {g.shape}"
            )


@pytest.mark.parametrize("layout", UNIT_LAYOUTS)
def test_smaller_scopes_clip_as_the_reference(four_ranks: Ranks, layout: str) -> None:
    four_ranks.run(clips_as_the_reference, layout, four_ranks.device)


def wrapped_clips(kind: str, device: str) -> None:
    """The same elements, whatever the wrapper: a second model beside it, whose gradients are laid
    out the same.
    """
    whole_model = make_model()
    model = with_gradients(kind, device)
    distclip.clip_grad_norm_(model, math.inf)  # reduces Partial gradients
    own = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    plan = Clipper(
        model, ClipTensorNorm(1.0)
    ).plan  # knows where every element lies, whatever the policy
    whole_grads = gathered(plan, whole_model)
    for name, (policy, expected) in POLICIES.items():
        for param, grad in zip(model.parameters(), own, strict=True):
            if grad is not None:
                param.grad.copy_(grad)
        Clipper(model, policy).clip_()
        for found, (param_name, weight), grad in zip(
            gathered(plan, whole_model), whole_model.named_parameters(), whole_grads, strict=True
        ):
            want = expected(grad, weight.detach())
            message = f"{kind}, {name}, {param_name}"
            torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-9, msg=message)


def gathered(plan: Plan, whole_model: Model) -> list[Tensor]:
    """The whole gradients of a wrapped model, by the names and shapes of the bare one."""
    shapes = {name: p.shape for name, p in whole_model.named_parameters()}
    mine: dict[str, tuple[str, Tensor]] = {}
    for span in plan.groups[0].units.spans:
        held = plan.params[span.member]
        grad = held.param.grad
        name = span.shard.name
        if isinstance(grad, DTensor):
            mine[name] = ("whole", grad.full_tensor())
        elif grad is not None:
            shard = span.shard.shard
            flat = isinstance(shard, FlatShard)
            values = grad.reshape(-1)[shard.offset : shard.offset + shard.numel] if flat else grad
            mine[name] = (f"at {shard.start}", values) if flat else ("whole", values)
    everyone: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    wholes = {name: torch.zeros(shape).reshape(-1) for name, shape in shapes.items()}
    for name, (where, values) in itertools.chain.from_iterable(each.items() for each in everyone):
        first = 0 if where == "whole" else int(where.removeprefix("at "))
        wholes[name][first : first + values.numel()] = values.reshape(-1)
    return [wholes[name].reshape(shape) for name, shape in shapes.items()]


@pytest.mark.parametrize("kind", WRAPPERS)
def test_smaller_scopes_in_every_wrapper(four_ranks: Ranks, kind: str) -> None:
    four_ranks.run(wrapped_clips, kind, four_ranks.device)


@pytest.mark.parametrize(
    ("unit_dim", "shape", "num"),
    [
        (-1, (2, 3), 3),
        (-1, (1, 5), 1),
        (-1, (5, 1), 1),
        (0, (5, 1), 5),
        (0, (1, 5), 1),
        (0, (5,), 1),
    ],
)
def test_a_tensor_with_one_long_dim_is_a_vector_in_optax_alone(
    unit_dim: int, shape: tuple[int, ...], num: int
) -> None:
    param = torch.nn.Parameter(torch.ones(shape))
    clipper = distclip.Clipper([("w", param)], AGC(unit_dim=unit_dim))
    (group,) = clipper.plan.groups
    assert group.units.num_units == num
