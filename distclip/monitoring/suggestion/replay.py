"""A history's norms through policies: what each would have done in every step."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from decimal import ROUND_CEILING, Context
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distclip.monitoring.records import Floats, Ints, Run
from distclip.policies import NormContext, Policy, Scope, accept


class Series(NamedTuple):
    """The norms of one parameter group, or of the model where there is one group.

    Attributes:
        name: of the group; "" for the model.
        steps: int64 [number of rows].
        norms: before clipping; float64 [number of rows].
        finite: whether the total norm is, over all groups: policies forget the other steps.
        tensors: the norm of every tensor, where every row has them; float64 [number of rows,
            number of tensors].
    """

    name: str
    steps: Ints
    norms: Floats
    finite: NDArray[np.bool_]
    tensors: Floats | None


@dataclass(frozen=True)
class Replay:
    """What a policy would have done.

    Attributes:
        limits, coefficients: the smallest of each step, as in `Report`; float64 [number of rows].
            A coefficient is NaN where the norm is not finite.
        after: the norms after clipping; float64 [number of rows].
    """

    policy: Policy[Any]
    limits: Floats
    coefficients: Floats
    after: Floats


def series_of(run: Run) -> list[Series]:
    """Of each parameter group; without groups, of the model."""
    if not run.groups:
        norms = run.columns["total_norm"]
        return [Series("", run.steps, norms, run.finite, _norms_of_tensors(run))]
    groups: list[Series] = []
    for name, columns in run.groups.items():
        there = ~np.isnan(columns["norm"]) | ~run.finite  # an earlier start may have had others
        norms, finite = columns["norm"][there], run.finite[there]
        groups.append(Series(name, run.steps[there], norms, finite, None))
    return groups


def _norms_of_tensors(run: Run) -> Floats | None:
    tensors = run.tensors
    if len(tensors.rows) < len(run.steps) or np.isnan(tensors.norms[run.finite]).any():
        return None
    return tensors.norms


@torch.inference_mode()
def replay(policy: Policy[Any], series: Series) -> Replay:
    """Asks the policy for each step's limit, with the state that its earlier steps have left.

    That is what `Clipper` does: the state stays as it is where the total norm is not finite, and
    where the policy vetoes the step. The
    policy's scope is MODEL, or TENSOR where the series has the norms of tensors.
    """
    totals = torch.from_numpy(series.norms)
    norms = totals if policy.scope is Scope.MODEL else _tensors(series)
    limits: list[Tensor] = []
    state = policy.init(norms[0].numel(), torch.device("cpu"))
    sizes = torch.ones_like(norms[0])  # no policy that asks for them is replayed
    each = zip(norms.unbind(), totals.unbind(), series.finite.tolist(), strict=True)
    for norm, total, finite in each:
        context = NormContext(sizes, None, total)
        limit, next_state = policy.limit(norm, state, context)
        limits.append(torch.full_like(norm, math.inf) if limit is None else limit)
        accepted = accept(policy, norm, state, context)
        is_taken = finite and (accepted is None or bool(accepted))
        state = next_state if is_taken else state
    return _replay(policy, series, norms, torch.stack(limits))


def _tensors(series: Series) -> Tensor:
    assert series.tensors is not None
    return torch.from_numpy(series.tensors)


def _replay(policy: Policy[Any], series: Series, norms: Tensor, limits: Tensor) -> Replay:
    coefficients = (limits / norms).masked_fill_(norms <= limits, 1.0)  # as kernels.coefficients
    after: Tensor = torch.minimum(norms, limits)
    if policy.scope is Scope.TENSOR:
        after = after.square().sum(dim=1).sqrt()
        limits, coefficients = limits.amin(dim=1), coefficients.amin(dim=1)
    finite = torch.from_numpy(series.finite)
    coefficients = torch.where(finite, coefficients, math.nan)
    return Replay(policy, limits.numpy(), coefficients.numpy(), after.numpy())


def threshold(norms: Floats, percent: int) -> float | None:
    """The limit that `percent` per cent of the norms exceed, rounded down to whole steps.

    Fewer do where norms are equal. Of all numbers that the same norms exceed, it has the fewest
    digits, at least two. None where `percent` is less than a step.
    """
    num = len(norms) * percent // 100
    if num == 0:
        return None
    ordered = np.sort(norms)
    lowest = float(ordered[-1 - num])
    above = ordered[ordered > lowest]
    next_norm = float(above[0]) if len(above) else math.inf
    rounded = (round_up(lowest, digits) for digits in range(2, 17))
    return next((each for each in rounded if each < next_norm), lowest)


def round_up(number: float, digits: int) -> float:
    """To so many significant digits."""
    exactly = Context(prec=30).create_decimal(number)
    return max(float(Context(prec=digits, rounding=ROUND_CEILING).plus(exactly)), number)


def code_of(policy: Policy[Any]) -> str:
    """As it can be pasted, without the arguments that are defaults."""
    arguments: list[str] = []
    for i, field in enumerate(fields(policy)):  # pyright: ignore[reportArgumentType]
        value = getattr(policy, field.name)
        if value != field.default:
            text = 'float("inf")' if value == math.inf else repr(value)
            arguments.append(text if i == 0 else f"{field.name}={text}")
    return f"distclip.{type(policy).__name__}({', '.join(arguments)})"
