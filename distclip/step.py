"""The rooms in order: measure, reduce, limit, apply, report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distclip import apply, kernels, nonfinite
from distclip.norms import measure, reduce
from distclip.norms.plan import Group, Plan
from distclip.policies import NormContext, Scope
from distclip.report import Report


@dataclass(frozen=True)
class GroupClip:
    """What the policy of one group says.

    Attributes:
        norm: of the whole group, float64; without the loss scale, as limits are.
        limits, coefficients: float64; scalars, or one for each unit on this rank. No limits: the policy only measures.
        state: of the policy, if this step counts.
    """

    norm: Tensor
    limits: Tensor | None
    coefficients: Tensor
    state: Any


@dataclass(frozen=True)
class Decision:
    """What one step found, and what is to become of the gradients.

    Attributes:
        values: of the gradients on this rank; None where a parameter has none.
        local: what this rank measured.
        norm: of everything, float64.
        finite: whether it is, as a float32.
        inverse: of the loss scale.
        rule: the clipper's `on_nonfinite`.
    """

    plan: Plan
    values: Sequence[Tensor | None]
    local: measure.LocalNorms
    norm: Tensor
    finite: Tensor
    verdicts: Sequence[GroupClip]
    inverse: Tensor | None
    rule: str

    @property
    def factor(self) -> Tensor | None:
        """What everything is multiplied by, if that is one number; None where nothing is to be multiplied."""
        return self.factor_of(self.verdicts[0])

    def factor_of(self, verdict: GroupClip) -> Tensor | None:
        if verdict.limits is None and self.inverse is None:
            return None
        factor = verdict.coefficients if self.inverse is None else verdict.coefficients * self.inverse
        return nonfinite.ruled(factor, self.finite, self.rule)

    def applied_to(self, values: Sequence[Tensor | None], inverse: Tensor | None) -> Decision:
        """The same verdicts for values that lie elsewhere than those measured, times another scale's inverse."""
        local = self.local._replace(pieces=[None] * len(self.plan.groups))
        return replace(self, values=values, local=local, inverse=inverse)


def decide(
    values: Sequence[Tensor | None],
    local: measure.LocalNorms,
    plan: Plan,
    states: Sequence[Any],
    inverse_scale: Tensor | None,
    rule: str,
) -> Decision:
    """Changes no gradient. Collective: see `reduce.all_reduce_`."""
    joined = norms(local, plan)
    inverse = None if inverse_scale is None else inverse_scale.to(plan.device).double()
    if inverse is not None:
        joined = [j.times(inverse) for j in joined]
    total = total_norm(joined, plan)
    verdicts = [_verdict(j, group, state) for j, group, state in zip(joined, plan.groups, states, strict=True)]
    finite = total.float() < math.inf  # one operation; `isfinite` is four
    return Decision(plan, values, local, total, finite, verdicts, inverse, rule)


def norms(local: measure.LocalNorms, plan: Plan) -> list[reduce.GroupNorms]:
    """The norms of every group, float64, the same on every rank that keeps them."""
    numbers = local.numbers
    if plan.reduce_mesh is not None:
        reduce.all_reduce_(numbers := numbers.clone(), plan)
    return reduce.norms(numbers, local.units, local.weights, plan)


def total_norm(joined: Sequence[reduce.GroupNorms], plan: Plan) -> Tensor:
    """The norm over all groups, of the first one's norm_type: the p-norm of the groups' norms, without overflow."""
    if len(joined) == 1:
        return joined[0].total
    each = torch.stack([j.total for j in joined])
    largest = each.amax()
    if math.isinf(norm_type := plan.groups[0].norm_type):
        return largest
    within = ((each / largest) ** norm_type).sum() ** (1 / norm_type)
    return torch.where((largest == 0) | largest.isinf(), largest, largest * within)


def _verdict(joined: reduce.GroupNorms, group: Group, state: Any) -> GroupClip:
    units = group.units
    each = joined.total if joined.units is None else joined.units
    sizes = units.sizes if units is not None else torch.ones_like(each)
    limits, new = group.policy.limit(each, state, NormContext(sizes, joined.weights, joined.total))
    if limits is None:
        return GroupClip(joined.total, None, torch.ones_like(each), new)
    if units is not None:
        limits = torch.where(units.limited, limits, math.inf)
    return GroupClip(joined.total, limits, apply.coefficient(each, limits), new)


def write_(decision: Decision) -> None:
    """The one pass that writes; with "zero" on an accelerator there is another."""
    for place in range(len(decision.plan.groups)):
        _write_group_(decision, place)
    if decision.rule == "zero":
        apply.zero_(kernels.pieces([v for v in decision.values if v is not None]), ~decision.finite)


def _write_group_(decision: Decision, place: int) -> None:
    group, verdict = decision.plan.groups[place], decision.verdicts[place]
    if group.policy.scope is Scope.ELEMENT:
        pieces = _pieces(decision, place)
        if decision.inverse is not None:
            apply.scale_(pieces, nonfinite.ruled(decision.inverse, decision.finite, decision.rule))
        if verdict.limits is not None:
            apply.clamp_(pieces, nonfinite.bound(verdict.limits, decision.finite, decision.rule))
    elif (factor := decision.factor_of(verdict)) is not None:
        if group.units is not None:
            apply.scale_units_(group.units.views(decision.values[group.members]), factor)
        elif not apply.is_one(factor):
            apply.scale_(_pieces(decision, place), factor)


def _pieces(decision: Decision, place: int) -> apply.Pieces:
    if (measured := decision.local.pieces[place]) is not None:
        return measured
    return kernels.pieces([v for v in decision.values[decision.plan.groups[place].members] if v is not None])


def report_of(decision: Decision) -> Report:
    plan = decision.plan
    named = list(zip((group.name for group in plan.groups), decision.verdicts, strict=True))
    ruled = {n: nonfinite.ruled(v.coefficients, decision.finite, decision.rule) for n, v in named}
    return Report(
        {name: verdict.norm.float() for name, verdict in named},
        {name: _least(verdict.limits, math.inf, decision.norm) for name, verdict in named},
        {name: _least(coefficients, 1.0, decision.norm) for name, coefficients in ruled.items()},
        total_norm=decision.norm.float(),
        # Not all of `local`, whose pieces are the gradients themselves.
        search=partial(nonfinite.nonfinite_parameters, decision.local.names, decision.local.each, plan),
    )


def _least(numbers: Tensor | None, without: float, like: Tensor) -> Tensor:
    if numbers is None or numbers.numel() == 0:
        return torch.full_like(like, without).float()
    return numbers.float() if numbers.ndim == 0 else numbers.amin().float()


def kept(decision: Decision, old: Sequence[Any]) -> list[Any]:
    """The policies' states after the step: the old ones where the norm was not finite."""
    return [_where(decision.finite, v.state, state) for v, state in zip(decision.verdicts, old, strict=True)]


def _where(finite: Tensor, new: Any, old: Any) -> Any:
    if isinstance(new, Tensor):
        return torch.where(finite.to(new.device), new, old)
    return type(new)(*(_where(finite, a, b) for a, b in zip(new, old, strict=True)))
