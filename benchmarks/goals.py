"""What distclip has set out to reach, as ratios of times in one run on a machine with two cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.rivals import CLIPPER, OVERLAP, PLAIN_READ, TORCH
from benchmarks.timing import Row, Spread, find, ratio, spread


@dataclass(frozen=True)
class Goal:
    """`rival` is `times` as fast as `than`; or, where `within` is given, takes at most that many times as long.

    Attributes:
        work: how much of the work of `than` the rival does; what it is compared with then has a name, `said`.
    """

    case: str
    state: str
    times: float = 0.0
    within: float = 0.0
    than: str = TORCH
    rival: str = CLIPPER
    work: float = 1.0
    said: str = ""

    @property
    def text(self) -> str:
        than = self.said or self.than
        return f"within {self.within:g} {than}s" if self.within else f"{self.times:g}x {than}"

    def found(self, rows: Sequence[Row]) -> Spread | None:
        ours, theirs = (find(rows, self.case, self.state, name) for name in (self.rival, self.than))
        return ratio(ours, theirs) if self.within else ratio(theirs, ours, self.work)

    def judged(self, rows: Sequence[Row]) -> list[str]:
        """case, state, goal, what was found, whether that reaches it."""
        found = self.found(rows)
        if found is None:
            return [self.case, self.state, self.text, "-", "not measured"]
        reached = found.p50 <= self.within if self.within else found.p50 >= self.times
        return [self.case, self.state, self.text, found.text(), "reached" if reached else "not reached"]


@dataclass(frozen=True)
class AtMost:
    """`rival` has at most so many of what `Row` counts under this name."""

    case: str
    state: str
    rival: str
    name: str
    most: int

    def judged(self, rows: Sequence[Row]) -> list[str]:
        found: int | None = getattr(find(rows, self.case, self.state, self.rival), self.name)
        verdict = "not measured" if found is None else "reached" if found <= self.most else "not reached"
        return [
            self.case,
            self.state,
            f"at most {self.most} {self.name}",
            "-" if found is None else str(found),
            verdict,
        ]


@dataclass(frozen=True)
class Under:
    """The median of `rival` is below so many milliseconds."""

    case: str
    state: str
    rival: str
    ms: float

    @property
    def text(self) -> str:
        return f"{self.rival} under {self.ms:g} ms"

    def judged(self, rows: Sequence[Row]) -> list[str]:
        seconds = find(rows, self.case, self.state, self.rival).seconds
        found = spread([1e3 * s for s in seconds]) if seconds else None
        verdict = "not measured" if found is None else "reached" if found.p50 < self.ms else "not reached"
        return [self.case, self.state, self.text, "-" if found is None else f"{found.text()} ms", verdict]


Judged = Goal | AtMost | Under
JUDGED = ["case", "state", "goal", "found: ratio of medians (p20 to p80 of the rounds)", ""]


def both(case: str, not_clipping: float, clipping: float) -> list[Goal]:
    return [Goal(case, "not clipping", not_clipping), Goal(case, "clipping", clipping)]


FLOAT32, BF16, FP16 = "plain, float32", "plain, bf16", "plain, fp16"
SMALL, BACKWARD = "2,000 tensors of 100 elements", "2,000 tensors of 100, after backward"
TWO_RANKS, FOUR_RANKS, TWO_AXES = "FSDP2, 2 ranks", "FSDP2, 4 ranks", "FSDP2 x TP, 4 ranks"
CLIP = [
    *both(FLOAT32, 2.5, 1.4),
    Goal(FLOAT32, "not clipping", within=1.4, than=PLAIN_READ),
    *both(BF16, 2.0, 1.2),
    *both(FP16, 3.0, 1.8),
    *both(SMALL, 3.0, 2.0),
    Under(BACKWARD, "not clipping", OVERLAP, 1.0),
]
SHARDED = [*both(FOUR_RANKS, 3.0, 2.0), *both(TWO_AXES, 4.0, 2.5)]
