"""What a benchmark leaves behind: tables on the terminal, a CSV, a picture and a dated result."""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol, TypeVar

from rich.console import Console
from rich.table import Table

from benchmarks import picture
from benchmarks.correctness import RESULTS, about_this_run
from benchmarks.goals import JUDGED, Judged
from benchmarks.rivals import CLIPPER, FUNCTION, OVERLAP, PLAIN_READ, TORCH
from benchmarks.timing import Row, find, ratio, spread

PEERS = ("torchtitan", "megatron-core", "deepspeed", "triton", "numba")
HEADER = [
    "",
    "ms: median (p20 to p80)",
    "times as fast as torch",
    "plain reads",
    "norm off by",
    "gradients off by",
    "note",
]
LEGEND = (
    "times as fast as torch: the ratio of the medians, then p20 and p80 of the ratio of each round. plain reads: the "
    "median time in multiples of that of reading as many bytes once. off by: relative, from float64; of the gradients "
    "the worst element."
)


class Named(Protocol):
    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Named)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How long to measure, and where to put what was found."""

    quick: bool = False
    """A few rounds of small shapes: shows that it works, and nothing of how fast."""
    rounds: int = 25
    """Rounds that count."""
    only: str = ""
    """Leave out the cases whose names do not contain this."""
    out: Path | None = None
    """Folder for NAME-DATE.md, .csv and .png; by default benchmarks/results, or runs/benchmarks for a part."""

    @property
    def num_rounds(self) -> int:
        return min(self.rounds, 3) if self.quick else self.rounds

    @property
    def folder(self) -> Path:
        return self.out or (Path("runs/benchmarks") if self.quick or self.only else RESULTS)

    def chosen(self, cases: Sequence[C]) -> list[C]:
        """Ends the program where none is left."""
        found = [case for case in cases if self.only in case.name]
        if not found:
            sys.exit(f"--only {self.only!r}: no such case among {', '.join(case.name for case in cases)}")
        return found


@dataclass(frozen=True)
class Began:
    """When a run began, and how busy the machine was."""

    at: float = field(default_factory=time.perf_counter)
    load: str = field(default_factory=lambda: f"{os.getloadavg()[0]:.2f}")


def facts(began: Began, options: Options, work: str) -> dict[str, str]:
    about = about_this_run(time.perf_counter() - began.at)
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    about["machine"] += f", {ram:.0f} GiB of memory"
    about["versions"] += "".join(f", {peer} {installed(peer)}" for peer in PEERS if installed(peer))
    rounds = f"{options.num_rounds} rounds or more in turn" + (
        ", --quick: smaller and fewer tensors than the names say" if options.quick else ""
    )
    return {
        **about,
        "load": f"{began.load} at the start, {Began().load} at the end, on {os.cpu_count()} cores{busy(began)}",
        "work": f"{work}; {rounds}",
    }


def busy(began: Began) -> str:
    """A warning, since two threads on a core that other programs use wait for each other, and one thread does not."""
    return ": too busy for these numbers to count" if float(began.load) > 0.5 * (os.cpu_count() or 1) else ""


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def record(row: Row, rows: Sequence[Row]) -> dict[str, str]:
    """The line of the CSV. What was not measured is empty."""
    names = {"case": row.case, "state": row.state, "rival": row.rival, "rounds": str(len(row.seconds))}
    torch, read = (find(rows, row.case, row.state, name) for name in (TORCH, PLAIN_READ))
    ms = spread([1e3 * s for s in row.seconds]) if row.seconds else None
    found = {"ms": ms, "times_torch": ratio(torch, row), "plain_reads": ratio(row, read)}
    numbers = {f"{k}_{q}": "" if s is None else f"{getattr(s, q):.6g}" for k, s in found.items() for q in QUANTILES}
    errors = {"norm_error": row.norm_error, "grad_error": row.grad_error}
    counts = {"launches": row.launches, "syncs": row.syncs}
    rest = {name: "" if value is None else f"{value:.6g}" for name, value in {**errors, **counts}.items()}
    return {**names, **numbers, **rest, "note": row.note}


QUANTILES = ("p20", "p50", "p80")


def cells(record: dict[str, str]) -> list[str]:
    """The line of the table: the numbers of the CSV to three digits."""
    ms, times = (three(*(record[f"{name}_{q}"] for q in QUANTILES)) for name in ("ms", "times_torch"))
    reads, norm, grads = (short(record[name]) for name in ("plain_reads_p50", "norm_error", "grad_error"))
    counts = [f"{record[name]} {name}" for name in ("launches", "syncs") if record[name]]
    return [record["rival"], ms, times, reads, norm, grads, ", ".join([*counts, *filter(None, [record["note"]])])]


def three(p20: str, p50: str, p80: str) -> str:
    return f"{short(p50)} ({short(p20)} to {short(p80)})" if p50 else "-"


def short(number: str) -> str:
    return f"{float(number):.3g}" if number else "-"


def tables(records: Sequence[dict[str, str]]) -> dict[str, list[list[str]]]:
    """By title: one table for each case and state, in the order in which they were measured."""
    found: dict[str, list[list[str]]] = {}
    for each in records:
        found.setdefault(f"{each['case']}, {each['state']}", [HEADER]).append(cells(each))
    return found


def print_table(console: Console, title: str, lines: Sequence[Sequence[str]]) -> None:
    table = Table(*lines[0], title=title, title_justify="left", title_style="bold")
    for line in lines[1:]:
        table.add_row(*line)
    console.print(table)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))


def progress(name: str, began: Began) -> None:
    """A sign of life on standard error."""
    print(f"{time.perf_counter() - began.at:6.1f} s: {name}", file=sys.stderr, flush=True)


def publish(
    name: str,
    title: str,
    rows: Sequence[Row],
    goals: Sequence[Judged],
    options: Options,
    began: Began,
    work: str,
) -> int:
    """Shows and writes everything; 1 where distclip is wrong or did not run."""
    records, about = [record(row, rows) for row in rows], facts(began, options, work)
    here = {row.case for row in rows}
    judged = [JUDGED, *(goal.judged(rows) for goal in goals if goal.case in here)]
    console = Console(width=None if Console().is_terminal else 180)
    for heading, lines in tables(records).items():
        print_table(console, heading, lines)
    print_table(console, "goals of distclip", judged)
    console.print(LEGEND, *(f"{fact}: {value}" for fact, value in about.items()), sep="\n", highlight=False)
    stem = options.folder / f"{name}-{date.today().isoformat()}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_csv(stem.with_suffix(".csv"), records)
    picture.draw(rows, goals, title, stem.with_suffix(".png"))
    parts = [f"## {heading}\n\n{markdown_table(lines)}\n" for heading, lines in tables(records).items()]
    listed = "\n".join(f"- {fact}: {value}" for fact, value in about.items())
    head = [f"# {title}\n", listed, f"\n![{title}]({stem.name}.png)\n", f"{markdown_table(judged)}\n"]
    made = f"{LEGEND}\n\nMade by `python -m benchmarks.{name}`.\n"
    stem.with_suffix(".md").write_text("\n".join([*head, *parts, made]))
    console.print(f"{stem}.md, .csv, .png", highlight=False, soft_wrap=True)
    return int(any(row.rival in (CLIPPER, FUNCTION, OVERLAP) and not row.seconds for row in rows))


def write_csv(path: Path, records: Sequence[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
