"""The rows of a history.jsonl as columns."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from distclip.monitoring.lines import FIGURES, FILE_NAME, FORMAT, NOT_FINITE

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_NUMBERS, _FLAGS = FIGURES[:3], ("clipped", "finite")  # a file of 1.0 has no "skipped"
_NESTED = {"groups", "tensor_norms", "nonfinite_parameters"}
_GROUP_NUMBERS = ("norm", "limit", "coefficient")


class HistoryError(ValueError):
    """A path that holds no history which this version can read; the message is one line."""


@dataclass(frozen=True)
class TensorNorms:
    """The norms of all tensors, in the rows that have them.

    Attributes:
        names: of the tensors.
        rows: the indices of these rows among all rows; int64 [number of rows].
        norms: float64 [number of rows, number of tensors]; NaN where a row lacks a tensor too.
        norm_types: the order p of the norms in each row, 2 where groups have several; float64
            [number of rows].
    """

    names: tuple[str, ...]
    rows: Ints
    norms: Floats
    norm_types: Floats


@dataclass(frozen=True)
class Run:
    """What one history.jsonl says. Rows are in the order of their steps.

    Attributes:
        name: of its folder.
        steps: int64 [number of rows].
        columns: the numbers and flags of each row by their names: "total_norm", "limit",
            "coefficient", "clipped", "finite", "skipped", and what the user has added, such as
            "loss" and "lr"; float64 [number of rows], NaN where a row has no such number.
        groups: the columns "norm", "limit" and "coefficient" of each parameter group, where there
            are several.
        nonfinite: the parameters that were not finite, each with its ranks, by row.
        num_broken: lines that could not be read, and were left out.
        num_replaced: rows that a later start of the run has made again.
        versions: of distclip, which wrote them.
    """

    name: str
    path: Path
    steps: Ints
    columns: Mapping[str, Floats]
    groups: Mapping[str, Mapping[str, Floats]]
    tensors: TensorNorms
    nonfinite: Mapping[int, Mapping[str, Sequence[int]]]
    num_broken: int
    num_replaced: int
    versions: Sequence[str]

    @property
    def clipped(self) -> NDArray[np.bool_]:
        return self.columns["clipped"] > 0

    @property
    def finite(self) -> NDArray[np.bool_]:
        return self.columns["finite"] > 0


def read_run(path: str | Path, on_bytes: Callable[[int], None] | None = None) -> Run:
    """Reads a history.jsonl, or the one in a folder.

    A line that is damaged is left out and counted, wherever it stands. Where steps go back, the
    later rows hold.

    Args:
        on_bytes: called with the number of bytes of each line, for a progress bar.

    Raises:
        HistoryError: nothing there, no row in it, or a file of another program or a later format.
    """
    file = find(path)
    parsed = _Parsed()
    try:
        with file.open("rb") as lines:
            for line in lines:
                parsed.add(line)
                if on_bytes is not None:
                    on_bytes(len(line))
        parsed.check()
    except OSError as error:
        raise HistoryError(f"{file} cannot be read: {error.strerror}") from None
    except HistoryError as error:
        raise HistoryError(f"{file} {error}") from None
    name = file.resolve().parent.name if file.name == FILE_NAME else file.stem
    return parsed.run(name, file)


def find(path: str | Path) -> Path:
    """The file that `path` is or has. Raises HistoryError where there is none."""
    path = Path(path)
    if not path.is_dir():
        if path.exists():
            return path
        raise HistoryError(f"{path} does not exist")
    if (path / FILE_NAME).is_file():
        return path / FILE_NAME
    below = sorted(str(each.parent) for each in path.glob(f"*/{FILE_NAME}"))
    runs = f"; its folders do: {', '.join(below[:5])}" if below else ""
    more = f" and {len(below) - 5} more" if len(below) > 5 else ""
    raise HistoryError(f"{path} has no {FILE_NAME}, which distclip.History writes{runs}{more}")


@dataclass
class _Parsed:
    """The rows that hold so far."""

    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    versions: list[str] = field(default_factory=list[str])
    names: tuple[str, ...] = ()
    num_broken: int = 0
    num_replaced: int = 0

    def add(self, line: bytes) -> None:
        if not line.strip():
            return
        row: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line, parse_int=_whole)
        if _is_header(row):
            self._start(row)
        elif _is_row(row):
            self._drop_after(row["step"] - 1)
            self.rows.append(self._with_array(row))
        else:
            self.num_broken += 1

    def _start(self, header: Mapping[str, Any]) -> None:
        version = " ".join(str(header.get("distclip", "of unknown version")).split())
        if header["history"] != FORMAT:
            raise HistoryError(
                f"was written by distclip {version} in format {header['history']}; this version "
                f"reads format {FORMAT}"
            )
        self.versions.append(version)
        if isinstance(after := header.get("after"), int):
            self._drop_after(after)

    def _drop_after(self, step: int) -> None:
        while self.rows and self.rows[-1]["step"] > step:
            self.rows.pop()
            self.num_replaced += 1

    def _with_array(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its tensor norms as an array: dicts of 20,000 rows would take gigabytes."""
        norm_type = _number(row.pop("norm_type", 2.0))
        if norms := row.pop("tensor_norms", None):
            names = tuple(norms)
            self.names = self.names if names == self.names else names
            values = np.array([*map(_number, norms.values())])
            row["tensor_norms"] = self.names, values, norm_type if norm_type > 0 else 2.0
        return row

    def check(self) -> None:
        if self.rows:
            return
        if self.versions and self.num_broken:
            lines = "1 line" if self.num_broken == 1 else f"{self.num_broken:,} lines"
            raise HistoryError(f"has no step that can be read, but {lines} that cannot")
        if self.versions:
            raise HistoryError("has no step yet")
        if self.num_broken:
            raise HistoryError("is no history: distclip.History wrote no line of it")
        raise HistoryError("is empty")

    def run(self, name: str, path: Path) -> Run:
        rows = self.rows
        named = (key for row in rows for key, value in row.items() if _is_number(value))
        columns = {key: _column(rows, key) for key in dict.fromkeys(named) if key != "step"}
        with_groups = [row.get("groups", {}) for row in rows]
        groups = {
            group: {
                key: _column([each.get(group, {}) for each in with_groups], key)
                for key in _GROUP_NUMBERS
            }
            for group in dict.fromkeys(group for each in with_groups for group in each)
        }
        return Run(
            name=name,
            path=path,
            steps=np.array([row["step"] for row in rows], dtype=np.int64),
            columns=columns,
            groups=groups,
            tensors=_tensor_norms(rows),
            nonfinite={
                i: row["nonfinite_parameters"]
                for i, row in enumerate(rows)
                if "nonfinite_parameters" in row
            },
            num_broken=self.num_broken,
            num_replaced=self.num_replaced,
            versions=tuple(dict.fromkeys(self.versions)),
        )


def _whole(digits: str) -> int | float:
    """An int that fits 64 bits; else a float, infinity where it has too many digits."""
    return int(digits) if len(digits) < 19 else float(digits)


def _is_header(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(cast("dict[str, Any]", row).get("history"), int)


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    row = cast("dict[str, Any]", row)
    step = row.get("step")
    return (
        isinstance(step, int)
        and not isinstance(step, bool)
        and step >= 0
        and all(_is_number(row.get(name)) for name in _NUMBERS)
        and all(isinstance(row.get(name), bool) for name in _FLAGS)
        and all(_is_nested(name, row[name]) for name in _NESTED & row.keys())
    )


def _is_nested(name: str, value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    each = cast("dict[str, Any]", value).values()
    if name == "tensor_norms":
        return all(map(_is_number, each))
    if name == "nonfinite_parameters":
        return all(map(_are_ranks, each))
    return all(
        isinstance(g, dict) and all(_is_number(g.get(k)) for k in _GROUP_NUMBERS) for g in each
    )


def _are_ranks(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(rank, int) for rank in cast("list[Any]", value)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and value in NOT_FINITE)


def _number(value: Any) -> float:
    if isinstance(value, str):
        return NOT_FINITE.get(value, np.nan)
    return float(value) if isinstance(value, int | float) else np.nan


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> Floats:
    return np.array([_number(row.get(name)) for row in rows], dtype=np.float64)


def _tensor_norms(rows: Sequence[Mapping[str, Any]]) -> TensorNorms:
    having = [i for i, row in enumerate(rows) if "tensor_norms" in row]
    tables = {id(rows[i]["tensor_norms"][0]): rows[i]["tensor_norms"][0] for i in having}
    names = tuple(dict.fromkeys(name for table in tables.values() for name in table))
    index = {name: column for column, name in enumerate(names)}
    columns = {key: [index[name] for name in table] for key, table in tables.items()}
    norms, norm_types = np.full((len(having), len(names)), np.nan), np.empty(len(having))
    for k, i in enumerate(having):
        table, values, norm_types[k] = rows[i]["tensor_norms"]
        norms[k, columns[id(table)]] = values
    return TensorNorms(names, np.array(having, dtype=np.int64), norms, norm_types)
