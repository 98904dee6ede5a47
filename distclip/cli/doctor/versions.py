"""Python, torch and distclip: what must be there before anything else is tried."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator

import torch

import distclip
from distclip.adapters.frameworks import Framework
from distclip.cli.doctor.finding import Finding

TORCH = Framework("torch", "2.6", "2.13")  # what distclip needs, and what its tests run with
_LOWEST_PYTHON = (3, 10)
_SECTION = "versions"


def findings() -> Iterator[Finding]:
    """What can be read without a process of its own: this one has imported torch."""
    yield _python()
    yield _torch(torch.__version__)
    yield Finding(_SECTION, "distclip", "ok", distclip.__version__)


def is_between(version: str, lowest: str, highest: str) -> bool:
    """Whether a version is one of those, as far as both ends go: 2.13.1 is not above 2.13."""

    def numbers(text: str, length: int) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", text)[:length]]

    low, high = (len(re.findall(r"\d+", end)) for end in (lowest, highest))
    return numbers(version, low) >= numbers(lowest, low) and numbers(version, high) <= numbers(
        highest, high
    )


def _python() -> Finding:
    found = platform.python_version()
    if sys.version_info >= _LOWEST_PYTHON:
        return Finding(_SECTION, "Python", "ok", found)
    advice = "use Python 3.10 or later"
    return Finding(_SECTION, "Python", "unusable", found, advice, needed=True)


def _torch(version: str) -> Finding:
    if not is_between(version, TORCH.lowest, "999999"):
        advice = f'pip install "torch>={TORCH.lowest}"'
        return Finding(_SECTION, "torch", "unusable", version, advice, needed=True)
    if is_between(version, TORCH.highest, TORCH.highest):
        return Finding(_SECTION, "torch", "ok", version)
    found = f"{version}; the tests of distclip run with {TORCH.highest}"
    return Finding(_SECTION, "torch", "warning", found, "see whether the checks below are ok")
