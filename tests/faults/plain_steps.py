"""One step of clipping on whole float64 tensors, as the documents of `Clipper` have it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distclip.policies import Scope
from tests.faults.plain import Norms, Plain, plain
from tests.support import reference

NEAR = 1e-6  # so near to what a policy accepts, rounding decides


@dataclass
class Group:
    """A parameter group: the names of its parameters, and what its policy remembers."""

    name: str
    policy: Any
    names: list[str]
    plain: Plain

    @classmethod
    def made(cls, name: str, policy: Any, names: Sequence[str]) -> Group:
        return cls(name, policy, list(names), plain(policy))


class GroupStep(NamedTuple):
    """What happens to a group; limits and coefficients of its rows, norms of all of it."""

    seen: Norms
    norm: float
    limits: list[float] | None
    coefficients: list[float]


class Step(NamedTuple):
    """
    Attributes:
        vetoed: None where rounding decides.
        clipped: by name, float64; as if the step were accepted.
    """

    groups: list[GroupStep]
    total: float
    finite: bool
    vetoed: bool | None
    clipped: dict[str, Tensor]

    @property
    def is_at_limit(self) -> bool:
        """Whether rounding decides if some norm is above its limit."""
        each = [zip(g.seen.norms, g.limits or [], strict=False) for g in self.groups]
        return any(
            math.isclose(norm, limit, rel_tol=1e-6) for pairs in each for norm, limit in pairs
        )


def rows_of(group: Group, weights: Mapping[str, Tensor]) -> list[tuple[str, Any]]:
    """The name of each row, and how to take it out of the tensor of that name."""
    if group.policy.scope is Scope.TENSOR:
        return [(name, ...) for name in group.names]
    if group.policy.scope is not Scope.UNIT:
        return []
    return [
        (name, index if weights[name].ndim > 1 else ...)
        for name in group.names
        for index in (range(weights[name].shape[0]) if weights[name].ndim > 1 else [0])
    ]


def norm_of(tensors: Sequence[Tensor], policy: Any) -> float:
    return reference.total_norm(tensors, policy.norm_type).item()


def expected(
    groups: Sequence[Group],
    weights: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    single: bool,
    loss: float | None = None,
) -> Step:
    """What one step does to `grads`, which are float64 and have no other factor any more.

    Args:
        weights: of all parameters, float64; those without a gradient too.
        single: norms are reported, and judged, in float32.
        loss: what is judged beside them.
    """
    norms = [norm_of([grads[n] for n in g.names if n in grads], g.policy) for g in groups]
    total = norms[0]
    if len(norms) > 1:
        each = torch.tensor(norms, dtype=torch.float64)
        total = reference.total_norm([each], groups[0].policy.norm_type).item()
    found = [one(g, n, weights, grads, loss) for g, n in zip(groups, norms, strict=True)]
    finite = bool(torch.tensor(total, dtype=torch.float32 if single else torch.float64).isfinite())
    vetoed: bool | None = False
    each = zip(groups, found, strict=True)
    judged = [(step.norm, group.plain.accepts(step.norm)) for group, step in each]
    if loss is not None:
        number = loss if math.isfinite(loss) else math.inf
        judged += [(number, group.plain.accepts_loss(loss)) for group in groups]
    for number, highest in judged:
        if math.isfinite(highest) and abs(number - highest) <= NEAR * abs(highest):
            vetoed = vetoed or None
        elif not number <= highest:
            vetoed = True
    clipped = {}
    for group, step in zip(groups, found, strict=True):
        clipped |= applied(group, step, weights, grads)
    return Step(found, total, finite, finite and vetoed, clipped)


def one(
    group: Group,
    norm: float,
    weights: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    loss: float | None,
) -> GroupStep:
    rows = rows_of(group, weights)
    names, norms, sizes, of_weights = [""], [norm], [1], [0.0]
    if group.policy.scope in (Scope.TENSOR, Scope.UNIT):
        none = torch.zeros(0)
        names = [name for name, _ in rows]
        norms = [norm_of([grads[n][i]] if n in grads else [none], group.policy) for n, i in rows]
        sizes = [weights[name].numel() for name in names]
        of_weights = [norm_of([weights[name][i]], group.policy) for name, i in rows]
    seen = Norms(names, norms, sizes, of_weights, norm, loss)
    limits = group.plain.limits(seen)
    if limits is None:
        return GroupStep(seen, norm, None, [1.0] * len(norms))
    pairs = zip(norms, limits, strict=True)
    coefficient = raising_ratio if group.policy.raises else ratio
    return GroupStep(seen, norm, limits, [coefficient(n, lim) for n, lim in pairs])


def ratio(norm: float, limit: float) -> float:
    if norm <= limit:
        return 1.0
    return limit / norm if norm else math.nan


def raising_ratio(norm: float, limit: float) -> float:
    """At most 2**100, which float32 has room for."""
    return 1.0 if norm == 0 or limit == math.inf else min(limit / norm, 2.0**100)


def applied(
    group: Group, step: GroupStep, weights: Mapping[str, Tensor], grads: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    mine = {name: grads[name].clone() for name in group.names if name in grads}
    if step.limits is None:
        return mine
    if group.policy.scope is Scope.ELEMENT:
        return {name: grad.clamp(-step.limits[0], step.limits[0]) for name, grad in mine.items()}
    rows = rows_of(group, weights) or [(name, ...) for name in group.names]
    factors = step.coefficients if len(rows) == len(step.coefficients) else []
    factors = factors or step.coefficients * len(rows)
    for (name, index), factor in zip(rows, factors, strict=True):
        if name in mine and factor != 1:
            mine[name][index] *= factor
    return mine
