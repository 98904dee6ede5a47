"""launch's checkpoints and options, damaged and hostile: one line, or what was saved."""

from __future__ import annotations

import json
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from launch import ranks
from launch.checkpoint import Checkpoints
from launch.dcp_reader import SafePlanner, SafeReader
from launch.options import POLICIES, Options, read_options
from launch.ranks import UserError
from tests.faults.hostile import JSONS, TEXTS, changed, damaged, drawn, text_of, tried

FACTS = {"width": 32, "policy": "ZClip", "lr": 0.5}
NEWEST, FILES = "step-0000005", ("run.json", ".metadata", "__0_0.distcp")
MOST_BYTES = 4 << 30  # of address space beside what the process has: a pickle may ask for any


class Value:
    """What a trainer saves: a tensor, and values that are none."""

    def __init__(self) -> None:
        self.tensor, self.more = torch.zeros(8), {"rate": 0.0, "names": ["a"]}

    def states(self) -> dict[str, Any]:
        return {"tensor": self.tensor, "more": self.more}

    def fill(self, number: float) -> None:
        self.tensor.fill_(number)
        self.more["rate"] = number

    def save(self, folder: Path) -> None:
        dcp.save(self.states(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        states = self.states()
        dcp.load(states, storage_reader=SafeReader(folder), planner=SafePlanner())
        self.more = states["more"]


@pytest.fixture(scope="module")
def saved() -> Iterator[Path]:
    """The checkpoints of the steps 4 and 5, of one rank."""
    ranks.join(torch.device("cpu"), 60.0)
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with tempfile.TemporaryDirectory() as folder:
        path, value = Path(folder) / "checkpoints", Value()
        checkpoints = Checkpoints(path, value, FACTS, resume=False)
        for step in (4, 5):
            value.fill(float(step))
            checkpoints.save(step)
        resource.setrlimit(resource.RLIMIT_AS, (size + MOST_BYTES, before[1]))
        yield path
        resource.setrlimit(resource.RLIMIT_AS, before)
    dist.destroy_process_group()


def change(data: st.DataObject, folder: Path) -> bool:
    """Changes files of the newest checkpoint; whether its checksums still stand in it."""
    facts = json.loads((folder / "run.json").read_text())
    hasher = data.draw(st.booleans())
    if not hasher:  # as in checkpoints of earlier versions
        del facts["files"]
    text = json.dumps(facts)
    if (name := data.draw(st.sampled_from(FILES))) != "run.json":
        (folder / name).write_bytes(data.draw(damaged((folder / name).read_bytes())))
    elif data.draw(st.booleans()):
        text = text_of(data.draw(changed(facts, JSONS, TEXTS)))
    if name == "run.json" and data.draw(st.booleans()):
        (folder / name).write_bytes(data.draw(damaged(text.encode())))
    else:
        (folder / "run.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    return hasher and name != "run.json"


@given(data=st.data())
@drawn(150)
def test_a_checkpoint_is_loaded_as_it_was_saved_or_gives_way(
    saved: Path, capsys: pytest.CaptureFixture[str], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as copy:
        folder = Path(copy) / "checkpoints"
        shutil.copytree(saved, folder)
        has_checksums = change(data, folder / NEWEST)
        value = Value()
        checkpoints = Checkpoints(folder, value, FACTS, resume=True)
        step, error = tried(checkpoints.load, UserError)
        if error is not None:
            assert f"checkpoint {folder / NEWEST} is of a run with" in str(error)
            assert all(map(str.isprintable, str(error)))
            assert len(str(error)) < 1000
            return
        printed = capsys.readouterr().out
        assert step in (4, 5)
        if step == 4:
            assert printed.count("\n") == 1
            assert printed.startswith(f"damaged: {folder / NEWEST} (")
            assert all(map(str.isprintable, printed[:-1]))
            assert len(printed) < 1500
        if step == 4 or has_checksums:
            assert value.tensor.tolist() == [float(step)] * 8
            assert value.more == {"rate": float(step), "names": ["a"]}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["/dev/zero", "../../../../../../../../../dev/zero", "\0", ""])
def test_files_that_are_none_of_the_checkpoint_are_not_read(
    saved: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    facts = json.loads((folder / NEWEST / "run.json").read_text())
    facts["files"][name] = "00000000"
    (folder / NEWEST / "run.json").write_text(json.dumps(facts))
    assert Checkpoints(folder, Value(), FACTS, resume=True).load() == 4


@pytest.mark.parametrize("value", ["a\nb\x1b[2J", "x" * 100_000, [[["a"]]], "\ud800", None])
def test_a_fact_of_another_run_is_one_line(saved: Path, tmp_path: Path, value: Any) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    facts = json.loads((folder / NEWEST / "run.json").read_text())
    (folder / NEWEST / "run.json").write_text(json.dumps({**facts, "policy": value}))
    with pytest.raises(UserError, match=r"is of a run with policy .* and this one has policy") as e:
        Checkpoints(folder, Value(), FACTS, resume=True).load()
    assert all(map(str.isprintable, str(e.value)))
    assert len(str(e.value)) < 1000


NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats().map(repr),
    TEXTS,
    st.sampled_from(["1" * 5000, "0x1", "1e9"]),
)
WORDS = st.one_of(
    st.tuples(
        st.sampled_from(["--steps", "--lr", "--width", "--corrupt", "--policy.max-norm", "--clip"]),
        NUMBERS,
    ),
    st.tuples(st.just("--policy"), st.one_of(st.sampled_from([*POLICIES]), TEXTS)),
    st.tuples(st.sampled_from(["--layout", "--model", "--out", "--data", "--policy.x"]), TEXTS),
    st.tuples(TEXTS),
)


@given(st.lists(WORDS, max_size=3))
@drawn(30)
def test_options_are_read_or_one_line_says_why(pairs: list[tuple[str, ...]]) -> None:
    words = [word for pair in pairs for word in pair if word not in ("-h", "--help")]
    options, error = tried(lambda: read_options(words), UserError)
    if error is not None:
        assert "\n" not in str(error)
        return
    assert isinstance(options, Options)
    assert options.steps >= 1
    assert options.lr > 0
