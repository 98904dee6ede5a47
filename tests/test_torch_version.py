"""`import distclip` with an older torch: one sentence, and nothing else runs before it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distclip.torch_version import OLDEST

ROOT = Path(__file__).parent.parent
IMPORTED = "import sys, torch; assert 'stand-in' in torch.__file__; import distclip"


def import_distclip(folder: Path, torch_version: str) -> str:
    """The last line of stderr, with a torch that has a version and nothing else."""
    package = folder / "stand-in" / "torch"
    package.mkdir(parents=True)
    package.joinpath("__init__.py").write_text(f"__version__ = {torch_version!r}")
    paths = os.pathsep.join([str(package.parent), str(ROOT)])
    ran = subprocess.run(
        [sys.executable, "-c", IMPORTED],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert ran.returncode == 1
    return ran.stderr.splitlines()[-1]


@pytest.mark.parametrize("version", ["2.8.0", "2.8.0+cpu", "1.13.1", "2.8.0a0+git1234"])
def test_an_older_torch_is_one_sentence(tmp_path: Path, version: str) -> None:
    assert import_distclip(tmp_path, version) == (
        f"ImportError: distclip needs torch 2.9 or later, and torch {version} is installed: "
        f'`pip install "torch>=2.9"`.'
    )


@pytest.mark.parametrize("version", ["2.9.0", "2.10.0", "2.15.0+cu130", "3.0.0.dev20270101"])
def test_a_newer_torch_is_not_refused(tmp_path: Path, version: str) -> None:
    """The stand-in has nothing but a version: what fails is the next import."""
    assert "distclip needs" not in import_distclip(tmp_path, version)


def test_the_package_declares_the_same_bound() -> None:
    bound = ".".join(map(str, OLDEST))
    assert f'\ndependencies = ["torch>={bound}"]\n' in (ROOT / "pyproject.toml").read_text()
