"""`distclip doctor`: whether distclip can work here, and what to do where it cannot."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from distclip.cli.console import UserError, progress
from distclip.cli.doctor.apart import Check, run_apart
from distclip.cli.doctor.finding import Finding

_STYLES = {"ok": "green", "warning": "yellow", "unusable": "bold red", "absent": "dim"}
_WORDS = {"unusable": "not usable"}  # for people; JSON has one word for each


@dataclass(frozen=True)
class Findings:
    """What `Doctor` has found, in the order in which it is shown."""

    findings: list[Finding]

    @property
    def failed(self) -> list[Finding]:
        """What distclip needs and cannot use."""
        return [one for one in self.findings if one.needed and one.status == "unusable"]

    @property
    def exit_code(self) -> int:
        return 1 if self.failed else 0

    def to_dict(self) -> dict[str, Any]:
        return {"usable": not self.failed, "checks": [one._asdict() for one in self.findings]}

    def __rich__(self) -> Group:
        parts: list[Any] = []
        for section, lines in groupby(self.findings, attrgetter("section")):
            table = Table.grid(padding=(0, 2))
            table.add_column(width=10)
            table.add_column(width=14)
            table.add_column(overflow="fold")
            for line in lines:
                table.add_row(_status(line), Text(line.name), _found(line))
            parts += [Text(section, "bold"), table, Text()]
        return Group(*parts, self._conclusion())

    def _conclusion(self) -> Text:
        if self.failed:
            names = ", ".join(dict.fromkeys(one.section for one in self.failed))
            return Text(f"Something that distclip needs does not work here: {names}.", "bold red")
        counts = Counter(one.status for one in self.findings)
        text = "What distclip needs works here"
        others = [
            f"{counts[status]} {words}"
            for status, words in (("warning", "with a warning"), ("unusable", "not usable"))
            if counts[status]
        ]
        return Text(f"{text}{'; ' * bool(others)}{', '.join(others)}.", "bold")


def _status(line: Finding) -> Text:
    return Text(_WORDS.get(line.status, line.status), _STYLES[line.status])


def _found(line: Finding) -> Text:
    text = Text(line.found)
    if line.advice:
        text.append(f"\n-> {line.advice}", "italic" if line.status == "absent" else "bold")
    return text


@dataclass(frozen=True)
class Doctor:
    """Tries what distclip needs on this machine, and says what to do where it fails.

    It looks at versions, devices, backends, kernels and frameworks, and clips on
    two local ranks, each result compared with float64. The exit code is 1 where
    something that distclip needs cannot be used.
    """

    timeout: float = 120.0
    """Seconds after which a check that gives no answer counts as failed."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def run(self) -> Findings:
        """Raises:
        UserError: the timeout is no number of seconds.
        """
        if not 0 < self.timeout < math.inf:
            raise UserError(f"--timeout {self.timeout}: a finite number of seconds above 0")
        with tempfile.TemporaryDirectory(prefix="distclip-") as folder:
            return Findings(sorted(self._findings(folder), key=_turn))

    def _findings(self, folder: str) -> Iterator[Finding]:
        from distclip.cli.doctor import frameworks, kernels, ranks, versions

        checks = [
            ranks.check("gloo", f"{folder}/gloo", self.timeout),
            *kernels.checks(),
            *frameworks.checks(f"{folder}/deepspeed"),
        ]
        found = [*versions.findings(), *ranks.backends(), *frameworks.absent()]
        found += self._run(checks)
        if ranks.can_use_nccl(found):  # then training here would not use gloo
            found = [one._replace(needed=one.needed and "gloo" not in one.section) for one in found]
            found += self._run([ranks.check("nccl", f"{folder}/nccl", self.timeout)])
        yield from found

    def _run(self, checks: list[Check]) -> Iterator[Finding]:
        with progress("checking", len(checks)) as advance:
            for check, answers in run_apart(checks, self.timeout):
                advance(f"{check.name}")
                yield from check.read(answers)


def _turn(line: Finding) -> tuple[int, str]:
    sections = ("versions", "devices", "kernels", "backends", "2 local ranks", "frameworks")
    index = next(i for i, name in enumerate(sections) if line.section.startswith(name))
    return index, line.section
