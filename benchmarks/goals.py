"""What distclip is to reach, in times of one run on a machine with two cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.baselines import BETWEEN, CLIPPER, OVERLAP, PLAIN_READ, TENSORS, TORCH
from benchmarks.timing import Row, find, milliseconds, ratio

HEAD = ["case", "state", "goal", "found: ratio of medians (p20 to p80 of the rounds)", ""]


@dataclass(frozen=True)
class Goal:
    """`baseline` is `times` as fast as `than`, or takes at most `within` times as long."""

    case: str
    state: str
    times: float = 0.0
    within: float = 0.0
    than: str = TORCH
    baseline: str = CLIPPER

    @property
    def text(self) -> str:
        who = "" if self.baseline == CLIPPER else f"{self.baseline}: "
        if self.within:
            return f"{who}within {self.within:g} times {self.than}"
        return f"{who}{self.times:g}x {self.than}"

    def judge(self, rows: Sequence[Row]) -> list[str]:
        """A line under `HEAD`."""
        mine, other = (find(rows, self.case, self.state, n) for n in (self.baseline, self.than))
        found = ratio(mine, other) if self.within else ratio(other, mine)
        if found is None:
            return line(self, "-", None)
        reached = found.p50 <= self.within if self.within else found.p50 >= self.times
        return line(self, str(found), reached)


@dataclass(frozen=True)
class AtMost:
    """An upper bound on the median, in milliseconds."""

    case: str
    state: str
    baseline: str
    most: float

    @property
    def text(self) -> str:
        return f"{self.baseline}: at most {self.most:g} ms"

    def judge(self, rows: Sequence[Row]) -> list[str]:
        ms = milliseconds(find(rows, self.case, self.state, self.baseline))
        return line(self, f"{ms} ms", ms.p50 <= self.most) if ms else line(self, "-", None)


def line(goal: Goal | AtMost, found: str, reached: bool | None) -> list[str]:
    verdict = {True: "reached", False: "not reached", None: "not measured"}[reached]
    return [goal.case, goal.state, goal.text, found, verdict]


def both(case: str, not_clipping: float, clipping: float) -> list[Goal]:
    return [Goal(case, "not clipping", not_clipping), Goal(case, "clipping", clipping)]


def tensor_norms(case: str) -> list[Goal]:
    """At most 5% in calls that have the norm of every tensor, and nothing in the others."""
    states = "not clipping", "clipping"
    rows = [(state, baseline) for state in states for baseline in (TENSORS, BETWEEN)]
    return [Goal(case, state, within=1.05, than=CLIPPER, baseline=each) for state, each in rows]


FLOAT32, BF16, FP16 = "plain, float32", "plain, bf16", "plain, fp16"
MANY = "384 tensors of 65,536, float32"
SMALL, BACKWARD = "2,000 tensors of 100 elements", "2,000 tensors of 100, after backward"
TWO_RANKS, FOUR_RANKS, TWO_AXES = "FSDP2, 2 ranks", "FSDP2, 4 ranks", "FSDP2 x TP, 4 ranks"
CLIP = [
    *both(FLOAT32, 2.5, 1.4),
    Goal(FLOAT32, "not clipping", within=1.4, than=PLAIN_READ),
    *both(BF16, 2.0, 1.2),
    *both(FP16, 3.0, 1.8),
    *tensor_norms(MANY),
    *both(SMALL, 3.0, 2.0),
    AtMost(BACKWARD, "not clipping", OVERLAP, 1.0),
]
SHARDED = [
    *both(FOUR_RANKS, 3.0, 2.0),
    *both(TWO_AXES, 4.0, 2.5),
    *(goal for case in (TWO_RANKS, FOUR_RANKS, TWO_AXES) for goal in tensor_norms(case)),
]
