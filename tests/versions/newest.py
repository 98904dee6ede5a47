"""Tries the newest release of each framework that distclip works with, one at a time.

    python -m tests.versions.newest                     all of them
    python -m tests.versions.newest transformers

Each is installed into a venv that takes everything else from this one, and its own tests are run.
What broke is printed, and is no failure of this command: pyproject.toml says what is supported.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tests.versions.venvs import ROOT, Unavailable, run

# The name of a distribution -> its tests.
FRAMEWORKS = {
    "numba": ["tests/kernels/test_cpu_numba.py", "tests/kernels/test_backends.py"],
    "triton": [f"tests/kernels/test_{name}.py" for name in ("cuda", "cuda_units", "compiled")],
    "accelerate": ["tests/adapters/test_accelerate*.py"],
    "transformers": ["tests/adapters/test_transformers*.py"],
    "lightning": ["tests/adapters/test_lightning*.py"],
    "deepspeed": ["tests/adapters/test_deepspeed*.py"],
    "torchtitan": ["tests/adapters/test_torchtitan*.py"],
    "megatron-core": ["tests/adapters/test_megatron*.py"],
}
LENT = sysconfig.get_path("purelib")
LIMIT_S = 1800.0  # for the tests of one framework
LINES = 12  # of what broke


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.versions.newest", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FRAMEWORKS)}")
    names = parser.parse_args().names or list(FRAMEWORKS)
    if unknown := set(names) - set(FRAMEWORKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    for name in names:
        print(f"{name} {try_newest(name)}", flush=True)
    return 0


def try_newest(name: str) -> str:
    """In one line or a few, what its tests say."""
    with tempfile.TemporaryDirectory(prefix="distclip-newest-") as folder:
        try:
            newest = install_newest(name, Path(folder))
        except Unavailable as why:
            return f"not run: {why}"
        if newest == version(name):
            return f"{newest}: the newest is the one that is tested"
        return f"{newest}: {tested(Path(folder, 'bin', 'python'), FRAMEWORKS[name])}"


def install_newest(name: str, folder: Path) -> str:
    """Into a new venv, with torch as it is; returns the version."""
    run([sys.executable, "-m", "venv", str(folder)])
    python = str(folder / "bin" / "python")
    [site_packages] = folder.glob("lib/python*/site-packages")
    (site_packages / "lent.pth").write_text(LENT)
    (folder / "constraints.txt").write_text(f"torch=={version('torch')}")
    install = [python, "-m", "pip", "install", "--quiet", "--upgrade"]
    # DeepSpeed's build imports torch, and builds no kernels; torchtitan's data sets are not needed.
    options = ["--no-build-isolation", "--constraint", str(folder / "constraints.txt")]
    options += ["--no-deps"] if name in ("torchtitan", "megatron-core", "triton") else []
    run([*install, *options, name], {**os.environ, "DS_BUILD_OPS": "0"})
    code = f"from importlib.metadata import version; print(version('{name}'))"
    return run([python, "-c", code]).strip()


def tested(python: Path, patterns: Sequence[str]) -> str:
    files = [str(file) for pattern in patterns for file in sorted(ROOT.glob(pattern))]
    command = [str(python), "-m", "pytest", "-n", "2", "-q", "--tb=line", "-p", "no:cacheprovider"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [*command, "-r", "fE", *files],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    lines = ran.stdout.splitlines() or ran.stderr.splitlines() or ["nothing was said"]
    broke = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "\n    ".join([lines[-1], *broke[:LINES]])


if __name__ == "__main__":
    sys.exit(main())
