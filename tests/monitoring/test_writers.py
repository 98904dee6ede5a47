"""TensorBoard's and W&B's own files, as History's writers leave them."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import distclip
from distclip.monitoring import TensorBoardWriter, WandbWriter

ROOT = Path(__file__).parents[2]


def clipped(*gradients: float, names: Sequence[str] = ("a.weight", "b.weight")) -> distclip.Report:
    """The report of a step, in which each tensor is a parameter group of one element."""
    groups: list[dict[str, Any]] = []
    for name, gradient in zip(names, gradients, strict=True):
        weight = torch.nn.Parameter(torch.zeros(1))
        weight.grad = torch.tensor([gradient])
        groups.append({"params": [(name, weight)], "name": name[0], "policy": distclip.ClipNorm(1)})
    return distclip.Clipper(groups, tensor_norms=True).clip_()


# TensorBoard -------------------------------------------------------------------------------------


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder: Path, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events(folder).Scalars(tag)}


def test_a_row_in_tensorboard(tmp_path: Path) -> None:
    with distclip.History(tmp_path, writers=[TensorBoardWriter(tmp_path / "events")]) as history:
        history.append(clipped(3.0, 4.0), step=7, loss=0.5, lr=0.125, **{"eval/loss": 2.0})
    shown = events(tmp_path / "events")
    values = {tag: [e.value for e in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}
    assert values == {
        "train/grad_norm": [5.0],
        "train/grad_norm_limit": [1.0],
        "train/clip_coefficient": [0.25],
        "train/finite": [1.0],
        "train/clipped": [1.0],
        "train/skipped": [0.0],
        "train/loss": [0.5],
        "train/learning_rate": [0.125],
        "eval/loss": [2.0],
        "train/grad_norm/a": [3.0],
        "train/grad_norm_limit/a": [1.0],
        "train/clip_coefficient/a": [pytest.approx(1 / 3)],
        "train/grad_norm/b": [4.0],
        "train/grad_norm_limit/b": [1.0],
        "train/clip_coefficient/b": [0.25],
        "grad_norm/a.weight": [3.0],
        "grad_norm/b.weight": [4.0],
    }
    assert {event.step for tag in values for event in shown.Scalars(tag)} == {7}


def test_the_order_of_the_norms_is_no_curve(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    clipper = distclip.Clipper([weight], distclip.ClipNorm(1, 1.0), tensor_norms=True)
    with distclip.History(tmp_path, writers=[TensorBoardWriter(tmp_path / "events")]) as history:
        history.append(clipper.clip_())
    assert '"norm_type": 1.0' in history.path.read_text()
    tags = events(tmp_path / "events").Tags()["scalars"]
    assert "train/grad_norm" in tags
    assert not [tag for tag in tags if "norm_type" in tag]


def test_what_is_not_finite_and_what_is_text_in_tensorboard(tmp_path: Path) -> None:
    with distclip.History(tmp_path, writers=[TensorBoardWriter(tmp_path)]) as history:
        history.append(clipped(1.0, 1.0), loss=math.inf)
        report = clipped(1.0, math.nan)
        causes = report.nonfinite_parameters()
        history.append(report, nonfinite_parameters=causes, loss=-math.inf, phase="warm-up")
    assert math.isnan(scalars(tmp_path, "train/grad_norm")[2])
    assert math.isnan(scalars(tmp_path, "grad_norm/b.weight")[2])
    assert scalars(tmp_path, "train/loss") == {1: math.inf, 2: -math.inf}
    assert scalars(tmp_path, "train/finite") == {1: 1.0, 2: 0.0}
    texts = {
        tag: [event.tensor_proto.string_val[0] for event in events(tmp_path).Tensors(tag)]
        for tag in events(tmp_path).Tags()["tensors"]
    }
    assert texts == {
        "train/phase/text_summary": [b"warm-up"],
        "train/nonfinite_parameters/text_summary": [b"b.weight on ranks [0]"],
    }


def test_a_row_is_in_tensorboards_file_at_once(tmp_path: Path) -> None:
    """A kill loses no row, as it loses none of history.jsonl."""
    with distclip.History(tmp_path, writers=[TensorBoardWriter(tmp_path / "events")]) as history:
        history.append(clipped(1.0, 1.0))
        history.append(clipped(2.0, 2.0))
        (file,) = (tmp_path / "events").iterdir()
        written = file.read_bytes()
    assert file.read_bytes() == written
    assert scalars(tmp_path / "events", "train/grad_norm/b") == {1: 1.0, 2: 2.0}


def test_steps_that_are_made_again_replace_those_of_the_earlier_start(tmp_path: Path) -> None:
    for start in ({1: 1.0, 2: 2.0, 3: 3.0}, {2: 20.0}):
        with distclip.History(tmp_path, writers=[TensorBoardWriter(tmp_path)]) as history:
            for step, loss in start.items():
                history.append(clipped(1.0, 1.0), step=step, loss=loss)
    assert scalars(tmp_path, "train/loss") == {1: 1.0, 2: 20.0}


def test_two_figures_of_one_name(tmp_path: Path) -> None:
    history = distclip.History(tmp_path, writers=[TensorBoardWriter(tmp_path / "events")])
    said = "TensorBoardWriter failed in step 1: .*'train/grad_norm': 1.4.* and 0.5. Give"
    with history, pytest.warns(UserWarning, match=said):
        history.append(clipped(1.0, 1.0), grad_norm=0.5)


def test_other_ranks_open_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    writers = [TensorBoardWriter(tmp_path / "events"), WandbWriter(dir=str(tmp_path))]
    with distclip.History(tmp_path, writers=writers) as history:
        history.append(clipped(1.0, 1.0))
    assert [*tmp_path.iterdir()] == []


# Packages that are not there ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "package"),
    [(lambda: TensorBoardWriter("nowhere"), "tensorboard"), (WandbWriter, "wandb")],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_package_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, package: str, rank: int
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.delitem(sys.modules, package, raising=False)
    (tmp_path / package).mkdir()  # what W&B leaves where it runs is no package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    said = f"{package} is not installed. Run `pip install {package}`"
    with pytest.raises(ImportError, match=said):
        make()


def test_making_a_writer_imports_neither_package() -> None:
    code = """
import sys, distclip
from distclip.monitoring import TensorBoardWriter, WandbWriter
TensorBoardWriter("nowhere"), WandbWriter()
print([name for name in ("tensorboard", "wandb") if name in sys.modules])
"""
    assert python(code).strip() == "[]"


# Weights & Biases --------------------------------------------------------------------------------

TWO_RUNS = """
import math, sys, wandb, distclip
from distclip.monitoring import WandbWriter, history as history_module
from tests.monitoring.test_writers import clipped

own = distclip.History("own", writers=[WandbWriter(project="own")])  # before W&B itself starts
mine = wandb.init(project="mine")
history = distclip.History("mine", writers=[WandbWriter(project="theirs")])
for step, loss in enumerate((0.5, math.inf, math.nan), start=1):
    figures = {"loss": loss, "lr": 0.125, "phase": "warm-up", "eval/loss": 2.0}
    report = clipped(3.0, 4.0 if step < 3 else math.nan)
    figures["nonfinite_parameters"] = report.nonfinite_parameters()
    history.append(report, step=step, **figures)
history.close()
assert wandb.run is mine
mine.log({"last": 1})
mine.finish()

own.append(clipped(3.0, 4.0), step=3)
own.append(clipped(3.0, 4.0), step=1)
# As on an accelerator: the last row is still on its way when the program ends.
class Late:
    def query(self): return False
    def synchronize(self): pass
history_module.recorded_event = lambda device: Late()
own.append(clipped(3.0, 4.0), step=4)
assert '"step": 4' not in own.path.read_text()
"""


def python(code: str, **env: str) -> str:
    """What a program of its own prints; it may neither fail nor warn."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
        cwd=env.get("WANDB_DIR"),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wandb_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The records of two runs of W&B, by project: one of the user, one of the writer."""
    folder = tmp_path_factory.mktemp("wandb")
    env = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
    env |= {"WANDB_DIR": str(folder), "HOME": str(folder)}
    assert python(TWO_RUNS, **env) == ""
    assert not [path for path in processes() if str(folder) in path]
    found = [[*records(path)] for path in folder.glob("wandb/offline-run-*/*.wandb")]
    return {next(r.run.project for r in run if r.HasField("run")): run for run in found}


def processes() -> Iterator[str]:
    """The environments of all processes, in which W&B's own has its folder."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            yield path.read_bytes().decode(errors="replace")
        except OSError:
            continue


def records(path: Path) -> Iterator[Any]:
    """Those of a .wandb file, which is a log of LevelDB with a header of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, record, at = path.read_bytes(), b"", 7
    assert content.startswith(b":W&B")
    while at + 7 <= len(content):
        if (left := -at % 32768) < 7 and left:  # too little for a header, up to the next block
            at += left
            continue
        checksum, size, kind = struct.unpack("<IHB", content[at : at + 7])
        part = content[at + 7 : at + 7 + size]
        assert checksum == zlib.crc32(part, zlib.crc32(bytes([kind])))
        record, at = record + part, at + 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(record)
            record = b""


def rows(run: Sequence[Any]) -> list[dict[str, Any]]:
    """What was logged, without W&B's own figures."""
    logged = [record.history.item for record in run if record.HasField("history")]
    return [
        {
            item.nested_key[0]: json.loads(item.value_json)
            for item in items
            if not item.nested_key[0].startswith("_")
        }
        for items in logged
    ]


def test_rows_in_the_run_of_the_user(wandb_runs: dict[str, list[Any]]) -> None:
    first, second, third, last = rows(wandb_runs["mine"])
    assert first == {
        "train/global_step": 1,
        "train/grad_norm": 5.0,
        "train/grad_norm_limit": 1.0,
        "train/clip_coefficient": 0.25,
        "train/finite": 1,
        "train/clipped": 1,
        "train/skipped": 0,
        "train/loss": 0.5,
        "train/learning_rate": 0.125,
        "train/phase": "warm-up",
        "eval/loss": 2.0,
        "train/grad_norm/a": 3.0,
        "train/grad_norm_limit/a": 1.0,
        "train/clip_coefficient/a": pytest.approx(1 / 3),
        "train/grad_norm/b": 4.0,
        "train/grad_norm_limit/b": 1.0,
        "train/clip_coefficient/b": 0.25,
        "grad_norm/a.weight": 3.0,
        "grad_norm/b.weight": 4.0,
    }
    assert second["train/loss"] == math.inf
    assert math.isnan(third["train/loss"])
    assert math.isnan(third["grad_norm/b.weight"])
    assert third["train/nonfinite_parameters"] == "b.weight on ranks [0]"
    assert last == {"last": 1}  # after `close`: the run is the user's to finish
    assert "theirs" not in wandb_runs


def test_every_figure_is_over_the_step(wandb_runs: dict[str, list[Any]]) -> None:
    metrics = [record.metric for record in wandb_runs["mine"] if record.HasField("metric")]
    over = {metric.name or metric.glob_name: metric.step_metric for metric in metrics}
    assert over.pop("train/global_step") == ""
    assert over == dict.fromkeys(("train/*", "grad_norm/*", "eval/loss"), "train/global_step")


def test_rows_in_a_run_of_the_writer(wandb_runs: dict[str, list[Any]]) -> None:
    """No row is lost: neither one of an earlier step, nor one that comes at the very end."""
    own = wandb_runs["own"]
    assert [row["train/global_step"] for row in rows(own)] == [3, 1, 4]
    assert [record.exit.exit_code for record in own if record.HasField("exit")] == [0]
