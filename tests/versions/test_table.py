"""What `make test-versions` writes, and what it says where a version cannot be had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.versions.core import QUICK, ROOT, core
from tests.versions.table import HEAD, Row, read_counts, write_rows
from tests.versions.venvs import Unavailable, Version, find_python, run

TESTS = """
import pytest
@pytest.fixture
def broken(): raise ValueError
def test_passes(): pass
def test_fails(): assert False
def test_cannot_start(broken): pass
@pytest.mark.parametrize("n", range(3))
def test_is_skipped(n): pytest.skip("here")
"""


@pytest.mark.ranks
def test_counts_are_those_of_pytest(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=100, check=False)
    assert read_counts(report) == (1, 2, 3)


def test_rows_of_other_versions_stay(tmp_path: Path) -> None:
    page = tmp_path / "versions.md"
    another = "| framework | lowest |\n|---|---|\n| Numba | 0.68.1 | the same |\n"
    page.write_text(f"# Versions\n\n{HEAD}\nThe rest.\n\n{another}")
    first, second = Version("2.10.0", "3.11"), Version("2.9.1", "3.11")
    write_rows(page, [Row(first, "core", 5, 0, 1, "2026-11-25")])
    write_rows(page, [Row(second, "part", 4, 1, 2, "2026-11-26")])
    write_rows(page, [Row(first, "core", 6, 0, 0, "2026-11-27")])
    assert page.read_text() == (
        f"# Versions\n\n{HEAD}| 2.9.1 | 3.11 | part | 4 | 1 | 2 | 2026-11-26 |\n"
        f"| 2.10.0 | 3.11 | core | 6 | 0 | 0 | 2026-11-27 |\n\nThe rest.\n\n{another}"
    )


def test_the_page_has_a_table() -> None:
    assert (ROOT / "docs" / "versions.md").read_text().count(HEAD) == 1


def test_what_cannot_be_had_is_one_line() -> None:
    with pytest.raises(Unavailable, match=r"^there is no Python 3\.1 on this machine$"):
        find_python("3.1")
    code = "import sys; sys.exit('one\\nERROR: no such torch\\nhint')"
    with pytest.raises(Unavailable, match=r"^no such torch$"):
        run([sys.executable, "-c", code])


def test_the_core_is_there() -> None:
    for path in [*core(), *QUICK]:
        assert (ROOT / path).exists(), path
