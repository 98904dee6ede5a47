"""One line of a history.jsonl, as text: what a file holds is described here."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, cast

FILE_NAME = "history.jsonl"
FORMAT = 1
LAST_STEP = 10**18 - 1  # readers take numbers of more digits for floats
FIGURES = ("total_norm", "limit", "coefficient", "clipped", "finite", "skipped")
_OTHERS = {"groups", "tensor_norms", "norm_type", "nonfinite_parameters"}
RESERVED = {"step", "history", *FIGURES, *_OTHERS}
# JSON has no such numbers; protobuf's JSON spells them so.
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def line_of(row: Mapping[str, Any]) -> bytes:
    """A row as one line. Float32 numbers get 9 digits, which are enough to read them back."""
    return json.dumps(_encoded(row), allow_nan=False, separators=(", ", ": ")).encode() + b"\n"


def _encoded(value: Any) -> Any:
    if isinstance(value, Mapping):
        named = cast("Mapping[str, Any]", value)
        return {name: _encoded(each) for name, each in named.items()}
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return float(f"{value:.9g}") if _is_float32(value) else value


def _is_float32(value: float) -> bool:
    try:
        return struct.unpack("f", struct.pack("f", value))[0] == value
    except OverflowError:
        return False
