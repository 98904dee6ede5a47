"""What a loop may rely on in a step, given what the oracle says about its gradients."""

from __future__ import annotations

from typing import NamedTuple

from tests.faults.cases import Case
from tests.faults.oracle import Verdict


class Expected(NamedTuple):
    """
    Attributes:
        reports: whether a report, or an error, comes at all.
        untouched: the gradients stay as they are; as they came, except for a loss scale.
        zeros: they become zero.
        may_stay: they may also stay as they are, because the scaler leaves out the step.
    """

    error: str
    reports: bool
    skipped: bool
    stepped: bool
    untouched: bool
    zeros: bool
    may_stay: bool
    halves: bool
    counts: bool


def expected(case: Case, verdict: Verdict, elements_finite: bool) -> Expected:
    finite, vetoed = verdict.finite, verdict.vetoed
    knows_scaler = case.scaled and not case.hidden_from_scaler
    if case.hidden_from_scaler and not elements_finite:
        return Expected("", False, False, False, True, False, False, True, False)
    raises = case.mode == "raise" and not finite
    skipped = vetoed or (case.mode == "skip" and not finite)
    left_by_scaler = knows_scaler and not (finite and not vetoed)
    counts = vetoed or (case.mode in ("skip", "zero") and not finite)
    return Expected(
        "NonFiniteGradientError" if raises else "",
        not raises,
        skipped,
        not (raises or skipped or left_by_scaler),
        raises or skipped,
        case.mode == "zero" and not finite,
        knows_scaler and case.fused and not finite and case.mode == "propagate",
        left_by_scaler,
        counts,
    )
