"""Checkpoints: whole or not there, and written by the last start of a run alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from launch.checkpoint import Checkpoints
from launch.ranks import UserError, on_rank_0
from tests.support.ranks import Ranks


class Value:
    """What a trainer saves: here one number."""

    def __init__(self) -> None:
        self.value = torch.zeros(1)

    def save(self, folder: Path) -> None:
        dcp.save({"value": self.value}, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        dcp.load({"value": self.value}, checkpoint_id=folder)


def save_steps(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.trainer.value.fill_(step)
        checkpoints.save(step)


def names(checkpoints: Checkpoints) -> list[str]:
    return [path.name for path in checkpoints.complete()]


def taken_over(folder: Path, moment: str) -> str:
    """A later start claims the folder; what the earlier one then says when it saves."""
    first = Checkpoints(folder, Value(), {}, resume=False)
    save_steps(first, 1, 2, 3)
    assert names(first) == ["step-0000002", "step-0000003"]
    later, discard, finish = copy.copy(first), first._discard, first._finish
    if moment == "claimed, not yet cleared":
        later._discard = lambda path: None
    if moment == "before":
        later.token = on_rank_0(lambda: later._claim(resume=True))
    else:  # the ranks have written their shares, and rank 0 is about to complete them
        first._finish = lambda *args: (later._claim(resume=True), finish(*args))[1]
    with pytest.raises(UserError) as caught:
        save_steps(first, 4)
    later.token = on_rank_0(lambda: later.token)
    if moment == "claimed, not yet cleared":
        on_rank_0(lambda: [discard(path) for path in folder.glob("unfinished-*")])
    assert not list(folder.glob("unfinished-*"))
    assert later.load() == 3
    assert later.trainer.value.item() == 3
    save_steps(later, 4)
    assert later.load() == 4
    return str(caught.value)


@pytest.mark.parametrize("moment", ["before", "between", "claimed, not yet cleared"])
def test_a_start_that_was_taken_over_completes_no_checkpoint(
    four_on_cpus: Ranks, tmp_path: Path, moment: str
) -> None:
    for said in four_on_cpus.run(taken_over, tmp_path / "checkpoints", moment):
        assert "now belongs to a later start of this run" in said


def resumed(folder: Path, resume: bool) -> list[str]:
    """The checkpoints that a new start finds, after `load` has chosen the last."""
    checkpoints = Checkpoints(folder, Value(), {}, resume=resume)
    found = names(checkpoints)
    assert checkpoints.load() == (5 if found else 0)
    return found


def test_what_a_kill_leaves_is_not_chosen(four_on_cpus: Ranks, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    four_on_cpus.run(save_and_leave, folder)
    (folder / "unfinished-x-6").mkdir()
    (folder / "step-0000007").mkdir()  # without run.json, which is written last
    assert four_on_cpus.run(resumed, folder, True) == [["step-0000004", "step-0000005"]] * 4
    assert not (folder / "unfinished-x-6").exists()
    assert four_on_cpus.run(resumed, folder, False) == [[]] * 4


def save_and_leave(folder: Path) -> None:
    save_steps(Checkpoints(folder, Value(), {}, resume=False), 4, 5)


def test_a_damaged_checkpoint_is_refused(four_on_cpus: Ranks, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    four_on_cpus.run(save_and_leave, folder)
    (folder / "step-0000005" / "run.json").write_text("{")
    for said in four_on_cpus.run(refusal, folder):
        assert "step-0000005: its run.json is damaged; remove that folder" in said


def refusal(folder: Path) -> str:
    checkpoints = Checkpoints(folder, Value(), {}, resume=True)
    with pytest.raises(UserError) as caught:
        checkpoints.load()
    return str(caught.value)
