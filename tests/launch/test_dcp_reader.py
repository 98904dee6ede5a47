"""Pickles in checkpoints: they are read, and nothing that they ask for is executed."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, Metadata

from launch.checkpoint import Checkpoints
from launch.dcp_reader import SafePlanner, SafeReader
from launch.ranks import UserError
from tests.support.ranks import Ranks


class Calls:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Trainer:
    """Saves a tensor and values that are no tensors."""

    def __init__(self, **values: Any) -> None:
        self.states = {"tensor": torch.zeros(3, dtype=torch.bfloat16), **values}

    def save(self, folder: Path) -> None:
        dcp.save(self.states, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        dcp.load(self.states, storage_reader=SafeReader(folder), planner=SafePlanner())


VALUES = {"rate": 0.1, "betas": (0.9, 0.95), "none": None, "names": ["a"], "map": {"x": {"y": 1}}}


def saved_and_loaded(folder: Path) -> dict[str, Any]:
    trainer = Trainer(**VALUES)
    trainer.states["tensor"].fill_(2.5)
    trainer.save(folder)
    other = Trainer(**{**dict.fromkeys(VALUES), "map": {"x": {"y": 0}}})
    other.load(folder)
    return other.states


def test_what_a_checkpoint_needs_is_read(four_on_cpus: Ranks, tmp_path: Path) -> None:
    for states in four_on_cpus.run(saved_and_loaded, tmp_path / "step"):
        assert states.pop("tensor").tolist() == [2.5] * 3
        assert states == VALUES


def test_the_metadata_is_that_of_torch(four_on_cpus: Ranks, tmp_path: Path) -> None:
    four_on_cpus.run(metadata_is_that_of_torch, tmp_path / "step")


def metadata_is_that_of_torch(folder: Path) -> None:
    Trainer(**VALUES).save(folder)
    theirs = FileSystemReader(folder).read_metadata()
    ours = SafeReader(folder).read_metadata()
    ours.storage_meta = theirs.storage_meta = None
    assert ours == theirs


def in_metadata(folder: Path, path: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data["more"] = Calls(path)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def instead_of_metadata(folder: Path, path: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Calls(path)))


def by_an_attribute(folder: Path, path: Path) -> None:
    """Reaches for what an allowed module or class has."""
    text = f"ctorch\nserialization.os.mkdir\n(V{path}\ntR."
    (folder / ".metadata").write_bytes(b"\x80\x04" + text.encode())


def by_a_wrong_class(folder: Path, path: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(OrderedDict(a=1)))


def in_a_value(folder: Path, path: Path) -> None:
    """DCP writes a value that is no tensor by torch.save; the offsets stay."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    torch.save(Calls(path), buffer := io.BytesIO())
    for index, info in metadata.storage_data.items():
        if index.fqn == "rate":
            file = folder / info.relative_path
            info.offset = file.stat().st_size
            info.length = len(buffer.getvalue())
            file.write_bytes(file.read_bytes() + buffer.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


ATTACKS = [in_metadata, instead_of_metadata, by_an_attribute, by_a_wrong_class, in_a_value]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_pickle_is_not_executed(four_on_cpus: Ranks, tmp_path: Path, attack: Any) -> None:
    folder, made = tmp_path / "checkpoints", tmp_path / "made"
    four_on_cpus.run(save_1_and_2, folder)
    attack(folder / "step-0000002", made)
    (folder / "step-0000002" / "run.json").write_text('{"step": 2}')  # no checksums help
    assert four_on_cpus.run(load_any, folder) == [1] * 4
    assert not made.exists()
    attack(folder / "step-0000001", made)
    (folder / "step-0000001" / "run.json").write_text('{"step": 1}')
    (said,) = set(four_on_cpus.run(load_any, folder))
    assert "no checkpoint can be loaded" in said
    assert "\n" not in said
    assert not made.exists()


def save_1_and_2(folder: Path) -> None:
    checkpoints = Checkpoints(folder, Trainer(rate=0.1), {}, resume=False)
    checkpoints.save(1)
    checkpoints.save(2)


def load_any(folder: Path) -> int | str:
    checkpoints = Checkpoints(folder, Trainer(rate=None), {}, resume=True)
    try:
        step = checkpoints.load()
    except UserError as error:
        return str(error)
    assert checkpoints.trainer.states["rate"] == 0.1
    return step


def test_the_attacks_would_succeed_in_torch(four_on_cpus: Ranks, tmp_path: Path) -> None:
    four_on_cpus.run(save_1_and_2, tmp_path / "checkpoints")
    in_metadata(tmp_path / "checkpoints" / "step-0000002", tmp_path / "made")
    metadata = FileSystemReader(tmp_path / "checkpoints" / "step-0000002").read_metadata()
    assert isinstance(metadata, Metadata)
    assert (tmp_path / "made").is_dir()
