"""Trainings that are killed at any moment, some on a full disk, go on to the same bits: torn.py.

`make test` has 8 kills and 2 full disks, DISTCLIP_TRUST=1 has 200 and 40.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.hostile import TRUST
from tests.faults.small_disk import can_mount
from tests.faults.torn import KINDS, Kind, Tally, Undisturbed, campaign, undisturbed
from tests.launch.runs import write_text

NUM_KILLS, NUM_FULL = (200, 40) if TRUST else (8, 2)
pytestmark = [pytest.mark.ranks, pytest.mark.timeout(7200 if TRUST else 400)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def rights(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Undisturbed]:
    return {kind: undisturbed(kind, text, tmp_path_factory.mktemp("right")) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS, ids=["1 rank", "2 ranks"])
def test_kills(text: Path, tmp_path: Path, rights: dict[Kind, Undisturbed], kind: Kind) -> None:
    tally = campaign(kind, text, tmp_path, rights[kind], 0, NUM_KILLS // 2)
    look_at(tally)
    assert tally.num["kills"] >= NUM_KILLS // 2
    assert tally.num["left unfinished-*"] > 0  # a kill in a save


def test_full_disks(text: Path, tmp_path: Path, rights: dict[Kind, Undisturbed]) -> None:
    if not can_mount():
        pytest.skip("to mount a tmpfs takes root")
    tally = campaign(KINDS[0], text, tmp_path, rights[KINDS[0]], 1, 0, NUM_FULL)
    look_at(tally)
    assert tally.num["full disks"] >= NUM_FULL


def look_at(tally: Tally) -> None:
    print(tally.num)
    assert tally.findings == []
    assert tally.num["resumes from a checkpoint"] > 0
