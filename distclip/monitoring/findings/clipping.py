"""How often the run clipped, in which part, and how strongly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from distclip.monitoring.findings import Finding, count, number, percent
from distclip.monitoring.records import Floats, Run

# Where the limit is a hundredth of the usual norm, it is hardly meant for this gradient: a sum was
# forgotten to be averaged, a loss scale is still in it, or training has diverged.
STRONG = 0.01
NEARLY_ALWAYS = 0.9  # of the steps: the limit, not the gradient, sets how long steps are
NUM_PARTS = 4  # of the run
MIN_PART = 5  # steps: a share of fewer says little


def find(run: Run) -> Iterator[Finding]:
    finite, limit = run.finite, run.columns["limit"]
    if not finite.any():
        return
    norms, clipped = run.columns["total_norm"][finite], run.clipped[finite]
    if not clipped.any():
        yield Finding("clipping", False, _never(float(norms.max()), limit[finite]))
        return
    coefficients = run.columns["coefficient"][finite][clipped]
    median, least = float(np.median(coefficients)), float(coefficients.min())
    how = f"Their median coefficient is {number(median)}, the smallest {number(least)}."
    yield Finding(
        "clipping", False, f"Clipped in {_share(clipped, finite)}{_where(clipped)}. {how}"
    )
    if len(clipped) >= NUM_PARTS * MIN_PART and clipped.mean() >= NEARLY_ALWAYS:
        yield _nearly_always(median)
    yield from _groups(run)


def _never(largest: float, limit: Floats) -> str:
    if np.isinf(limit).all():
        return f"The policy only measured: no limit was set. The largest norm is {number(largest)}."
    least = number(float(limit.min()))
    return (
        f"Clipping changed no gradient: the largest norm is {number(largest)}, the smallest limit "
        f"{least}."
    )


def _share(clipped: NDArray[np.bool_], finite: NDArray[np.bool_]) -> str:
    steps = count(len(clipped), "step" if finite.all() else "finite step")
    if clipped.all():
        return f"all {steps}" if len(clipped) > 1 else "the only step"
    return f"{clipped.sum():,} of {steps} ({percent(float(clipped.mean()))})"


def _where(clipped: NDArray[np.bool_]) -> str:
    if clipped.all() or len(clipped) < NUM_PARTS * MIN_PART:
        return ""
    shares = [percent(float(part.mean())) for part in np.array_split(clipped, NUM_PARTS)]
    return f"; in the quarters of the run: {', '.join(shares)}"


def _nearly_always(median: float) -> Finding:
    if median <= STRONG:
        how = f"is {number(1 / median)} times the limit" if median > 0 else "has a limit of 0"
        text = (
            f"The usual norm {how}. Average a loss that is a "
            f"sum, pass `scaler=` or `scale=` where a loss scale is in the gradients, or choose "
            f"another limit."
        )
        return Finding("limit", True, text)
    text = (
        "As nearly every step was clipped, the limit sets the length of the gradient: with SGD it "
        "acts as the learning rate does."
    )
    return Finding("limit", False, text)


def _groups(run: Run) -> Iterator[Finding]:
    shares = {
        name: float((each["coefficient"][run.finite] < 1).mean())
        for name, each in run.groups.items()
    }
    if shares:
        each = ", ".join(f"{name} {percent(share)}" for name, share in shares.items())
        yield Finding("groups", False, f"Steps clipped, by parameter group: {each}.")
