"""A venv with one version of torch on one version of Python, deleted when it is left."""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.versions.stand_ins import add_stand_ins

ROOT = Path(__file__).parents[2]
LIMIT_S = 1200.0  # for one call of pip, which may bring 2 GB
TEST_TOOLS = ["pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "numpy", "numba"]
# Of what torch needs, what machines without a GPU do not.
OF_GPUS = re.compile(r"nvidia|cuda")
# The pins are resolved on this Python. Of these packages each torch asks for its own.
PINNED_PYTHON = "3.11"
NOT_PINNED = re.compile(r"(torch|triton|setuptools|fsspec|sympy)==")


class Version(NamedTuple):
    torch: str
    python: str  # "3.11"

    def __str__(self) -> str:
        return f"torch {self.torch} on Python {self.python}"


class Unavailable(Exception):
    """In one line, why a version cannot be had on this machine."""


@contextmanager
def venv(version: Version, triton: bool = True) -> Iterator[Path]:
    """Makes one, with or without Triton, and gives the path of its Python.

    Raises:
        Unavailable: no such Python, no compiler, or pip does not find the torch.
    """
    base = find_python(version.python)
    if lacking := [name for name in ("gcc", "readelf") if not shutil.which(name)]:
        raise Unavailable(f"{' and '.join(lacking)} cannot be found")
    with tempfile.TemporaryDirectory(prefix="distclip-versions-") as folder:
        run([base, "-m", "venv", folder])
        python = Path(folder, "bin", "python")
        _install(python, version, triton)
        yield python


def find_python(version: str) -> str:
    """The path of an interpreter: on PATH, or among those of pyenv."""
    pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    on_path = shutil.which(f"python{version}")
    of_pyenv = sorted(glob.glob(f"{pyenv}/versions/{version}.*/bin/python"))
    for candidate in [*filter(None, [on_path]), *of_pyenv]:
        ran = subprocess.run([candidate, "-c", ""], capture_output=True, timeout=60, check=False)
        if ran.returncode == 0:  # a shim of pyenv may stand for a version that is not switched on
            return candidate
    raise Unavailable(f"there is no Python {version} on this machine")


def _install(python: Path, version: Version, triton: bool) -> None:
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    env = _without_constraints(python)
    run([*pip, "--no-deps", f"torch=={version.torch}"], env)
    [site_packages] = python.parents[1].glob("lib/python*/site-packages")
    pins = _pins(python.parents[1]) if version.python == PINNED_PYTHON else []
    run([*pip, *pins, *_needs_of_torch(python, triton), *TEST_TOOLS], env)
    add_stand_ins(site_packages)


def _without_constraints(python: Path) -> dict[str, str]:
    """The settings of this machine's pip, but for one: it may hold torch to other versions."""
    env = {**os.environ, "PIP_CONFIG_FILE": os.devnull}
    for line in run([str(python), "-m", "pip", "config", "list"]).splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.partition(".")
        if section in ("global", "install") and option != "constraint":
            env.setdefault(f"PIP_{option.upper().replace('-', '_')}", value.strip("'\""))
    return env


def _needs_of_torch(python: Path, triton: bool) -> list[str]:
    code = "from importlib.metadata import requires; print(*requires('torch'), sep='\\n')"
    needs = run([str(python), "-c", code]).splitlines()
    needs = [need for need in needs if not OF_GPUS.match(need) and "extra ==" not in need]
    return [need for need in needs if triton or not need.startswith("triton")]


def _pins(folder: Path) -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not NOT_PINNED.match(line)]
    (folder / "constraints.txt").write_text("\n".join(pins))
    return ["--constraint", str(folder / "constraints.txt")]


def run(command: Sequence[str], env: dict[str, str] | None = None) -> str:
    """What a command prints.

    Raises:
        Unavailable: it failed; with its last line.
    """
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=env
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{' '.join(command)} took more than {LIMIT_S:.0f} s") from error
    if ran.returncode:
        said = ran.stderr.splitlines() or [f"{' '.join(command)} ended with {ran.returncode}"]
        errors = [line for line in said if line.startswith("ERROR: ")]
        raise Unavailable([*said, *errors][-1].removeprefix("ERROR: "))
    return ran.stdout
