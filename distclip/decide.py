"""The rooms in order: measure, reduce, limit, apply, report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distclip import apply, measure, nonfinite, reduce
from distclip.plan import Plan
from distclip.policies import Policy
from distclip.report import Report


@dataclass(frozen=True)
class Decision:
    """What one step found, and what is to become of the gradients.

    Attributes:
        values: of the gradients on this rank; None where a parameter has none.
        local: what this rank measured.
        norm: float64; without the loss scale, as the limit is.
        finite: whether the norm is, as a float32.
        limit: None where the policy only measures.
        coefficient: float64; as `rule`, the clipper's `on_nonfinite`, wants it.
        factor: the coefficient times the inverse loss scale; None where nothing is to be multiplied.
    """

    values: Sequence[Tensor | None]
    local: measure.Local
    norm: Tensor
    finite: Tensor
    limit: Tensor | None
    coefficient: Tensor
    factor: Tensor | None
    rule: str


def decide(
    values: Sequence[Tensor | None], plan: Plan, policy: Policy, inverse_scale: Tensor | None, rule: str
) -> Decision:
    """Reads every gradient once, and changes none. Collective: see `reduce.all_reduce_`."""
    norm, local = total_norm(values, plan)
    inverse = None if inverse_scale is None else inverse_scale.to(norm.device)
    norm = norm if inverse is None else norm * inverse
    finite = norm.float().isfinite()
    limit, coefficient = limit_of(policy, norm)
    factor = coefficient if inverse is None else coefficient * inverse
    ruled = nonfinite.ruled(factor, finite, rule)
    untouched = limit is None and inverse is None
    coefficient = nonfinite.ruled(coefficient, finite, rule)
    return Decision(values, local, norm, finite, limit, coefficient, None if untouched else ruled, rule)


def write_(decision: Decision) -> None:
    """The one pass that writes; with "zero" on an accelerator there is another."""
    values = [v for v in decision.values if v is not None]
    if decision.factor is not None:
        apply.scale_(values, decision.factor)
    if decision.rule == "zero":
        apply.zero_(values, ~decision.finite)


def report_of(decision: Decision, plan: Plan) -> Report:
    norm, coefficient = decision.norm.float(), decision.coefficient.float()
    limit = torch.full_like(norm, math.inf) if decision.limit is None else decision.limit.float()
    search = partial(nonfinite.offenders, decision.local, plan)
    return Report({"all": norm}, {"all": limit}, {"all": coefficient}, total_norm=norm, search=search)


def total_norm(values: Sequence[Tensor | None], plan: Plan) -> tuple[Tensor, measure.Local]:
    """The norm, float64, the same on every rank; and what this rank measured for it."""
    local = measure.local(values, plan)
    sums = local.columns.clone()
    reduce.all_reduce_(sums, plan)
    (norm,) = reduce.norms(sums, plan)
    return norm, local


def limit_of(policy: Policy, norm: Tensor) -> tuple[Tensor | None, Tensor]:
    """The limit and the coefficient for a total norm; without a limit nothing is to be written."""
    limit = policy.limit(norm)
    return limit, torch.ones_like(norm) if limit is None else apply.coefficient(norm, limit)
