from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.launch.runs import command, run, write_text
from tests.support.rows import Row, rows_of, without_seconds

# Enough steps that a run can be killed or warned while it goes on.
INTERRUPTED = ("--policy", "zclip", "--steps", "100", "--save-every", "20", "--layout", "fsdp2")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def one_rank(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one rank without torchrun: the training that every layout has to repeat."""
    out = tmp_path_factory.mktemp("one_rank")
    python = (sys.executable,)
    done = run(command(text, out, "--steps", "6", "--save-every", "3", launcher=python))
    assert done.returncode == 0, done.stderr
    assert "clipped" in done.stdout
    return out


@pytest.fixture(scope="session")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The run of two ranks to which every interrupted one has to be equal."""
    out = tmp_path_factory.mktemp("undisturbed")
    done = run(command(text, out, *INTERRUPTED))
    assert done.returncode == 0, done.stderr
    return without_seconds(rows_of(out))
