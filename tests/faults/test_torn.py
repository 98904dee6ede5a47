"""Trainings that are killed at any moment, some on a full disk, go on to the same bits: torn.py.

`make test` has 8 kills and 2 full disks, DISTCLIP_TRUST=1 has 200 and 40.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.faults.hostile import TRUST
from tests.faults.torn import campaign, can_mount

NUM_KILLS, NUM_FULL = (200, 40) if TRUST else (8, 2)
pytestmark = [pytest.mark.ranks, pytest.mark.timeout(7200 if TRUST else 400)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for module in (json, subprocess):
        source = Path(module.__file__)
        (folder / source.name).write_text(source.read_text())
    return folder


def test_kills(text: Path, tmp_path: Path) -> None:
    tally = campaign(text, tmp_path, 0, NUM_KILLS, num_full=0)
    print(tally.num)
    assert tally.findings == []
    assert tally.num["kills"] >= NUM_KILLS
    assert tally.num["left unfinished-*"] > 0  # a kill in a save


@pytest.mark.skipif(not can_mount(), reason="to mount a tmpfs takes root")
def test_full_disks(text: Path, tmp_path: Path) -> None:
    tally = campaign(text, tmp_path, 1, num_kills=0, num_full=NUM_FULL)
    print(tally.num)
    assert tally.findings == []
    assert tally.num["full disks"] >= NUM_FULL
