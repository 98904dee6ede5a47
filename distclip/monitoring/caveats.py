"""What a history cannot tell about another policy, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from distclip.monitoring.outcomes import MOST_MISSING, WINDOW, Facts, missing_share
from distclip.monitoring.records import Floats, Run
from distclip.policies import AutoClip, Policy

# Of the steps. Where more were clipped, the limit has set the length of most steps.
MOSTLY = 0.5
_DIFFERENT = 1e-3  # of a norm; float32 and the sum of norms differ by far less


def caveats_of(run: Run, facts: Facts, policies: Sequence[Policy[Any]]) -> list[str]:
    """Those that apply, a sentence or two each."""
    return [
        *_course(run, facts),
        *_steps(run, facts, policies),
        *_other_steps(run, facts),
        *_tensors(run, facts),
    ]


def columns_of(run: Run, facts: Facts) -> dict[str, Floats]:
    """What the run itself did: "limit" and "coefficient" in the steps with a norm."""
    columns = run.groups[facts.series.name] if facts.series.name else run.columns
    rows = np.isin(run.steps, facts.series.steps[facts.used])
    return {name: columns[name][rows] for name in ("limit", "coefficient")}


def clipped_share(run: Run, facts: Facts) -> float:
    """Of the steps with a norm, how many the run itself has clipped."""
    return float((columns_of(run, facts)["coefficient"] < 1).mean())


def mean_coefficient(run: Run, facts: Facts) -> float:
    return float(columns_of(run, facts)["coefficient"].mean())


def _course(run: Run, facts: Facts) -> Iterator[str]:
    share = clipped_share(run, facts)
    if 0 < share <= MOSTLY:  # the recommendation is about more
        yield f"The run clipped {percent(share)} of its steps itself; the norms are those before."
    yield "Each clipped step changes all later ones; the figures are for the norms of this run."


def _steps(run: Run, facts: Facts, policies: Sequence[Policy[Any]]) -> Iterator[str]:
    if any(isinstance(each, AutoClip) and each.history == WINDOW for each in policies):
        yield (
            f"AutoClip was replayed with the latest {WINDOW:,} norms; with its default, "
            f"{AutoClip().history:,}, it follows more slowly."
        )
    missing = missing_share(facts.series)
    if missing > MOST_MISSING:
        yield (
            f"The file lacks {percent(missing)} of the steps: ZClip and AdaGC, whose averages are "
            f"over consecutive steps, were not replayed, and AutoClip's window is longer."
        )
    elif missing > 0:
        yield f"The file lacks {percent(missing)} of the steps."
    if run.num_broken:
        yield f"{count(run.num_broken, 'line')} of the file could not be read."


def _other_steps(run: Run, facts: Facts) -> Iterator[str]:
    series = facts.series
    if num := int((~series.finite).sum()):
        yield (
            f"{count(num, 'step')} had a norm that is NaN or infinite (a GradScaler skips such "
            f"steps); no policy remembers them, and no figure counts them."
        )
    if num := int((series.finite & (series.norms == 0)).sum()):
        yield f"{count(num, 'step')} had a norm of 0, which no figure counts."
    if facts.series.name:
        yield (
            f"Each of the {len(run.groups)} parameter groups has a limit of its own; which tensors "
            f"are in a group is not in the file, so no limits per tensor were replayed."
        )


def _tensors(run: Run, facts: Facts) -> Iterator[str]:
    series = facts.series
    if not series.name and series.tensors is None:
        num = len(run.tensors.rows)
        yield (
            f"{f'{num:,}' if num else 'None'} of {count(len(run.steps), 'step')} "
            f"{'has' if num == 1 or not num else 'have'} the norm of "
            f"every tensor. ClipTensorNorm and AdaGC, whose averages need each step, were not "
            f"replayed; `Clipper(tensor_norms=True)` records all."
        )
    if series.tensors is not None:
        together = np.linalg.norm(series.tensors[facts.used], axis=1)
        norms = series.norms[facts.used]
        if np.median(np.abs(together - norms)) > _DIFFERENT * np.median(norms):
            yield (
                "The total norm is not the 2-norm of all tensors: the run measured another norm, "
                "or not all of them. Limits hold for that norm only."
            )
    yield (
        "AGC, ClipBlockRMS and ClipValue were not replayed: they need the norms of weights, sizes "
        "or single elements, which the file does not have."
    )


def percent(share: float) -> str:
    """Two digits."""
    return f"{float(f'{100 * share:.2g}'):g}%" if share < 0.99 else f"{100 * share:.4g}%"


def number(value: float) -> str:
    return f"{value:.3g}"


def count(num: int, what: str) -> str:
    """ "1 step", "1,200 steps"."""
    return f"{num:,} {what}{'' if num == 1 else 's'}"
