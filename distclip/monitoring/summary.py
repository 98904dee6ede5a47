"""What happened over a run, in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distclip.monitoring.findings import (
    Finding,
    clipping,
    depth,
    file,
    loss,
    nonfinite,
    spikes,
    trends,
)
from distclip.monitoring.lines import line_of
from distclip.monitoring.records import Run

_FINDERS: Sequence[Callable[[Run], Iterator[Finding]]] = (
    nonfinite.find,
    loss.find,
    spikes.find,
    trends.find,
    depth.find,
    clipping.find,
    file.find,
)


@dataclass(frozen=True)
class Summary:
    """What `summarize` has found.

    Attributes:
        run: its name.
        figures: by name: "steps", "clipped_share", "median_norm" and others; a number that JSON
            lacks is "NaN", "Infinity" or "-Infinity".
        findings: with the warnings first.
    """

    run: str
    figures: Mapping[str, float | int | str]
    findings: Sequence[Finding]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        findings = [finding.to_dict() for finding in self.findings]
        return {"run": self.run, "figures": {**self.figures}, "findings": findings}


def summarize(run: Run) -> Summary:
    """What the run's history tells: clipping, spikes, layers, NaN, the loss, and the file itself.

    Example:
        >>> import tempfile, torch, distclip
        >>> from distclip.monitoring.records import read_run
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> clipper = distclip.Clipper([weight], distclip.ClipNorm(1.0))
        >>> with distclip.History(tempfile.mkdtemp()) as history:
        ...     for norm in (0.5, 2.0):
        ...         weight.grad = torch.tensor([0.0, norm])
        ...         history.append(clipper.clip_())
        >>> summarize(read_run(history.path)).figures["clipped_share"]
        0.5
    """
    found = [finding for find in _FINDERS for finding in find(run)]
    return Summary(run.name, _figures(run), sorted(found, key=lambda each: not each.is_warning))


def _figures(run: Run) -> dict[str, float | int | str]:
    finite, norms = run.finite, run.columns["total_norm"]
    losses = run.columns.get(loss.loss_name(run) or "", np.array([]))
    coefficients = run.columns["coefficient"][finite & run.clipped]
    figures: dict[str, float | int | None] = {
        "steps": len(run.steps),
        "first_step": int(run.steps[0]),
        "last_step": int(run.steps[-1]),
        "clipped_steps": int((run.clipped & finite).sum()),
        "clipped_share": _of(np.mean, (run.clipped & finite)[finite]),
        "median_coefficient_of_clipped": _of(np.median, coefficients),
        "smallest_coefficient": _of(np.min, coefficients),
        "median_norm": _of(np.median, norms[finite]),
        "largest_norm": _of(np.max, norms[finite]),
        "nonfinite_steps": int((~finite).sum()),
        "first_loss": _of(lambda each: each[0], losses[np.isfinite(losses)]),
        "last_loss": loss.last_loss(losses) if len(losses) else None,
        "broken_lines": run.num_broken,
        "replaced_steps": run.num_replaced,
    }
    return {name: _encoded(value) for name, value in figures.items() if value is not None}


def _encoded(value: float | int) -> float | int | str:
    """JSON has no NaN and no infinity."""
    return value if np.isfinite(value) else json.loads(line_of({"": value}))[""]


def _of(function: Callable[[Any], Any], values: NDArray[Any]) -> float | None:
    return float(function(values)) if len(values) else None
