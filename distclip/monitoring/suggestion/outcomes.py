"""What each policy would have done with a run's norms, in figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distclip.monitoring.records import Floats, HistoryError
from distclip.monitoring.spikes import find_spikes
from distclip.monitoring.suggestion.replay import Replay, Series, code_of, replay, threshold
from distclip.policies import AdaGC, AutoClip, ClipNorm, ClipTensorNorm, Policy, ZClip

# Norms fall fast in the first steps, which are counted separately: as many as the warm-up of AdaGC
# has by default, the longest of all policies, and at most a tenth of the run.
NUM_FIRST = 100
PERCENTS = (1, 5, 10)  # of the steps that a constant limit clips
# AutoClip's default window of 10,000 norms, which are sorted in each step, takes 10 times as long.
# It also keeps norms of long ago: this one follows the run.
WINDOW = 1000
MOST_MISSING = 0.1  # of the steps; where more are not in the file, moving averages are others


class Outcome(NamedTuple):
    """What one policy would have done.

    Attributes:
        code: of the policy.
        clipped: the share of the steps with a finite norm above 0.
        clipped_later: the same without the first steps.
        mean_coefficient, smallest_coefficient: of these steps, the first ones included: the norm
            afterwards divided by the norm before.
        caught: the steps of the spikes that would not have been any, once clipped.
    """

    code: str
    clipped: float
    clipped_later: float
    mean_coefficient: float
    smallest_coefficient: float
    caught: list[int]


@dataclass(frozen=True)
class Facts:
    """What is known about the norms of one series.

    Attributes:
        used: where the norm is finite and above 0; bool [number of rows].
        later: the same without the first steps.
        num_first: how many rows these are.
        usual: the usual norm of each used step; inf in the other rows.
        threshold: a norm above it is a spike; inf in rows that are not used.
        is_spike: among the later; bool [number of rows].
    """

    series: Series
    used: NDArray[np.bool_]
    later: NDArray[np.bool_]
    num_first: int
    usual: Floats
    threshold: Floats
    is_spike: NDArray[np.bool_]

    @property
    def ordinary(self) -> Floats:
        """The later norms that are no spikes."""
        return self.series.norms[self.later & ~self.is_spike]

    @property
    def spike_steps(self) -> list[int]:
        return self.series.steps[self.is_spike].tolist()


def facts_of(series: Series) -> Facts:
    """Raises HistoryError where no norm is finite and above 0."""
    used = series.finite & (series.norms > 0) & np.isfinite(series.norms)
    if not used.any():
        whose = f" of the group {series.name!r}" if series.name else ""
        raise HistoryError(
            f"no norm{whose} is finite and above 0 in {len(used)} steps: nothing can be replayed"
        )
    num_first = min(NUM_FIRST, len(used) // 10)
    if not used[num_first:].any():
        num_first = 0
    later = used & (np.arange(len(used)) >= num_first)
    usual, threshold = np.full(len(used), np.inf), np.full(len(used), np.inf)
    usual[used], threshold[used], _ = find_spikes(series.norms[used])
    is_spike = later & (series.norms > threshold)
    return Facts(series, used, later, num_first, usual, threshold, is_spike)


def policies_for(facts: Facts) -> list[Policy[Any]]:
    """With their defaults and some others; thresholds from the norms after the first steps."""
    window = AutoClip().history if len(facts.used) <= WINDOW else WINDOW
    policies: list[Policy[Any]] = [*_constant(ClipNorm, facts.series.norms[facts.later])]
    policies += [AutoClip(history=window), AutoClip(90.0, window)]
    if missing_share(facts.series) <= MOST_MISSING:
        policies += [ZClip(), ZClip(max_norm=None)]
    if facts.series.tensors is not None:
        policies += _constant(ClipTensorNorm, facts.series.tensors[facts.later].max(axis=1))
        if missing_share(facts.series) <= MOST_MISSING:
            policies.append(AdaGC())
    return policies


def _constant(kind: type[Any], norms: Floats) -> Iterator[Policy[Any]]:
    limits = (threshold(norms, percent) for percent in PERCENTS)
    return (kind(limit) for limit in dict.fromkeys(limits) if limit is not None)


def missing_share(series: Series) -> float:
    """The share of the steps that the file does not have."""
    return 1 - len(series.steps) / int(series.steps[-1] - series.steps[0] + 1)


def outcome(policy: Policy[Any], facts: Facts) -> Outcome:
    return outcome_of(replay(policy, facts.series), facts)


def outcome_of(replayed: Replay, facts: Facts) -> Outcome:
    clipped = replayed.coefficients < 1
    share = replayed.after[facts.used] / facts.series.norms[facts.used]
    caught = facts.is_spike & (replayed.after <= facts.threshold)
    return Outcome(
        code_of(replayed.policy),
        clipped=float(clipped[facts.used].mean()),
        clipped_later=float(clipped[facts.later].mean()),
        mean_coefficient=float(share.mean()),
        smallest_coefficient=float(share.min()),
        caught=facts.series.steps[caught].tolist(),
    )
