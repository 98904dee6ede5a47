"""What has to happen in a step, from float64 on the whole model: by `tests.support.reference`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distclip import AGC, AdaGC, AutoClip, ClipBlockRMS, ClipValue, Scope, SkipSpike, ZClip
from distclip.policies.base import Minimum
from tests.support import reference


class Verdict(NamedTuple):
    """
    Attributes:
        total: the norm of all gradients.
        finite: whether float32 holds it.
        vetoed: whether the policy leaves out the step.
        factors: of each group of elements that share one; NaN and 0 as they propagate.
        bound: what elements are clamped to; else None.
    """

    total: float
    finite: bool
    vetoed: bool
    factors: Tensor
    bound: float | None


class Past(NamedTuple):
    """The norms of the steps that counted: of everything, and of each tensor."""

    totals: list[float]
    of_tensors: list[list[float]]


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


def judge(policy: Any, grads: Sequence[Tensor], weights: Sequence[Tensor], past: Past) -> Verdict:
    """
    Args:
        grads, weights: whole, float64; gradients without the loss scale.
    """
    total = reference.total_norm(grads, policy.norm_type).item()
    finite = bool(torch.tensor(total, dtype=torch.float64).float().isfinite())
    spikes = [each for each in _parts(policy) if isinstance(each, SkipSpike)]
    vetoed = finite and not all(_accepts(each, [*past.totals, total]) for each in spikes)
    bound = policy.clip_value if isinstance(policy, ClipValue) else None
    return Verdict(total, finite, vetoed, _factors(policy, grads, weights, past, total), bound)


def remember(verdict: Verdict, grads: Sequence[Tensor], past: Past) -> None:
    """A step that is not finite or vetoed changes nothing that a policy knows."""
    if verdict.finite and not verdict.vetoed:
        past.totals.append(verdict.total)
        past.of_tensors.append(_norms(grads, 2.0).tolist())


def _parts(policy: Any) -> list[Any]:
    return [policy.first, policy.second] if isinstance(policy, Minimum) else [policy]


def _accepts(spike: SkipSpike, totals: list[float]) -> bool:
    return reference.accepts(totals, spike.z_thresh, spike.window, spike.max_norm)[-1]


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
    if isinstance(policy, AdaGC):
        norms = _norms(grads, 2.0)
        steps = [*past.of_tensors, norms.tolist()]
        rest = (policy.ratio, policy.max_norm, policy.beta, policy.warmup_steps)
        return _below(reference.adagc(steps, *rest)[-1], norms)
    if policy.scope is Scope.TENSOR:
        norms = _norms(grads, policy.norm_type)
        if isinstance(policy, ClipBlockRMS):
            sizes = torch.tensor([grad.numel() for grad in grads], dtype=torch.float64)
            return _below(policy.threshold * sizes.sqrt(), norms)
        return _below(torch.full_like(norms, policy.max_norm), norms)
    norms, limit = [*past.totals, total], math.inf
    if isinstance(policy, AutoClip):
        limit = reference.autoclip(norms, policy.percentile, policy.history)[-1]
    elif isinstance(policy, ZClip):
        rest = (policy.z_thresh, policy.alpha, policy.warmup_steps, policy.max_norm)
        limit = reference.zclip(norms, *rest)[-1]
    else:
        limit = min(each.max_norm for each in _parts(policy) if not isinstance(each, SkipSpike))
    both = torch.tensor([[limit], [total]], dtype=torch.float64)
    return _below(both[0], both[1])


def _below(limits: Tensor, norms: Tensor) -> Tensor:
    """min(1, limit / norm), and 1 where the norm is within the limit, at 0 and infinity too."""
    return torch.where(norms <= limits, 1.0, limits / norms)
