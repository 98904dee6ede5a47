"""Checkpoints: whole or not there, and written by the last start of a run alone."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Shard, distribute_tensor

from launch.checkpoint import Checkpoints, _reason
from launch.dcp_reader import SafePlanner, SafeReader
from launch.ranks import UserError, on_rank_0
from tests.support.ranks import Ranks, mesh

WIDTH = {"width": 32}


class Value:
    """What a trainer saves: here one number, of which every rank holds copies of its own."""

    def __init__(self) -> None:
        self.value = distribute_tensor(torch.zeros(8), mesh((4,), ("rank",)), [Shard(0)])

    def save(self, folder: Path) -> None:
        dcp.save({"value": self.value}, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        states = {"value": self.value}
        dcp.load(states, storage_reader=SafeReader(folder), planner=SafePlanner())


def save_steps(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.trainer.value.to_local().fill_(step)
        checkpoints.save(step)


def names(checkpoints: Checkpoints) -> list[str]:
    return [path.name for path in checkpoints.complete()]


def taken_over(folder: Path, moment: str) -> str:
    """A later start claims the folder; what the earlier one then says when it saves."""
    first = Checkpoints(folder, Value(), WIDTH, resume=False)
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
    assert later.trainer.value.to_local()[0] == 3
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
    checkpoints = Checkpoints(folder, Value(), WIDTH, resume=resume)
    found = names(checkpoints)
    assert checkpoints.load() == (5 if found else 0)
    return found


def test_what_a_kill_leaves_is_not_chosen(four_on_cpus: Ranks, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    four_on_cpus.run(save_and_leave, folder)
    (folder / "unfinished-x-6").mkdir()
    (folder / "step-0000007").mkdir()  # without run.json, which is written last
    (folder.parent / f"checkpoints.{'a' * 32}").touch()  # a token without its name
    assert four_on_cpus.run(resumed, folder, True) == [["step-0000004", "step-0000005"]] * 4
    assert not (folder / "unfinished-x-6").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "checkpoints.owner"]
    assert four_on_cpus.run(resumed, folder, False) == [[]] * 4


def save_and_leave(folder: Path) -> None:
    save_steps(Checkpoints(folder, Value(), WIDTH, resume=False), 4, 5)


# Damage ------------------------------------------------------------------------------------------


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def of_facts(**changes: Any) -> Callable[[Path], None]:
    return rewrite("run.json", lambda data: json.dumps({**json.loads(data), **changes}).encode())


def without_facts(*names: str) -> Callable[[Path], None]:
    def change(data: bytes) -> bytes:
        return json.dumps({k: v for k, v in json.loads(data).items() if k not in names}).encode()

    return rewrite("run.json", change)


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def a_folder(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def both(first: Callable[[Path], None], second: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        first(folder)
        second(folder)

    return damage


def no_file(data: bytes) -> bytes:
    return b""


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def zeros(data: bytes) -> bytes:
    return bytes(len(data))


def one_bit(data: bytes) -> bytes:
    middle = data.index(struct.pack("<f", 5.0))  # an element: only a checksum tells
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


# Rank 2 alone reads the file __2_0.distcp.
FACTS_DAMAGES = {
    "no run.json": removed("run.json"),
    "empty": rewrite("run.json", no_file),
    "cut off": rewrite("run.json", half),
    "zeros": rewrite("run.json", zeros),
    "no text": rewrite("run.json", lambda _: b"\xff\xfe"),
    "a list": rewrite("run.json", lambda _: b"[5]"),
    "too deep": rewrite("run.json", lambda _: b"[" * 100_000),
    "a folder": a_folder("run.json"),
    "of another step": of_facts(step=4),
    "step as text": of_facts(step="5"),
    "step true": of_facts(step=True),
    "no step": without_facts("step"),
    "no width": without_facts("width"),
    "files is a list": of_facts(files=[]),
}
FILE_DAMAGES = {
    f"{name} {kind}": damage
    for name in (".metadata", "__2_0.distcp")
    for kind, damage in {
        "removed": removed(name),
        "empty": rewrite(name, no_file),
        "cut off": rewrite(name, half),
        "zeros": rewrite(name, zeros),
        "a folder": a_folder(name),
    }.items()
}
DAMAGES = {
    **FACTS_DAMAGES,
    **FILE_DAMAGES,
    "one bit of a number": rewrite("__2_0.distcp", one_bit),
    # Checkpoints of earlier versions have no checksums.
    **{
        f"{name}, no checksums": both(damage, without_facts("files"))
        for name, damage in FILE_DAMAGES.items()
    },
}


def resumed_with_line(folder: Path) -> tuple[int, float, str]:
    """The step, the values as they are after it, and what this rank printed."""
    checkpoints = Checkpoints(folder, Value(), WIDTH, resume=True)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        step = checkpoints.load()
    values = checkpoints.trainer.value.full_tensor().unique()
    assert len(values) == 1
    save_steps(checkpoints, 5)
    assert names(checkpoints) == ["step-0000004", "step-0000005"]
    assert Checkpoints(folder, Value(), WIDTH, resume=True).load() == 5
    assert not list(folder.glob("discarded-*"))
    return step, values.item(), printed.getvalue()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    four_on_cpus: Ranks, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "checkpoints"
    four_on_cpus.run(save_and_leave, folder)
    DAMAGES[damage](folder / "step-0000005")
    answers = four_on_cpus.run(resumed_with_line, folder)
    assert [answer[:2] for answer in answers] == [(4, 4.0)] * 4
    (line, *others) = [answer[2] for answer in answers]
    assert line.startswith(f"damaged: {folder}/step-0000005 (")
    assert line.endswith("): going on from step-0000004\n")
    assert line.count("\n") == 1
    assert not any(others)


def test_a_damaged_checkpoint_is_not_one_of_the_two_that_are_kept(
    four_on_cpus: Ranks, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    four_on_cpus.run(save_and_leave, folder)
    (folder / "step-0000005" / ".metadata").unlink()
    (found, *_) = four_on_cpus.run(resumed_and_saved, folder, 6)
    assert found == ["step-0000004", "step-0000006"]


def resumed_and_saved(folder: Path, step: int) -> list[str]:
    checkpoints = Checkpoints(folder, Value(), WIDTH, resume=True)
    checkpoints.load()
    save_steps(checkpoints, step)
    return names(checkpoints)


def test_all_checkpoints_are_damaged(four_on_cpus: Ranks, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    four_on_cpus.run(save_and_leave, folder)
    (folder / "step-0000005" / "run.json").write_text("{")
    (folder / "step-0000004" / "__2_0.distcp").unlink()
    (said,) = set(four_on_cpus.run(refusal, folder))
    assert f"no checkpoint can be loaded: {folder}/step-0000005 (its run.json is damaged); " in said
    assert "step-0000004 (a file cannot be read: " in said
    assert said.endswith(": remove them, or start without --resume")
    assert "\n" not in said


def test_another_run_is_no_damage(four_on_cpus: Ranks, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    four_on_cpus.run(save_and_leave, folder)
    of_facts(width=64)(folder / "step-0000005")
    (said,) = set(four_on_cpus.run(refusal, folder))
    assert "step-0000005 is of a run with width 64 and this one has width 32" in said


def refusal(folder: Path) -> str:
    checkpoints = Checkpoints(folder, Value(), WIDTH, resume=True)
    with pytest.raises(UserError) as caught:
        checkpoints.load()
    return str(caught.value)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    monkeypatch: pytest.MonkeyPatch, four_on_cpus: Ranks, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    (events, *_) = four_on_cpus.run(events_of_a_save, folder)
    renamed = events.index("rename step-0000001")
    assert {"fsync run.json", "fsync unfinished"} <= set(events[:renamed])
    assert "fsync checkpoints" in events[renamed:]


def events_of_a_save(folder: Path) -> list[str]:
    checkpoints = Checkpoints(folder, Value(), WIDTH, resume=False)
    events, fsync, rename = [], os.fsync, Path.rename

    def fsyncing(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        events.append(f"fsync {name.partition('-')[0]}")
        fsync(descriptor)

    def renaming(path: Path, target: Path) -> Path:
        events.append(f"rename {Path(target).name}")
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsyncing)
        patch.setattr(Path, "rename", renaming)
        save_steps(checkpoints, 1)
    return events


def test_old_checkpoints_are_renamed_before_they_are_removed(
    four_on_cpus: Ranks, tmp_path: Path
) -> None:
    """A kill in the middle of the removal leaves nothing that has the name of a checkpoint."""
    folder = tmp_path / "checkpoints"
    four_on_cpus.run(save_without_removing, folder)
    (half_removed,) = folder.glob("discarded-*")
    assert half_removed.name.endswith("step-0000001")
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-0000002", "step-0000003"]
    (folder / f"discarded-{'a' * 32}-step-0000009").mkdir()  # of a start before
    four_on_cpus.run(resumed_from_3, folder)
    assert not list(folder.glob("discarded-*"))


def test_a_kill_before_the_removal_leaves_two_after_the_next_start(
    four_on_cpus: Ranks, tmp_path: Path
) -> None:
    """A run that has ended makes no other checkpoint, which would remove them."""
    folder = tmp_path / "checkpoints"
    four_on_cpus.run(save_and_keep_all, folder)
    assert len([*folder.glob("step-*")]) == 3
    four_on_cpus.run(resumed_from_3, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["step-0000002", "step-0000003"]


def save_and_keep_all(folder: Path) -> None:
    checkpoints = Checkpoints(folder, Value(), WIDTH, resume=False)
    checkpoints._remove_old = lambda newest: None
    save_steps(checkpoints, 1, 2, 3)


def save_without_removing(folder: Path) -> None:
    checkpoints = Checkpoints(folder, Value(), WIDTH, resume=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        save_steps(checkpoints, 1, 2, 3)


def resumed_from_3(folder: Path) -> None:
    assert Checkpoints(folder, Value(), WIDTH, resume=True).load() == 3


# Disks, folders and files of others -------------------------------------------------------------


def test_what_cannot_be_removed_does_not_get_longer_names(
    four_on_cpus: Ranks, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    stuck = folder / f"discarded-{'a' * 32}-discarded-{'b' * 32}-step-0000001"
    stuck.mkdir(parents=True)
    four_on_cpus.run(claimed_without_removing, folder)
    assert [len(path.name) for path in folder.iterdir()] == [len("discarded--step-0000001") + 32]


def claimed_without_removing(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        Checkpoints(folder, Value(), WIDTH, resume=True)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "cannot be used: {path}: "),
        ("checkpoints", "cannot be used: {path}: "),
        ("checkpoints/step-0000007", "{path} is not a folder"),
        ("checkpoints/unfinished-x", "{path} is not a folder"),
        ("checkpoints/discarded-x", "{path} is not a folder"),
    ],
)
def test_a_file_where_a_folder_belongs(
    four_on_cpus: Ranks, tmp_path: Path, name: str, said: str, resume: bool
) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    (found,) = set(four_on_cpus.run(refused_start, tmp_path / "out" / "checkpoints", resume))
    assert said.format(path=path) in found or said.format(path=path / "checkpoints") in found
    assert "\n" not in found
    assert path.read_text() == "mine"


def refused_start(folder: Path, resume: bool) -> str:
    with pytest.raises(UserError) as caught:
        Checkpoints(folder, Value(), WIDTH, resume=resume)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("the folder is removed", ".owner was removed"),
        ("a file has the name", "step-0000004 is not a folder"),
        ("the disk of rank 2 is full", " MB free in "),
        ("the disk of rank 0 is full", " MB free in "),
        ("the disk is full at run.json", "step-0000004 cannot be written: "),
    ],
)
def test_a_checkpoint_that_cannot_be_written(
    four_on_cpus: Ranks, tmp_path: Path, what: str, said: str
) -> None:
    folder = tmp_path / "out" / "checkpoints"
    (found,) = set(four_on_cpus.run(failing_save, folder, what))
    assert said in found
    assert "\n" not in found
    if "removed" not in what:
        assert four_on_cpus.run(resumed_after_failure, folder) == [3] * 4


def test_a_full_disk_that_torch_reports_as_a_position() -> None:
    """What it says on the other ranks too, which do not get the error of the system."""
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert _reason(error) == "a file took fewer bytes than it was given"


def failing_save(folder: Path, what: str) -> str:
    checkpoints = Checkpoints(folder, Value(), WIDTH, resume=False)
    save_steps(checkpoints, 2, 3)
    finish = checkpoints._finish
    if what == "the folder is removed":
        on_rank_0(lambda: shutil.rmtree(folder.parent))
    elif what == "a file has the name":
        on_rank_0(lambda: (folder / "step-0000004").write_text("mine"))
    elif what == "the disk is full at run.json":
        checkpoints._finish = lambda *args: full_disk(finish, *args)
    full = what == f"the disk of rank {dist.get_rank()} is full"
    with pytest.raises(UserError) as caught:
        (full_disk if full else call)(save_steps, checkpoints, 4)
    if what == "a file has the name":
        on_rank_0((folder / "step-0000004").unlink)
    return str(caught.value)


def call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def full_disk(function: Callable[..., Any], *args: Any) -> Any:
    """As on a full disk, no file of this rank may have more than 20 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        return function(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def resumed_after_failure(folder: Path) -> int:
    return Checkpoints(folder, Value(), WIDTH, resume=True).load()
