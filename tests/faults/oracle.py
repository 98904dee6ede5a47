"""What has to happen in a step, from float64 on the whole model: by `tests.support.reference`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distclip import (
    AGC,
    AGGC,
    AdaGC,
    AdaGN,
    AutoClip,
    ClipBlockRMS,
    ClipValue,
    Scope,
    SkipSpike,
    ZClip,
)
from distclip.policies.base import Minimum
from tests.support import reference

MOST = 2.0**100  # no norm is raised by more


class Verdict(NamedTuple):
    """
    Attributes:
        total: the norm of all gradients.
        finite: whether float32 holds it.
        vetoed: whether the policy leaves out the step.
        factors: of each group of elements that share one; NaN and 0 as they propagate.
        bound: what elements are clamped to; else None.
        loss: the mean of the losses that were given; None where there are none.
    """

    total: float
    finite: bool
    vetoed: bool
    factors: Tensor
    bound: float | None
    loss: float | None = None


class Past(NamedTuple):
    """The norms of the steps that counted: of everything, and of each tensor; and their losses."""

    totals: list[float]
    of_tensors: list[list[float]]
    losses: list[float]


def no_past() -> Past:
    return Past([], [], [])


def groups_of(policy: Any, shapes: Sequence[torch.Size]) -> Tensor:
    """Of each element of all tensors, one after another, the group with which it shares a factor.

    Groups have consecutive numbers from 0.
    """
    groups, first = [], 0
    for shape in shapes:
        if policy.scope in (Scope.MODEL, Scope.ELEMENT):
            groups.append(torch.zeros(shape.numel(), dtype=torch.long))
            continue
        is_cut = policy.scope is Scope.UNIT and len(shape) > 1
        num = shape[0] if is_cut else 1
        each = torch.arange(first, first + num)
        groups.append(each.repeat_interleave(shape.numel() // max(num, 1)))
        first += num
    return torch.cat(groups)


def judge(
    policy: Any,
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    past: Past,
    losses: Sequence[float] = (),
) -> Verdict:
    """
    Args:
        grads, weights: whole, float64; gradients without the loss scale.
        losses: of the ranks that gave one.
    """
    total = reference.total_norm(grads, policy.norm_type).item()
    finite = bool(torch.tensor(total, dtype=torch.float64).float().isfinite())
    loss = sum(losses) / len(losses) if losses else None
    spikes = [each for each in _parts(policy) if isinstance(each, SkipSpike)]
    accepts = all(_accepts(each, [*past.totals, total]) for each in spikes)
    if loss is not None:
        accepts = accepts and all(_accepts_loss(each, past.losses, loss) for each in spikes)
    bound = policy.clip_value if isinstance(policy, ClipValue) else None
    factors = _factors(policy, grads, weights, past, total)
    return Verdict(total, finite, finite and not accepts, factors, bound, loss)


def remember(verdict: Verdict, grads: Sequence[Tensor], past: Past) -> None:
    """A step that is not finite or vetoed changes nothing that a policy knows."""
    if verdict.finite and not verdict.vetoed:
        past.totals.append(verdict.total)
        past.of_tensors.append(_norms(grads, 2.0).tolist())
        past.losses.extend([] if verdict.loss is None else [verdict.loss])


def _parts(policy: Any) -> list[Any]:
    return [policy.first, policy.second] if isinstance(policy, Minimum) else [policy]


def _accepts(spike: SkipSpike, totals: list[float]) -> bool:
    return reference.accepts(totals, spike.z_thresh, spike.window, spike.max_norm)[-1]


def _accepts_loss(spike: SkipSpike, past: list[float], loss: float) -> bool:
    """A loss that is not finite is none of those that follow from the weights."""
    known = reference.accepts([*past, loss], spike.z_thresh, spike.window, math.inf)
    return math.isfinite(loss) and known[-1]


def _norms(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    return torch.stack([reference.total_norm([grad], norm_type) for grad in grads])


def _factors(
    policy: Any, grads: Sequence[Tensor], weights: Sequence[Tensor], past: Past, total: float
) -> Tensor:
    if isinstance(policy, ClipValue | SkipSpike):
        return torch.ones(1, dtype=torch.float64)
    if isinstance(policy, AGC):
        rows = list(map(reference.units, grads))
        norms = torch.cat([each.norm(policy.norm_type, dim=1) for each in rows])
        sizes = [w.norm(policy.norm_type, dim=1) for w in map(reference.units, weights)]
        return _below(policy.clip_factor * torch.cat(sizes).clamp(min=policy.eps), norms)
    if policy.scope is Scope.TENSOR:
        return _factors_of_tensors(policy, grads, past)
    totals = [*past.totals, total]
    number = torch.tensor([total], dtype=torch.float64)
    if isinstance(policy, AGGC):
        rest = (policy.low, policy.high, policy.beta, policy.max_down, policy.max_up)
        return _towards(torch.full_like(number, reference.aggc(totals, *rest)[-1]), number)
    return _below(torch.full_like(number, _limit(policy, totals)), number)


def _factors_of_tensors(policy: Any, grads: Sequence[Tensor], past: Past) -> Tensor:
    norms = _norms(grads, policy.norm_type)
    steps = [*past.of_tensors, norms.tolist()]
    if isinstance(policy, AdaGN):
        new = reference.adagn(steps, policy.gamma1, policy.gamma2, policy.eps)[-1]
        return _towards(new, norms)
    if isinstance(policy, AdaGC):
        rest = (policy.ratio, policy.max_norm, policy.beta, policy.warmup_steps)
        return _below(reference.adagc(steps, *rest)[-1], norms)
    if isinstance(policy, ClipBlockRMS):
        sizes = torch.tensor([grad.numel() for grad in grads], dtype=torch.float64)
        return _below(policy.threshold * sizes.sqrt(), norms)
    return _below(torch.full_like(norms, policy.max_norm), norms)


def _limit(policy: Any, totals: list[float]) -> float:
    """For the last one of the norms."""
    if isinstance(policy, AutoClip):
        totals = [each for each in totals if math.isfinite(each)]
        if not totals:
            return math.inf
        return reference.autoclip(totals, policy.percentile, policy.history)[-1]
    if isinstance(policy, ZClip):
        rest = (policy.z_thresh, policy.alpha, policy.warmup_steps, policy.max_norm)
        return reference.zclip(totals, *rest)[-1]
    return min(each.max_norm for each in _parts(policy) if not isinstance(each, SkipSpike))


def _below(limits: Tensor, norms: Tensor) -> Tensor:
    """min(1, limit / norm), and 1 where the norm is within the limit, at 0 and infinity too."""
    return torch.where(norms <= limits, 1.0, limits / norms)


def _towards(new: Tensor, norms: Tensor) -> Tensor:
    """new / norm, also where that is more than 1; a norm of 0 stays, and an infinite one allows."""
    stays = (norms == 0) | (new == math.inf)
    return torch.where(stays, 1.0, (new / norms).clamp(max=MOST))
