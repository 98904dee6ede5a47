"""What `benchmarks.gpu` leaves of its records: lines of JSON, tables, a dated result."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks import tables
from benchmarks.gpu_device import Record

TITLE = "One CUDA device: what is right, what waits, how fast"
LEGEND = """\
device us: median time of the device for one call, with all calls queued before the first one began.
host us: what the host needs to queue one call. GB/s: bytes that must be moved, by the device time.
right, wrong: checks; of a section that raised or was ended the rest is unknown.
Goals are for an H100, and one that is missed is no error."""
IN_TABLES = {"section", "device_us", "host_us", "gb_s", "note"}


def write(record: Record, file: IO[str]) -> None:
    """At once, to the terminal and the file: a run that is cut off leaves what it had."""
    line = json.dumps({key: _plain(value) for key, value in record.items()}, default=str)
    print(line, flush=True)
    file.write(line + "\n")
    file.flush()


def _plain(value: Any) -> Any:
    """Six digits; JSON has neither NaN nor infinity."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def is_wrong(record: Record) -> bool:
    return "error" in record or record.get("right") is False


def driver() -> str:
    """The version of the card's driver, if the machine tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run.stdout.split("\n", 1)[0].strip()


def publish(records: Sequence[Record], about: Mapping[str, str], folder: Path) -> None:
    """Prints the tables, and saves them with the facts under today's date."""
    parts: dict[str, list[list[str]]] = {
        "sections": sections(records),
        "wrong": wrong(records),
        "goals": goals(records),
        "times": times(records),
    }
    parts = {heading: lines for heading, lines in parts.items() if len(lines) > 1}
    for heading, lines in parts.items():
        print(heading, tables.plain(lines), "", sep="\n")
    print(LEGEND, "", tables.listed(about), "", sep="\n")
    markdown = [f"## {heading}\n\n{tables.markdown(lines)}" for heading, lines in parts.items()]
    print(tables.save("gpu", TITLE, about, *markdown, LEGEND, folder=folder))


def sections(records: Sequence[Record]) -> list[list[str]]:
    lines = [["section", "seconds", "right", "wrong", ""]]
    for name in dict.fromkeys(record["section"] for record in records):
        mine = [record for record in records if record["section"] == name]
        checks = [record["right"] for record in mine if "right" in record]
        took = sum(record.get("took_s", 0.0) for record in mine)
        notes = [f"skipped: {r['skipped']}" for r in mine if "skipped" in r]
        notes += [_last_line(r["error"]) for r in mine if "error" in r]
        counts = [str(checks.count(True)), str(checks.count(False))]
        lines.append([name, f"{took:.1f}", *counts, _cell("; ".join(notes))])
    return lines


def wrong(records: Sequence[Record]) -> list[list[str]]:
    lines = [["section", "check", "found"]]
    for record in records:
        if record.get("right") is False:
            lines.append(
                [record["section"], _cell(record["check"]), _rest(record, "check", "right")]
            )
    return lines


def goals(records: Sequence[Record]) -> list[list[str]]:
    lines = [["goal", "found", "at most", ""]]
    for record in records:
        if "goal" in record:
            reached = "reached" if record["reached"] else "not reached"
            numbers = [f"{record['found']:.4g}", f"{record['at_most']:.4g}"]
            lines.append([_cell(record["goal"]), *numbers, reached])
    return lines


def times(records: Sequence[Record]) -> list[list[str]]:
    lines = [["section", "what", "device us", "host us", "GB/s", "note"]]
    for record in records:
        if "device_us" in record or (record.get("note") and "check" not in record):
            numbers = [_number(record.get(name)) for name in ("device_us", "host_us", "gb_s")]
            note = _cell(record.get("note", ""))
            lines.append([record["section"], _rest(record), *numbers, note])
    return lines


def _rest(record: Record, *but: str) -> str:
    """Everything of a record that has no column of its own."""
    left = {k: v for k, v in record.items() if k not in {*IN_TABLES, *but}}
    named = ("what", "shapes", "state", "by")
    texts = [str(left.pop(name)) for name in named if name in left]
    texts += [f"{k}={_number(v) if isinstance(v, float) else v}" for k, v in left.items()]
    return _cell(", ".join(texts))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def _cell(text: str) -> str:
    """A table's cell has one line and no bar."""
    return " ".join(text.split()).replace("|", "/")
