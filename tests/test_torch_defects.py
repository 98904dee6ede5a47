"""What is wrong in torch alone, by version: a version that has mended it is noticed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.torch_versions import DEFECTS, TORCH, Defect

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "tests" / "versions" / "defects"
LAUNCHER = ("-m", "torch.distributed.run", "--standalone")


@pytest.mark.ranks
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.script)
def test_the_script_shows_the_defect_where_torch_has_it(defect: Defect) -> None:
    script = str(SCRIPTS / f"{defect.script}.py")
    ran = subprocess.run(
        [sys.executable, *LAUNCHER, f"--nproc-per-node={defect.num_ranks}", script],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if defect.is_here:
        assert ran.returncode, f"torch {TORCH} has it no more: correct `fixed`"
        assert defect.shows in ran.stderr, ran.stderr
    else:
        assert ran.returncode == 0, ran.stderr


def test_the_document_lists_each_script() -> None:
    page = (ROOT / "docs" / "versions.md").read_text()
    for defect in DEFECTS:
        fixed = ".".join(map(str, defect.fixed))
        assert f"| before {fixed} | {defect.reason}" in page
    assert {script.stem for script in SCRIPTS.glob("*.py")} == {each.script for each in DEFECTS}
