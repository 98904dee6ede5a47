"""What `benchmarks.clip` and `.sharded` leave: tables, a CSV, a picture, a dated result."""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.baselines import PLAIN_READ, TORCH
from benchmarks.goals import HEAD as GOALS
from benchmarks.goals import AtMost, Goal
from benchmarks.timing import Row, find, milliseconds, ratio

PEERS = ("torchtitan", "megatron-core", "deepspeed", "triton", "numba")
QUANTILES = ("p20", "p50", "p80")
COLUMNS = ["", "ms: median (p20 to p80)", "times as fast as torch", "plain reads"]
HEAD = [*COLUMNS, "norm off by", "gradients off by", "note"]
LEGEND = """\
times as fast as torch: the ratio of the medians, then p20 and p80 of the ratio of each round.
plain reads: the median time in multiples of that of reading as many bytes once.
off by: relative, from float64; of the gradients the worst element."""


def record(row: Row, rows: Sequence[Row]) -> dict[str, str]:
    """The line of the CSV. What was not measured is empty."""
    torch, read = (find(rows, row.case, row.state, name) for name in (TORCH, PLAIN_READ))
    ms, times, reads = milliseconds(row), ratio(torch, row), ratio(row, read)
    spreads = {"ms": ms, "times_torch": times, "plain_reads": reads}
    numbers = {f"{name}_{q}": s and getattr(s, q) for name, s in spreads.items() for q in QUANTILES}
    numbers |= {"norm_error": row.norm_error, "grad_error": row.grad_error}
    names = {"case": row.case, "state": row.state, "baseline": row.baseline}
    texts = {name: "" if value is None else f"{value:.6g}" for name, value in numbers.items()}
    return {**names, "rounds": str(len(row.seconds)), **texts, "note": row.note}


def cells(record: dict[str, str]) -> list[str]:
    """The line of the table: the numbers of the CSV to three digits."""

    def short(name: str) -> str:
        return f"{float(record[name]):.3g}" if record[name] else "-"

    def three(name: str) -> str:
        p20, p50, p80 = (short(f"{name}_{q}") for q in QUANTILES)
        return p50 if p50 == "-" else f"{p50} ({p20} to {p80})"

    errors = [short("plain_reads_p50"), short("norm_error"), short("grad_error")]
    return [record["baseline"], three("ms"), three("times_torch"), *errors, record["note"]]


@dataclass(frozen=True)
class Benchmark:
    """One run of `python -m benchmarks.MODULE`: its options, when it began, the load then."""

    module: str
    title: str
    quick: bool = False
    rounds: int = 25
    only: str = ""
    out: Path | None = None
    began: float = field(default_factory=time.perf_counter)
    load: float = field(default_factory=lambda: os.getloadavg()[0])

    @staticmethod
    def parse(module: str, title: str, about: str | None, argv: Sequence[str] | None) -> Benchmark:
        parser = tables.parser(module, about)
        add, results = parser.add_argument, "benchmarks/results, or runs/benchmarks for a part"
        add("--quick", action="store_true", help="few rounds of small shapes: a check, not a speed")
        add("--rounds", type=int, default=25, help="rounds that count")
        add("--only", default="", metavar="NAME", help="cases whose names contain this")
        add("--out", type=Path, metavar="DIR", help=f"for the results; by default {results}")
        return Benchmark(module, title, **vars(parser.parse_args(argv)))

    @property
    def num_rounds(self) -> int:
        return min(self.rounds, 3) if self.quick else self.rounds

    @property
    def folder(self) -> Path:
        part = self.quick or self.only
        return self.out or (Path("runs/benchmarks") if part else tables.RESULTS)

    def measure(self, cases: Sequence[Any], measure_case: Callable[..., list[Row]]) -> list[Row]:
        """The rows of the cases that `--only` names. Ends the program where there is none."""
        if not (chosen := [case for case in cases if self.only in case.name]):
            names = ", ".join(case.name for case in cases)
            sys.exit(f"--only {self.only!r}: no such case among {names}")
        rows: list[Row] = []
        for case in chosen:
            print(f"{time.perf_counter() - self.began:6.1f} s: {case.name}", file=sys.stderr)
            rows += measure_case(case, self.num_rounds)
        return rows

    def facts(self, work: str) -> dict[str, str]:
        about = tables.run_facts(self.began)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        about["machine"] += f", {memory:.0f} GiB of memory"
        for peer in PEERS:
            with suppress(PackageNotFoundError):
                about["versions"] += f", {peer} {version(peer)}"
        load = f"{self.load:.2f} at the start, {os.getloadavg()[0]:.2f} at the end"
        about["load"] = f"{load}, on {os.cpu_count()} cores{self.load_warning}"
        quick = ", --quick: smaller and fewer tensors than the names say" if self.quick else ""
        about["work"] = f"{work}; {self.num_rounds} rounds or more in turn{quick}"
        return about

    @property
    def load_warning(self) -> str:
        """Two threads wait for each other on a core that other programs use; one does not."""
        too_high = self.load > 0.5 * (os.cpu_count() or 1)
        return ": too high for these numbers to count" if too_high else ""

    def publish(self, rows: Sequence[Row], goals: Sequence[Goal | AtMost], work: str) -> int:
        """Prints and writes everything; 1 where distclip is wrong or did not run."""
        records, about = [record(row, rows) for row in rows], self.facts(work)
        measured: dict[str, list[list[str]]] = {}
        for each in records:
            measured.setdefault(f"{each['case']}, {each['state']}", [HEAD]).append(cells(each))
        cases = {row.case for row in rows}
        judged = [GOALS, *(goal.judge(rows) for goal in goals if goal.case in cases)]
        for heading, lines in {**measured, "goals of distclip": judged}.items():
            print(heading, tables.plain(lines), "", sep="\n")
        sections = [f"## {name}\n\n{tables.markdown(lines)}" for name, lines in measured.items()]
        parts = [tables.markdown(judged), *sections, LEGEND]
        if drawn := find_spec("matplotlib") is not None:
            parts.insert(0, f"![{self.title}]({self.module}-{about['date']}.png)")
        path = tables.save(self.module, self.title, about, *parts, folder=self.folder)
        with path.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
        if drawn:
            from benchmarks import picture

            picture.draw(rows, goals, self.title, path.with_suffix(".png"))
        print(LEGEND, "", tables.listed(about), "", f"{path}, .csv{', .png' * drawn}", sep="\n")
        return int(any(r.baseline.startswith("distclip") and not r.seconds for r in rows))
