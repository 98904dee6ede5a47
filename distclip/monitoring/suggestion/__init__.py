"""Which policy a run's norms ask for, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from distclip.monitoring.records import Floats, Run
from distclip.monitoring.suggestion.caveats import (
    MOSTLY,
    caveats_of,
    clipped_share,
    columns_of,
    count,
    mean_coefficient,
    number,
    percent,
)
from distclip.monitoring.suggestion.outcomes import Facts, Outcome, outcome
from distclip.monitoring.suggestion.replay import code_of, round_up
from distclip.policies import AutoClip, ClipNorm, Policy, ZClip

# 1% of fewer steps is less than one step.
MIN_STEPS = 100
# A GradScaler doubles its scale every 2,000 steps and skips about one step then. More than this
# share of NaN or infinite norms has another cause.
MOST_NONFINITE = 0.01
# A GradScaler, which halves its scale in each, rarely skips so many steps in a row once it has
# found its scale: the weights are NaN.
MOST_NONFINITE_AT_END = 3
# Times the lowest level of the run, at its end: training diverges. Norms of healthy runs rise by
# about 10 times while the learning rate falls (Defazio, "Why gradients rapidly increase near the
# end of training", 2025, arXiv:2506.02285).
GROWTH = 100.0
# Times the lowest level of the run. With the noise on top, a constant above the highest level lets
# through what is a spike at the lowest: three times the usual norm.
DRIFT = 2.0
NUM_PARTS = 10  # of the run, each of which has a level: the median of its norms
# Per cent of the ordinary norms that a constant limit leaves as they are: it is for spikes, and
# clipping many ordinary steps is a lower learning rate.
PERCENTILE = 99.0
DIGITS = 2  # of a constant limit: a next run has other norms in the third


class Recommendation(NamedTuple):
    """
    Attributes:
        kind: "constant", "adaptive", "nothing to clip", "keep the limit", "fix the cause first" or
            "too few steps".
        code: the policy, as it can be pasted; None where the history tells none.
        reason: in plain words.
    """

    kind: str
    code: str | None
    reason: str


@dataclass(frozen=True)
class Suggestion:
    """What a run's norms say about policies, for the model or one parameter group.

    Attributes:
        group: its name; "" for the model.
        num_steps: with a finite norm above 0.
        num_first: rows at the start that are counted separately.
        usual_norm: the median of the ordinary norms after the first steps.
        spikes: their steps.
        notes: what the history cannot tell, a sentence each.
    """

    group: str
    num_steps: int
    num_first: int
    usual_norm: float
    spikes: Sequence[int]
    outcomes: Sequence[Outcome]
    recommendation: Recommendation
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return {
            **self.__dict__,
            "spikes": [*self.spikes],
            "outcomes": [each._asdict() for each in self.outcomes],
            "recommendation": self.recommendation._asdict(),
            "notes": [*self.notes],
        }


def suggest(
    run: Run,
    facts: Facts,
    policies: Sequence[Policy[Any]],
    on_policy: Callable[[str], None] | None = None,
) -> Suggestion:
    """Replays the norms through the policies, and recommends one.

    Args:
        policies: `policies_for(facts)`.
        on_policy: called with the code of each policy that was replayed.
    """
    outcomes: dict[str, Outcome] = {}
    for policy in policies:
        outcomes[code_of(policy)] = outcome(policy, facts)
        if on_policy is not None:
            on_policy(code_of(policy))
    return Suggestion(
        group=facts.series.name,
        num_steps=int(facts.used.sum()),
        num_first=facts.num_first,
        usual_norm=float(np.median(facts.ordinary)),
        spikes=facts.spike_steps,
        recommendation=_recommend(run, facts, policies, outcomes),
        outcomes=[*outcomes.values()],
        notes=caveats_of(run, facts, policies),
    )


def _recommend(
    run: Run,
    facts: Facts,
    policies: Sequence[Policy[Any]],
    outcomes: dict[str, Outcome],
) -> Recommendation:
    """Adds the outcome of a constant limit that none of the policies has."""
    levels = _levels(facts)
    found = (
        _not_finite(facts)
        or _growing(facts, levels)
        or _too_few(facts)
        or _keep(run, facts)
        or _nothing(facts, levels)
        or _adaptive(facts, levels, policies, outcomes)
    )
    if found is not None:
        return found
    limit = round_up(float(np.percentile(facts.ordinary, PERCENTILE)), DIGITS)
    constant = outcome(ClipNorm(limit), facts)
    outcomes.setdefault(constant.code, constant)
    return _constant(facts, levels, limit, constant)


def _levels(facts: Facts) -> Floats:
    parts = np.array_split(facts.ordinary, min(NUM_PARTS, len(facts.ordinary)))
    return np.array([np.median(part) for part in parts], dtype=np.float64)


def _too_few(facts: Facts) -> Recommendation | None:
    num = int(facts.used.sum())
    if num >= MIN_STEPS:
        return None
    reason = (
        f"{count(num, 'step')} with a finite norm above 0 are too few: of fewer than {MIN_STEPS}, "
        f"1% is less than a step. This policy only measures; ask again after more steps."
    )
    return Recommendation("too few steps", code_of(ClipNorm(math.inf)), reason)


def _not_finite(facts: Facts) -> Recommendation | None:
    finite = facts.series.finite[facts.num_first :]
    num = int((~finite).sum())
    ends = not finite[-MOST_NONFINITE_AT_END:].any()
    if num == 0 or not (ends or num > MOST_NONFINITE * len(finite)):
        return None
    where = " to the end of the run" if ends else f" in {num:,} of {count(len(finite), 'step')}"
    why = "weights are NaN" if ends else "a GradScaler that has found its scale skips far fewer"
    reason = (
        f"The norm is NaN or infinite{where}: {why}. No limit mends that, because the gradients "
        f"have no direction left. `report.nonfinite_parameters()` names the parameters; look at "
        f"the batches, the loss and the learning rate of the steps before "
        f"{_first_nonfinite(facts)}."
    )
    return Recommendation("fix the cause first", None, reason)


def _first_nonfinite(facts: Facts) -> int:
    rows = np.flatnonzero(~facts.series.finite)
    return int(facts.series.steps[rows[rows >= facts.num_first][0]])


def _growing(facts: Facts, levels: Floats) -> Recommendation | None:
    norms = facts.series.norms[facts.later]
    end = float(np.median(norms[-max(10, len(norms) // 100) :]))
    growth = end / float(levels.min())
    if growth < GROWTH or end * DRIFT < levels.max():
        return None
    reason = (
        f"The norm is {number(end)} at the end, {number(growth)} times what it was "
        f"({number(levels.min())}). Clipping would slow that and not stop it: a lower learning "
        f"rate, a longer warm-up or normalization layers do. Look at the layers whose norms grow."
    )
    return Recommendation("fix the cause first", None, reason)


def _keep(run: Run, facts: Facts) -> Recommendation | None:
    share, coefficient = clipped_share(run, facts), mean_coefficient(run, facts)
    if share <= MOSTLY:
        return None
    if coefficient <= 0:
        reason = (
            "The limit was 0 or below, and nothing of the gradients was left. Train with one above "
            "0, or measure: distclip.ClipNorm(math.inf)."
        )
        return Recommendation("fix the cause first", None, reason)
    limits = columns_of(run, facts)["limit"]
    constant = bool((limits == limits[0]).all())
    code = code_of(ClipNorm(float(limits[0]))) if constant else None
    reason = (
        f"The run clipped {percent(share)} of its steps, to {number(coefficient)} of their norm on "
        f"average: its limit has set the course, and its norms do not tell what a higher one would "
        f"do. With SGD it would make steps longer too, by up to {number(1 / coefficient)} times. "
        f"Keep {'this limit' if constant else 'the policy that the run had'}, or measure a run "
        f"with a higher one first."
    )
    return Recommendation("keep the limit", code, reason)


def _nothing(facts: Facts, levels: Floats) -> Recommendation | None:
    if facts.is_spike.any():
        return None
    highest = float((facts.series.norms[facts.later] / facts.usual[facts.later]).max())
    reason = (
        f"No norm is a spike: the usual norm is {_range(levels)}, and the largest one is only "
        f"{number(highest)} times the usual norm of the steps around it. A limit would scale "
        f"ordinary steps down. This policy only measures."
    )
    return Recommendation("nothing to clip", code_of(ClipNorm(math.inf)), reason)


def _adaptive(
    facts: Facts,
    levels: Floats,
    policies: Sequence[Policy[Any]],
    outcomes: Mapping[str, Outcome],
) -> Recommendation | None:
    """ZClip without a constant bound, or AutoClip that leaves most steps: what catches more."""
    if levels.max() < DRIFT * levels.min():
        return None
    kinds = [
        each for each in policies if isinstance(each, ZClip) and math.isinf(each.max_norm or 0)
    ]
    kinds += [each for each in policies if isinstance(each, AutoClip) and each.percentile > 50]
    ranked = sorted(
        (outcomes[code_of(each)] for each in kinds),
        key=lambda each: (-len(each.caught), each.clipped_later),
    )
    lags = ""
    if ranked[0].clipped_later > MOSTLY:
        lags = (
            " So much, because the level rose faster than this policy follows; a run that it clips "
            "may not rise so."
        )
    others = "".join(f" {_did(each, facts)}." for each in ranked[1:])
    reason = (
        f"The usual norm is {_range(levels)}, and {_spikes(facts)}. A constant limit above the "
        f"highest level would let through what is a spike at the lowest; this policy follows the "
        f"level. {_did(ranked[0], facts)}.{lags}{others}"
    )
    return Recommendation("adaptive", ranked[0].code, reason)


def _constant(facts: Facts, levels: Floats, limit: float, found: Outcome) -> Recommendation:
    reason = (
        f"The usual norm is {_range(levels)}, and {_spikes(facts)}. {number(limit)} lies above "
        f"{PERCENTILE:g}% of the ordinary norms. {_did(found, facts)}."
    )
    return Recommendation("constant", found.code, reason)


def _range(levels: Floats) -> str:
    lowest, highest = number(float(levels.min())), number(float(levels.max()))
    return f"about {lowest}" if lowest == highest else f"between {lowest} and {highest}"


def _spikes(facts: Facts) -> str:
    num = int(facts.is_spike.sum())
    highest = float((facts.series.norms[facts.is_spike] / facts.usual[facts.is_spike]).max())
    are = "is a spike" if num == 1 else "are spikes"
    return f"{count(num, 'step')} {are}, of up to {number(highest)} times the usual norm"


def _did(found: Outcome, facts: Facts) -> str:
    caught = f"{len(found.caught):,} of {count(int(facts.is_spike.sum()), 'spike')}"
    clipped = percent(found.clipped_later)
    return f"{found.code} would have clipped {clipped} of the steps, and pulled back {caught}"
