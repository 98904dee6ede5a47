"""`distclip doctor`: whether distclip can work here, and what to do where it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Findings:
    checks: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {"checks": self.checks}

    def __rich__(self) -> Any:
        return "\n".join(self.checks)


@dataclass(frozen=True)
class Doctor:
    """Tries what distclip needs on this machine, and says what to do where it fails.

    It looks at versions, devices, backends, kernels and frameworks, and clips on
    two local ranks, each result compared with float64.
    """

    json: bool = False
    """Print one JSON object and nothing else."""

    def run(self) -> Findings:
        return Findings(["to be written"])
