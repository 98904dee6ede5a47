"""What may be written, to the bit, where a group of elements is multiplied by one factor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.faults.oracle import Verdict

Candidate = Callable[[Any, Any], Any]


def candidates_of(verdict: Verdict, scale: float, folds: bool) -> Iterator[Candidate]:
    """What may be written for gradients, given the groups of their elements; the exact one first.

    Products with float32 numbers near the factor; quotients, as fused optimizers write them.
    """
    factors = verdict.factors.numpy()
    if verdict.bound is not None:
        bound = np.float32(verdict.bound)
        yield lambda base, groups: np.clip(base * np.float32(1 / scale), -bound, bound)
        return
    whole, inverse = factors / scale, scale / factors
    yield lambda base, groups: (base.astype(np.float64) * whole[groups]).astype(np.float32)
    if folds:  # what fused optimizers are given is the inverse, which float32 may not hold
        known = np.where(np.isinf(inverse.astype(np.float32)), 0.0, whole)
        yield lambda base, groups: (base.astype(np.float64) * known[groups]).astype(np.float32)
    for ulps in range(-2, 3):
        by, of = (
            np.where(factors == 1, each.astype(np.float32), _moved(each.astype(np.float32), ulps))
            for each in (whole, inverse)
        )
        yield lambda base, groups, by=by: base * by[groups]
        yield lambda base, groups, of=of: base / of[groups]


def _moved(numbers: Any, ulps: int) -> Any:
    for _ in range(abs(ulps)):
        numbers = np.nextafter(numbers, np.float32(np.inf if ulps > 0 else -np.inf))
    return numbers
