"""Histories of norms that a test chooses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings

from distclip.monitoring.lines import line_of
from distclip.monitoring.records import Floats, Run, read_run
from distclip.monitoring.replay import Series

# Other processes may hold the CPU for long.
DRAWN = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def write_history(
    folder: Path,
    norms: Sequence[float],
    limit: float = math.inf,
    every: int = 1,
    tensors: Mapping[int, Mapping[str, float]] | None = None,
    groups: Mapping[str, Sequence[float]] | None = None,
) -> Run:
    """Of a run that had ClipNorm(limit); `tensors`: by row."""
    lines = [line_of({"history": 1, "distclip": "0.1.0", "started": "now"})]
    for i, norm in enumerate(norms):
        row: dict[str, Any] = {"step": (i + 1) * every, "total_norm": float(norm)}
        row |= {"limit": limit, "coefficient": _coefficient(norm, limit)}
        row |= {"clipped": bool(row["coefficient"] < 1), "finite": math.isfinite(norm)}
        if tensors and i in tensors:
            row["tensor_norms"] = {name: float(each) for name, each in tensors[i].items()}
        if groups:
            row["groups"] = {name: _group(float(each[i]), limit) for name, each in groups.items()}
        lines.append(line_of(row))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.jsonl").write_bytes(b"".join(lines))
    return read_run(folder)


def _group(norm: float, limit: float) -> dict[str, float]:
    return {"norm": norm, "limit": limit, "coefficient": _coefficient(norm, limit)}


def _coefficient(norm: float, limit: float) -> float:
    return 1.0 if norm <= limit else limit / norm if math.isfinite(norm) else math.nan


def series(norms: Sequence[float] | Floats, tensors: Floats | None = None) -> Series:
    of = np.array(norms, dtype=np.float64)
    return Series("", np.arange(1, len(of) + 1), of, np.isfinite(of), tensors)


def noise(num: int, deviation: float = 0.15, seed: int = 0) -> Floats:
    """Norms around 1, whose logarithm is normal."""
    return np.exp(deviation * np.random.default_rng(seed).standard_normal(num))


def with_spikes(norms: Floats, rows: Sequence[int], factor: float = 20.0) -> Floats:
    spiky = norms.copy()
    spiky[[*rows]] *= factor
    return spiky
