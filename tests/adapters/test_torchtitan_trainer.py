"""distclip in torchtitan's own Trainer, against the float64 norm of the whole gradients."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.support.ranks import Ranks, same_bits_everywhere

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None,
    reason="torchtitan is not installed (tests/peers.txt)",
)

FSDP = "data_parallel_shard_degree"
HSDP = "data_parallel_replicate_degree"
TP, PP = "tensor_parallel_degree", "pipeline_parallel_degree"
CP, EP = "context_parallel_degree", "expert_parallel_degree"

# What the command line of torchtitan would give for four ranks; the rest is FSDP.
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "hsdp": {HSDP: 2},
    "fsdp x tp, full_dtensor": {TP: 2, "spmd_backend": "full_dtensor"},
    "fsdp x cp": {CP: 2},
    "hsdp x ep": {"model": "moe", HSDP: 2, EP: 2},
    "pp x fsdp": {PP: 2, "layers": 2},
    "pp x tp, two parts a rank": {
        **{PP: 2, TP: 2, "layers": 4, "pipeline_parallel_layers_per_stage": 1},
        "pipeline_parallel_schedule": "Interleaved1F1B",
    },
    "pp x fsdp x ep": {"model": "moe", "layers": 2, PP: 2, EP: 2},
}


ONE_ULP = {"rtol": 1.2e-7, "atol": 0.0}  # of the norm, which is float32, of millions of elements


class Call(NamedTuple):
    """One call of the function that clips.

    Attributes:
        before, after: the whole gradients of this rank's stage, by name; float64.
        num_collectives: that it made.
    """

    norm: Tensor
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    num_collectives: int


def whole(tensor: Any) -> Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().double().clone()


def whole_gradients(trained: Any) -> dict[str, Tensor]:
    named = [pair for part in trained.model_parts for pair in part.named_parameters()]
    return {name: whole(p.grad) for name, p in named if p.grad is not None}


def whole_parameters(trained: Any) -> dict[str, Tensor]:
    named = [pair for part in trained.model_parts for pair in part.named_parameters()]
    return {name: whole(p) for name, p in named}


@contextmanager
def watched(
    trained: Any, change: Callable[[Any], None] = lambda trained: None
) -> Iterator[list[Call]]:
    """The calls that the trainer's steps make of what stands in the place of the function."""
    from tests.support.titan import dist_utils as utils

    calls: list[Call] = []
    inside = utils.clip_grad_norm_

    def watching(*args: Any, **kwargs: Any) -> Tensor:
        change(trained)
        before = whole_gradients(trained)
        with CommDebugMode() as comms:
            norm = inside(*args, **kwargs)
        after = whole_gradients(trained)
        calls.append(Call(norm, before, after, comms.get_total_counts()))
        return norm

    utils.clip_grad_norm_ = watching
    try:
        yield calls
    finally:
        utils.clip_grad_norm_ = inside


def norms_of_all_stages(before: dict[str, Tensor]) -> dict[str, float]:
    """The norm of each whole gradient, of all stages."""
    mine = {name: grad.norm().item() for name, grad in before.items()}
    dist.all_gather_object(everyone := [mine] * dist.get_world_size(), mine)
    return {name: norm for each in everyone for name, norm in each.items()}


def check_scaled(call: Call, factor: float) -> None:
    for name, before in call.before.items():
        torch.testing.assert_close(call.after[name], before * factor, rtol=3e-7, atol=0, msg=name)


def steps_with_distclip(layout: dict[str, Any]) -> Call:
    """Checks each call of two steps, and returns the first."""
    from tests.support import titan

    made = titan.config(**layout)
    made.training.max_norm = 0.05
    installing = titan.install(tensor_norms=True)
    with installing as installed, titan.trainer(made) as trained, watched(trained) as calls:
        logged = titan.run_steps(trained, 2)
        for call in calls:
            expected = math.hypot(*norms_of_all_stages(call.before).values())
            assert expected > 0.06  # it does clip
            torch.testing.assert_close(call.norm.double().item(), expected, **ONE_ULP)
            check_scaled(call, 0.05 / (expected + 1e-6))
            assert same_bits_everywhere(call.norm)
            assert call.num_collectives == 1
        assert logged == [call.norm.item() for call in calls]
        assert installed.report is not None
        assert installed.report.total_norm.item() == logged[-1]
        expected = norms_of_all_stages(calls[-1].before)
        assert installed.report.tensor_norms() == pytest.approx(expected, rel=4e-7)
    return calls[0]


def own_steps_are_clipped(layout: dict[str, Any], compare: bool) -> None:
    from tests.support import titan

    ours = steps_with_distclip(layout)
    if not compare:
        return
    made = titan.config(**layout)
    made.training.max_norm = 0.05
    with titan.trainer(made) as trained, watched(trained) as calls:
        titan.run_steps(trained)
    # Its norm comes from float32 sums, which lose digits on CPUs.
    assert 1e-7 < abs(calls[0].norm.item() / ours.norm.item() - 1) < 1e-3


@pytest.mark.parametrize("name", LAYOUTS)
def test_its_own_steps_are_clipped(four_titan_ranks: Ranks, name: str) -> None:
    four_titan_ranks.run(own_steps_are_clipped, LAYOUTS[name], name == "fsdp")
