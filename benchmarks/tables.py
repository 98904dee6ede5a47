"""Tables on the terminal and in markdown, and the facts of a run that stand beside them."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
Lines = Sequence[Sequence[str]]  # the first one is the head


def plain(lines: Lines) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in ruled)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def markdown(lines: Lines) -> str:
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def listed(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def save(
    module: str, title: str, facts: Mapping[str, str], *parts: str, folder: Path | None = None
) -> Path:
    """Writes a result in markdown under the name of its module and today's date."""
    path = (folder or RESULTS) / f"{module}-{date.today().isoformat()}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    made_by = f"Made by `python -m benchmarks.{module}`."
    path.write_text("\n\n".join([f"# {title}", listed(facts), *parts, made_by]) + "\n")
    return path


def parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """Described by the first line of `about`, the docstring of the module."""
    summary = (about or "").partition("\n")[0]
    return argparse.ArgumentParser(f"python -m benchmarks.{module}", description=summary)


def run_facts(began: float) -> dict[str, str]:
    """When, on which machine and with which versions; `began` is a time of `time.perf_counter`."""
    # The version that was imported, which need not be the one that is installed.
    distclip = getattr(sys.modules.get("distclip"), "__version__", "not imported")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, distclip {distclip}"
    cpu_kind = torch.backends.cpu.get_cpu_capability()
    return {
        "date": date.today().isoformat(),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, {cpu_kind}",
        "versions": versions,
        "seconds": f"{time.perf_counter() - began:.1f}",
    }


def cpu_name() -> str:
    """Only Linux writes the name where every user can read it; elsewhere it is the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
