"""Trainings that are killed at any moment, some on a full disk, go on to the same bits: torn.py.

`make test` has 8 kills and 2 full disks, DISTCLIP_TRUST=1 has 200 and 40.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.faults.hostile import TRUST
from tests.faults.small_disk import can_mount
from tests.faults.torn import KINDS, Kind, Undisturbed, campaign, undisturbed

NUM_KILLS, NUM_FULL = (200, 40) if TRUST else (8, 2)
pytestmark = [pytest.mark.ranks, pytest.mark.timeout(7200 if TRUST else 400)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for module in (json, subprocess):
        source = Path(module.__file__)
        (folder / source.name).write_text(source.read_text())
    return folder


@pytest.fixture(scope="module")
def rights(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Undisturbed]:
    return {kind: undisturbed(kind, text, tmp_path_factory.mktemp("right")) for kind in KINDS}


def test_kills(text: Path, tmp_path: Path, rights: dict[Kind, Undisturbed]) -> None:
    tally = campaign(text, tmp_path, rights, 0, NUM_KILLS, num_full=0)
    print(tally.num)
    assert tally.findings == []
    assert tally.num["kills"] >= NUM_KILLS
    assert tally.num["left unfinished-*"] > 0  # a kill in a save


def test_full_disks(text: Path, tmp_path: Path, rights: dict[Kind, Undisturbed]) -> None:
    if not can_mount():
        pytest.skip("to mount a tmpfs takes root")
    tally = campaign(text, tmp_path, rights, 1, num_kills=0, num_full=NUM_FULL)
    print(tally.num)
    assert tally.findings == []
    assert tally.num["full disks"] >= NUM_FULL
