"""Policies that users write: what `PolicyBase` gives them, and what is refused as no policy."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from distclip import Clipper
from distclip.policies import (
    ClipNorm,
    ClipTensorNorm,
    EmptyState,
    NormContext,
    Policy,
    PolicyBase,
    Scope,
    StatelessPolicy,
    check_policy,
)
from tests.policies.steps import POLICIES
from tests.support.layouts import LAYOUTS, lay_out, random_wholes
from tests.support.ranks import Ranks


@dataclass(frozen=True)
class RootOfSize(StatelessPolicy):
    """Each tensor's norm is at most the square root of its number of elements."""

    scope = Scope.TENSOR
    norm_type = 2.0

    def limit(
        self, norms: Tensor, state: EmptyState, context: NormContext
    ) -> tuple[Tensor, EmptyState]:
        return context.sizes.sqrt(), state


class LastNorms(NamedTuple):
    norms: Tensor


@dataclass(frozen=True)
class NoFasterThan(PolicyBase):
    """Each tensor's norm is at most `factor` times the norm before clipping of the last step."""

    factor: float
    scope = Scope.TENSOR
    norm_type = 2.0

    def init(self, num_groups: int, device: torch.device) -> LastNorms:
        return LastNorms(torch.full((num_groups,), torch.inf, dtype=torch.float64, device=device))

    def limit(
        self, norms: Tensor, state: LastNorms, context: NormContext
    ) -> tuple[Tensor, LastNorms]:
        return self.factor * state.norms, LastNorms(norms)


def clipper_of(policy: Policy[Any], grads: list[Tensor]) -> tuple[Clipper, list[nn.Parameter]]:
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    return Clipper([(f"w{i}", param) for i, param in enumerate(params)], policy), params


def clipped_gradient_norms(
    clipper: Clipper, params: list[nn.Parameter], grads: list[Tensor]
) -> list[float]:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    clipper.clip_()
    return [round(param.grad.norm().item(), 4) for param in params]


GRADS = [torch.full((4,), 5.0), torch.full((9,), 0.1)]  # norms 10 and 0.3


def test_a_stateless_policy_needs_scope_norm_type_and_limit() -> None:
    clipper, params = clipper_of(RootOfSize(), GRADS)
    assert clipped_gradient_norms(clipper, params, GRADS) == [2.0, 0.3]
    assert RootOfSize().init(2, torch.device("cpu")) == EmptyState()


def test_a_policy_with_a_state_keeps_it_from_step_to_step_and_saves_it_by_name() -> None:
    clipper, params = clipper_of(NoFasterThan(2.0), GRADS)
    assert clipped_gradient_norms(clipper, params, GRADS) == [10.0, 0.3]
    saved = clipper.state_dict()["groups"]["all"]
    assert list(saved) == ["NoFasterThan"]
    assert {n: round(t.item(), 4) for n, t in saved["NoFasterThan"]["norms"].items()} == {
        "w0": 10.0,
        "w1": 0.3,
    }
    assert clipped_gradient_norms(clipper, params, [10 * g for g in GRADS]) == [20.0, 0.6]


@dataclass(frozen=True)
class NoUnitFasterThan(NoFasterThan):
    scope = Scope.UNIT


def test_numbers_of_units_are_saved_in_one_process() -> None:
    """Rows have no names of their own: they are saved in order."""
    grads = [torch.tensor([[3.0, 4.0], [0.6, 0.8]]), torch.tensor([2.0])]
    clipper, params = clipper_of(NoUnitFasterThan(2.0), grads)
    clipped_gradient_norms(clipper, params, grads)
    saved = clipper.state_dict()
    other, _ = clipper_of(NoUnitFasterThan(2.0), grads)
    other.load_state_dict(saved)
    norms = other.state_dict()["groups"]["all"]["NoUnitFasterThan"]["norms"]
    assert norms.tolist() == pytest.approx([5.0, 1.0, 2.0])


def test_numbers_of_units_do_not_outlive_a_change_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    clipper = Clipper(model, NoUnitFasterThan(2.0))
    model(torch.ones(1, 2)).sum().backward()
    clipper.clip_()
    model[1] = nn.Linear(3, 4)
    model(torch.ones(1, 2)).sum().backward()
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="cannot carry over what NoUnitFasterThan remembers"):
        clipper.clip_()
    after = [None if p.grad is None else p.grad for p in model.parameters()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


class Steps(NamedTuple):
    count: Tensor


@dataclass(frozen=True)
class UnitsLater(PolicyBase):
    """Each unit's norm is at most `max_norm`, but not in the first step."""

    max_norm: float
    scope = Scope.UNIT
    norm_type = 2.0

    def init(self, num_groups: int, device: torch.device) -> Steps:
        return Steps(torch.zeros((), dtype=torch.int64, device=device))

    def limit(self, norms: Tensor, state: Steps, context: NormContext) -> tuple[Tensor, Steps]:
        limit = torch.where(state.count > 0, self.max_norm, torch.inf)
        return limit.double().expand_as(norms), Steps(state.count + 1)


def of_sharded_units(device: str) -> None:
    placed = LAYOUTS["fsdp"]
    params = lay_out(random_wholes(placed, 0), placed, device)
    clipper = Clipper(params, NoUnitFasterThan(2.0))
    clipper.clip_()
    with pytest.raises(ValueError, match="cannot save what NoUnitFasterThan remembers"):
        clipper.state_dict()
    with pytest.raises(ValueError, match="cannot load what NoUnitFasterThan remembers"):
        clipper.load_state_dict({"version": 1})
    clipper = Clipper(params, UnitsLater(2.0))
    clipper.clip_()
    saved = clipper.state_dict()
    assert saved["groups"]["all"]["UnitsLater"]["count"] == 1  # of the model, not of units
    clipper.load_state_dict(saved)


def test_numbers_of_units_that_ranks_share_are_not_saved(four_ranks: Ranks) -> None:
    four_ranks.run(of_sharded_units, four_ranks.device)


def test_own_policies_combine_with_others() -> None:
    policy = RootOfSize() & ClipTensorNorm(1.5) & NoFasterThan(0.01)
    clipper, params = clipper_of(policy, GRADS)
    assert clipped_gradient_norms(clipper, params, GRADS) == [1.5, 0.3]
    assert clipped_gradient_norms(clipper, params, GRADS) == [0.1, 0.003]


def test_the_base_gives_every_member_but_four() -> None:
    members = {name for name in vars(Policy) if not name.startswith("_")}
    given = {name for name, _ in inspect.getmembers(PolicyBase) if not name.startswith("_")}
    assert members - given == {"scope", "norm_type", "init", "limit"}
    assert (PolicyBase.unit_dim, PolicyBase.exclude, PolicyBase.needs_weights) == (0, (), False)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_pass_the_check(name: str) -> None:
    check_policy(POLICIES[name])


def lacking(name: str) -> object:
    members = {member for member in vars(Policy) if not member.startswith("_")}
    return type("Own", (), {m: getattr(ClipNorm(1.0), m) for m in members - {name}})()


@pytest.mark.parametrize("name", [name for name in vars(Policy) if not name.startswith("_")])
def test_a_policy_that_lacks_a_member_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(TypeError, match=rf"it has no `{name}`.*derive from distclip\.PolicyBase"):
        check_policy(lacking(name))


def test_an_object_with_all_members_passes_without_the_base() -> None:
    check_policy(lacking("nothing"))


class StringScope(RootOfSize):
    scope = "tensor"  # type: ignore[assignment]


NO_POLICIES: dict[str, tuple[Any, str]] = {
    "None": (None, r"policy None: it has no `scope`"),
    "a number": (1.0, r"policy 1\.0: it has no `scope`"),
    "a string": ("clip-norm", r"policy 'clip-norm': it has no `scope`"),
    "a class": (ClipNorm, r"policy <class .*ClipNorm'>: it is a class"),
    "a scope of another type": (
        StringScope(),
        r"policy .*: its scope is 'tensor'.*distclip\.Scope",
    ),
}


@pytest.mark.parametrize("name", NO_POLICIES)
def test_what_is_no_policy_is_refused(name: str) -> None:
    policy, message = NO_POLICIES[name]
    match = rf"cannot clip with the {message}.*derive from distclip\.PolicyBase"
    with pytest.raises(TypeError, match=match) as caught:
        check_policy(policy)
    assert len(str(caught.value).split()) > 20  # attempted, found, why, what to do
