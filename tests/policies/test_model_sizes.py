"""`NormContext.sizes` of policies with Scope.MODEL: the elements of the group, or an error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distclip import ClipNorm, Clipper, EmptyState, Layout, NormContext, Scope, StatelessPolicy
from tests.support import wrapped
from tests.support.layouts import LAYOUTS, lay_out, random_wholes
from tests.support.ranks import Ranks, mesh


@dataclass(frozen=True)
class ClipModelRMS(StatelessPolicy):
    """The root mean square of all elements of the group is at most `max_rms`."""

    max_rms: float
    scope = Scope.MODEL
    norm_type = 2.0

    def limit(
        self, norms: Tensor, state: EmptyState, context: NormContext
    ) -> tuple[Tensor, EmptyState]:
        return self.max_rms * context.sizes.sqrt(), state


def limit_of(num_elements: int) -> float:
    return 1e-3 * math.sqrt(num_elements)


def test_each_group_has_its_own_size_in_each_step() -> None:
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), ())]
    groups = [
        {"params": params[:2], "name": "two"},
        {"params": params[2:], "name": "scalar", "policy": ClipModelRMS(1.0) & ClipNorm(10.0)},
    ]
    clipper = Clipper(groups, ClipModelRMS(1e-3))
    for _ in range(3):
        for param in params:
            param.grad = torch.full_like(param, 7.0)
        limits = {name: limit.item() for name, limit in clipper.clip_().limits.items()}
        assert limits == pytest.approx({"two": limit_of(17), "scalar": 1.0})
        params[1].grad = None  # a tensor without a gradient has its elements still


def test_a_model_that_grows_has_another_size() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    clipper = Clipper(model, ClipModelRMS(1e-3))
    for num_elements in (9 + 4, 9 + 16):
        for param in model.parameters():
            param.grad = torch.full_like(param, 7.0)
        assert clipper.clip_().limit.item() == pytest.approx(limit_of(num_elements))
        model[1] = nn.Linear(3, 4)


def on_layouts(device: str) -> None:
    for placed in LAYOUTS.values():
        wholes = random_wholes(placed, 0)
        limit = Clipper(lay_out(wholes, placed, device), ClipModelRMS(1e-3)).clip_().limit
        assert limit.item() == pytest.approx(limit_of(sum(whole.numel() for whole in wholes)))


def test_every_layout_has_the_size_of_the_whole_model(four_ranks: Ranks) -> None:
    four_ranks.run(on_layouts, four_ranks.device)


def in_wrappers() -> None:
    expected = limit_of(sum(param.numel() for param in wrapped.make_model().parameters()))
    for kind in wrapped.WRAPPERS:
        report = Clipper(wrapped.with_gradients(kind, "cpu"), ClipModelRMS(1e-3)).clip_()
        assert report.limit.item() == pytest.approx(expected), kind


def test_wrapped_models_have_the_size_of_the_model_inside(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(in_wrappers)


def several_steps(clipper: Clipper) -> None:
    for _ in range(10):  # on an accelerator an error comes some steps later
        clipper.clip_()


def where_ranks_hold_different_parameters(device: str) -> None:
    on = mesh((2, 2), ("dp", "ep"), device)
    stages = mesh((2, 2), ("pp", "dp"), device)
    param = nn.Parameter(torch.zeros(2 + dist.get_rank(), device=on.device_type))
    experts = Layout(sharded={"ep"}, replicated={"dp"})
    of_experts: dict[str, Any] = {"mesh": on, "layouts": lambda *_: experts}
    of_stages: dict[str, Any] = {"mesh": stages}
    for options in (of_experts, of_stages):
        clipper = Clipper([param], ClipModelRMS(1e-3), **options)
        param.grad = torch.ones_like(param)
        with pytest.raises(ValueError, match="ClipModelRMS"):
            several_steps(clipper)


def test_a_size_that_only_a_collective_could_tell_is_no_limit(four_ranks: Ranks) -> None:
    four_ranks.run(where_ranks_hold_different_parameters, four_ranks.device)
