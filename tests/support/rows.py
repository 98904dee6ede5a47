"""The rows of a history.jsonl as tests compare them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distclip.monitoring.records import Floats, HistoryError, read_run

Row = dict[str, Any]


def rows_of(path: Path) -> list[Row]:
    """The rows that hold, each as a dict; none where the run has made no step yet.

    A NaN, and a number that a row lacks, is "NaN", which is equal to itself.
    """
    try:
        run = read_run(path)
    except HistoryError:
        return []
    rows = [_named(run.columns, i) | {"step": int(step)} for i, step in enumerate(run.steps)]
    for i, norms in zip(run.tensors.rows, run.tensors.norms, strict=True):
        rows[i]["tensor_norms"] = dict(zip(run.tensors.names, norms.tolist(), strict=True))
    for i, causes in run.nonfinite.items():
        rows[i]["nonfinite_parameters"] = dict(causes)
    return rows


def without_seconds(rows: list[Row]) -> list[Row]:
    """All that a step computed; two equal runs may differ in the time that it took."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def _named(columns: Mapping[str, Floats], i: int) -> Row:
    numbers = {name: float(values[i]) for name, values in columns.items()}
    return {name: "NaN" if math.isnan(value) else value for name, value in numbers.items()}
