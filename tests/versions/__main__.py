"""Runs the core of the suite on other versions of torch and Python, each in a venv of its own.

    python -m tests.versions                            every version; writes docs/versions.md
    python -m tests.versions --torch 2.9.1 --python 3.13
    python -m tests.versions --quick                    a part, on the oldest and the newest torch

A version that cannot be had on this machine is one line, and no failure.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

from tests.versions.core import QUICK, ROOT, core
from tests.versions.table import Row, read_counts, write_rows
from tests.versions.venvs import Unavailable, Version, venv

OLDEST, NEWEST = Version("2.9.1", "3.11"), Version("2.15.0", "3.11")
# Every torch and every Python once, and the ends more often.
VERSIONS = [
    OLDEST,
    Version("2.10.0", "3.10"),
    Version("2.11.0", "3.12"),
    Version("2.12.1", "3.11"),
    Version("2.13.0", "3.11"),
    Version("2.14.1", "3.12"),
    NEWEST,
    Version("2.15.0", "3.13"),
]
PAGE = ROOT / "docs" / "versions.md"
LIMIT_S = 3600.0  # for the tests on one version


def main() -> int:
    options = read_options()
    rows: list[Row] = []
    for version in versions_of(options):
        started = time.monotonic()
        try:
            with venv(version, triton=not options.quick) as python:
                rows.append(run_core(python, version, options.quick))
        except Unavailable as why:
            print(f"{version}: not run, {why}", flush=True)
            continue
        print(f"{rows[-1]} in {time.monotonic() - started:.0f} s", flush=True)
        if not options.quick:
            write_rows(PAGE, rows)
    return any(row.failed for row in rows)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a part of the core; writes nothing")
    parser.add_argument("--torch", nargs="*", help="versions of torch, such as 2.9.1")
    parser.add_argument("--python", nargs="*", default=["3.11"], help="for --torch; default: 3.11")
    return parser.parse_args()


def versions_of(options: argparse.Namespace) -> Iterable[Version]:
    if options.torch:
        return [Version(torch, python) for python in options.python for torch in options.torch]
    return [OLDEST, NEWEST] if options.quick else VERSIONS


def run_core(python: Path, version: Version, quick: bool) -> Row:
    tests = QUICK if quick else core()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [str(python), "-m", "pytest", "-n", "2", "-q", "--tb=short", "--no-header"]
        command += ["-p", "no:cacheprovider", "-r", "fE", f"--junitxml={report}", *tests]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        ran = subprocess.run(command, cwd=ROOT, env=env, timeout=LIMIT_S, check=False)
        if not report.exists():
            raise SystemExit(f"{version}: pytest ended with {ran.returncode} and ran nothing")
        today = datetime.now(timezone.utc).date().isoformat()
        row = Row(version, "part" if quick else "core", *read_counts(report), today)
    if ran.returncode and not row.failed:
        raise SystemExit(f"{version}: pytest ended with {ran.returncode}, and no test failed")
    return row


if __name__ == "__main__":
    sys.exit(main())
