"""What can be found in a run: one module for each kind, each with its thresholds and their reasons.

`distclip.monitoring.summary` calls them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_STEPS = 100  # that a finding lists; the text says how many there are
_MOST_NAMED = 4  # steps or names in a text


class Finding(NamedTuple):
    """One thing about a run.

    Attributes:
        kind: "clipping", "spikes", "vanishing", "exploding", "nonfinite", "loss", "file", ...
        is_warning: something that should not be so.
        text: one or more sentences that need no other.
        steps: what steps it is about, if any; at most the first 100.
        tensors: what tensors or layers it is about, if any.
    """

    kind: str
    is_warning: bool
    text: str
    steps: Sequence[int] = ()
    tensors: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        return self._asdict() | {"steps": [*self.steps], "tensors": [*self.tensors]}


def number(value: float) -> str:
    """Three digits, such as 0.0123, 4,560 and 7.89e+06."""
    if 1e3 <= abs(value) < 1e6:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def percent(share: float) -> str:
    """Whole percent; more digits where these would say 0% or 100% and it is not."""
    if 0 < share < 0.01:
        return f"{100 * share:.1g}%"
    return f"{100 * share:.4g}%" if 0.99 < share < 1 else f"{share:.0%}"


def count(num: int, what: str) -> str:
    """ "1 step", "1,200 steps"."""
    return f"{num:,} {what}{'' if num == 1 else 's'}"


def listed(words: Sequence[str], most: int = _MOST_NAMED) -> str:
    """ "a, b and c", "a, b, c and 4 more"."""
    shown, num_more = list(words[:most]), len(words) - most
    if num_more > 0:
        shown.append(f"{num_more:,} more")
    return " and ".join([*([", ".join(shown[:-1])] if shown[1:] else []), shown[-1]])


def steps_in_words(steps: Sequence[int]) -> str:
    """ "step 3", "steps 3, 5 and 9", "steps 3 to 9", "3 to 9 and 20"."""
    starts = [i for i in range(len(steps)) if i == 0 or steps[i] != steps[i - 1] + 1]
    ends = [*(i - 1 for i in starts[1:]), len(steps) - 1]
    spans = [_span(steps[i], steps[j]) for i, j in zip(starts, ends, strict=True)]
    if len(spans) > _MOST_NAMED:
        return f"{len(steps):,} steps from {steps[0]} to {steps[-1]}"
    return f"step{'' if len(steps) == 1 else 's'} {listed(spans)}"


def _span(first: int, last: int) -> str:
    if first == last:
        return str(first)
    return f"{first} and {last}" if last == first + 1 else f"{first} to {last}"


def chosen(names: Sequence[str], mask: NDArray[np.bool_]) -> list[str]:
    return [name for name, is_chosen in zip(names, mask, strict=True) if is_chosen]


def layers_in_words(names: Sequence[str], mask: NDArray[np.bool_]) -> str:
    """ "layer 3", "layers 0, 2 and 4": a name may be a number."""
    layers = chosen(names, mask)
    return f"layer{'' if len(layers) == 1 else 's'} {listed(layers)}"
