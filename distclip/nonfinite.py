"""What happens where the total norm is NaN or infinite: the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from distclip.arguments import as_number, shown
from distclip.errors import NonFiniteGradientError, SkippedStepsError
from distclip.norms.late_reads import LateReads
from distclip.norms.measure import GroupMeasurement, measure
from distclip.norms.plan import Plan
from distclip.norms.shared_errors import RankGroup, gather_objects, rank_group

OnNonFinite = Literal["propagate", "raise", "skip", "zero"]

_MAX_NAMES = 100  # that a rank sends: after a NaN in the loss every parameter has a NaN


def check_mode(mode: str, max_consecutive_skips: Any) -> float:
    """`max_consecutive_skips` as a number, which may be infinite.

    Raises:
        ValueError, TypeError: one is not what `Clipper` takes.
    """
    if mode not in get_args(OnNonFinite):
        raise ValueError(
            f"cannot make a Clipper with on_nonfinite={shown(mode)}: no behaviour has that name, "
            f'and it is unclear what a NaN should do. Pass "propagate", "raise", "skip" or "zero".'
        )
    number = as_number("max_consecutive_skips", max_consecutive_skips, "a number of steps")
    if not (number >= 0 and (number.is_integer() or math.isinf(number))):
        raise ValueError(
            f"cannot make a Clipper with max_consecutive_skips={shown(max_consecutive_skips)}: a "
            f"number of steps is whole and never negative, and no step could be compared with "
            f"this one. Pass 0 or above; math.inf never raises."
        )
    return number if math.isinf(number) else int(number)


def coefficient_under(
    mode: OnNonFinite, coefficient: Tensor, finite: Tensor, vetoed: Tensor | None
) -> Tensor:
    """What the gradients are multiplied by, given the mode; 1 where a policy vetoes the step."""
    if mode != "propagate":
        coefficient = torch.where(finite, coefficient, 0.0 if mode == "zero" else 1.0)
    return coefficient if vetoed is None else torch.where(vetoed, 1.0, coefficient)


def limit_under(
    mode: OnNonFinite, limit: Tensor, finite: Callable[[], Tensor], vetoed: Tensor | None
) -> Tensor:
    """What the gradients are clamped to, given the mode; infinity where a policy vetoes."""
    # `limit` may lie on the host: a sum takes it as a number, `where` would wait to copy it.
    if mode != "propagate":
        limit = torch.where(finite(), 0.0, math.inf) + limit
    return limit if vetoed is None else torch.where(vetoed, math.inf, 0.0) + limit


class SkipCounter:
    """Counts, on the device, the steps that did not count: not finite, or vetoed."""

    def __init__(self, max_consecutive: float) -> None:
        self.max_consecutive = max_consecutive
        self._counts: Tensor | None = None  # of all such steps; of the latest ones in a row
        self._late = LateReads()

    @property
    def total(self) -> Tensor:
        if self._counts is None:
            return torch.zeros((), dtype=torch.int64, device="cpu")
        return self._counts[0]

    def count_(self, counted: Tensor) -> bool:
        """Whether too many came in a row. On an accelerator the answer is some steps old."""
        if self._counts is None:
            with torch.inference_mode(False):  # counted up outside of inference mode too
                self._counts = torch.zeros(2, dtype=torch.int64, device=counted.device)
        self._counts.add_(~counted)
        self._counts[1].mul_(~counted)
        return self._late.read(self._counts[1]) > self.max_consecutive


@dataclass(frozen=True)
class NonFiniteSearch:
    """Finds the parameters whose gradients were not finite; see `Report.nonfinite_parameters`.

    Attributes:
        names, per_tensor: of each parameter group, as `GroupMeasurement` has them.
        group: the ranks to ask; None where this rank knows the answer alone.
    """

    names: Sequence[Sequence[str]]
    per_tensor: Sequence[Tensor]
    group: RankGroup | None
    pickled: bool = False

    def __call__(self) -> dict[str, list[int]]:
        if self.pickled:
            raise RuntimeError(
                "cannot find the parameters whose gradients were not finite: this report was "
                "pickled, and it cannot ask the other ranks any more. Call "
                "`report.nonfinite_parameters()` on every rank before you pickle the report."
            )
        mine: list[str] = []
        for names, per_tensor in zip(self.names, self.per_tensor, strict=True):
            broken = (~per_tensor.isfinite()).nonzero()
            mine += [names[int(index)] for index in broken]
        by_rank = gather_objects(list(dict.fromkeys(mine))[:_MAX_NAMES], self.group)
        found: dict[str, list[int]] = {}
        for rank, names in by_rank.items():
            for name in names:
                found.setdefault(name, []).append(rank)
        return found

    def __getstate__(self) -> dict[str, Any]:
        alone = self.group is None
        return {**vars(self), "group": None, "pickled": self.pickled or not alone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class _Worst(NamedTuple):
    """The worst gradient of a rank."""

    badness: float
    size: str
    name: str


class _RankReport(NamedTuple):
    worst: _Worst | None
    num_nonfinite: int


def error(
    total_norm: Tensor,
    gradients: Sequence[Tensor | None],
    plan: Plan,
    skipped: float | None = None,
    vetoes: bool = False,
    setting: str = 'on_nonfinite="propagate"',
    measured: Sequence[GroupMeasurement] | None = None,
) -> NonFiniteGradientError:
    """The error for all ranks, which come here together because `total_norm` is the same on each.

    Args:
        skipped: how many steps in a row were left out before this one.
        vetoes: a policy may have been the reason.
        setting: the argument of the caller with which nothing is raised.
        measured: where optimizers have stepped in backward, and no gradient is left to measure.

    Collective: an all-gather of objects over the reduce mesh.
    """
    reports: dict[int, _RankReport] = gather_objects(
        _rank_report(measure(gradients, plan) if measured is None else measured), rank_group(plan)
    )
    left = "all were left as they are" if measured is None else "optimizers stepped zeros for them"
    by_badness = [(each.worst.badness, -rank) for rank, each in reports.items() if each.worst]
    rank = -max(by_badness)[1]
    worst = cast(_Worst, reports[rank].worst)
    counts = {rank: each.num_nonfinite for rank, each in reports.items() if each.num_nonfinite}
    after = ""
    if skipped is not None:
        after = (
            f", after {skipped} steps in a row that were left out because the norm was not finite"
            f"{' or vetoed by a policy' if vetoes else ''}"
        )
    # torch's own words at the end: tests and trainers look for them.
    return NonFiniteGradientError(
        f"cannot clip to a total norm of {total_norm.item()}{after}: the worst gradient is that of "
        f"{worst.name!r}, whose norm on rank {rank} is {worst.size} (parameters with such "
        f"gradients, by rank: {_shortened(counts)}). No coefficient makes such gradients finite, "
        f"and {left}. Look for the cause in the loss and its inputs, or skip "
        f"this step. The total norm of order {float(plan.groups[0].norm_type)} for gradients from "
        f"`parameters` is non-finite, so it cannot be clipped. To disable this error and scale the "
        f"gradients by the non-finite norm anyway, set `{setting}`"
    )


def too_many_vetoes(total_norm: Tensor, skipped: float) -> SkippedStepsError:
    """The error for all ranks, where the latest step of too many in a row has a finite norm."""
    return SkippedStepsError(
        f"cannot go on: {skipped + 1} steps in a row were left out, because their norms lay above "
        f"what the policy accepts, or were not finite. The latest norm is {total_norm.item()}. A "
        f"spike passes, and so many do not: the policy compares with the norms of accepted steps "
        f"only, and accepts no other level of them by itself. Look for the cause in the loss and "
        f"its inputs, go on from a checkpoint before them, or, if the norms are meant to be so "
        f"large, make a new Clipper, whose window is empty, or raise `z_thresh` or `max_norm`."
    )


def _rank_report(measured: Sequence[GroupMeasurement]) -> _RankReport:
    found: list[_Worst] = []
    num_nonfinite = 0
    for group in measured:
        for name, number in zip(group.names, map(float, group.per_tensor.cpu()), strict=True):
            found.append(_Worst(_badness(number), _size(number), name))
            num_nonfinite += not math.isfinite(number)
    return _RankReport(max(found, key=attrgetter("badness"), default=None), num_nonfinite)


def _badness(number: float) -> float:
    """NaN is worse than inf, and inf than any number."""
    return 2.0 if math.isnan(number) else 1.0 if math.isinf(number) else -1 / (1 + number)


def _size(number: float) -> str:
    return str(number) if not math.isfinite(number) else "the largest, and finite"


def _shortened(by_rank: dict[int, int]) -> str:
    shown = [f"{rank}: {count}" for rank, count in sorted(by_rank.items())[:8]]
    return ", ".join([*shown, *(["..."] if len(by_rank) > 8 else [])]) or "none"
