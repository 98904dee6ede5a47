"""launch.train: one rank, every layout, and a return to the same bits."""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import resource
import shutil
import socket
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from launch import train
from launch.checkpoint import Checkpoints
from launch.options import read_options
from launch.ranks import UserError
from tests.launch.runs import TINY, command, run
from tests.support.ranks import Ranks
from tests.support.rows import rows_of, without_seconds

pytestmark = pytest.mark.timeout(300)
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)
SIX_STEPS = (*TINY, "--steps", "6", "--save-every", "3")
LAYOUTS = ["ddp", "fsdp1", "fsdp2", "hsdp", "tp", "fsdp2+tp"]
STAGES = [pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in (1, 2, 3)]
ROW = {
    *("step", "loss", "total_norm", "limit", "coefficient", "clipped", "finite", "skipped", "lr"),
    *("seconds", "tokens"),
}
# Ranks add in another order, and AdamW makes large steps of small differences.
SAME_TRAINING = 1e-5


def train_here(*words: str) -> bool:
    """A training on the ranks of a pool: each process of a run imports torch for seconds."""
    finished = train.train(read_options(words), torch.device("cpu"))
    gc.collect()
    return finished


def check_same_training(out: Path, expected: Path) -> None:
    for row, one in zip(rows_of(out), rows_of(expected), strict=True):
        for name in ("loss", "total_norm", "coefficient"):
            where = (row["step"], name)
            assert row[name] == pytest.approx(one[name], rel=SAME_TRAINING), where
        assert row["clipped"] == one["clipped"]


def test_one_rank_writes_every_step_and_a_picture(one_rank: Path) -> None:
    rows = rows_of(one_rank)
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert all(set(row) == ROW and row["tokens"] == 8 * 32 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    clipped = [row for row in rows if row["clipped"]]
    assert clipped
    assert all(row["coefficient"] == pytest.approx(1 / row["total_norm"]) for row in clipped)
    assert (one_rank / "report.png").read_bytes().startswith(b"\x89PNG")
    names = sorted(path.name for path in (one_rank / "checkpoints").iterdir())
    assert names == ["step-0000003", "step-0000006"]


@pytest.mark.parametrize("layout", [*LAYOUTS, *STAGES])
def test_every_layout_trains_as_one_rank_does(
    four_on_cpus: Ranks, text: Path, one_rank: Path, tmp_path: Path, layout: str
) -> None:
    paths = ("--data", str(text), "--out", str(tmp_path))
    done = four_on_cpus.run(train_here, *SIX_STEPS, *paths, "--layout", layout)
    assert done == [True] * 4
    check_same_training(tmp_path, one_rank)


# The ranks of fsdp2 are killed, and resumed, in test_run.
@pytest.mark.parametrize("layout", ["ddp", "fsdp1", "fsdp2+tp", STAGES[1]])
def test_a_resumed_run_goes_on_to_the_same_bits(
    four_on_cpus: Ranks, text: Path, tmp_path: Path, layout: str
) -> None:
    paths = ("--data", str(text), "--out", str(tmp_path))
    policy = ("--policy", "adagc", "--policy.warmup-steps", "1")
    words = (*SIX_STEPS, *paths, "--layout", layout, *policy)
    four_on_cpus.run(train_here, *words)
    undisturbed = without_seconds(rows_of(tmp_path))
    assert len(undisturbed) == 6
    shutil.rmtree(tmp_path / "checkpoints" / "step-0000006")  # as if it had been killed before
    (tmp_path / "report.png").unlink()
    four_on_cpus.run(train_here, *words, "--resume")
    assert without_seconds(rows_of(tmp_path)) == undisturbed
    assert (tmp_path / "report.png").exists()


@pytest.mark.parametrize("layout", ["fsdp2", STAGES[2]])
def test_a_damaged_checkpoint_is_made_again_to_the_same_bits(
    four_on_cpus: Ranks, text: Path, tmp_path: Path, layout: str
) -> None:
    paths = ("--data", str(text), "--out", str(tmp_path))
    words = (*SIX_STEPS, *paths, "--layout", layout, "--policy", "zclip")
    four_on_cpus.run(train_here, *words)
    undisturbed = without_seconds(rows_of(tmp_path))
    newest = tmp_path / "checkpoints" / "step-0000006"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    four_on_cpus.run(train_here, *words, "--resume")
    assert without_seconds(rows_of(tmp_path)) == undisturbed
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step-0000003", newest.name]


def test_a_finished_run_without_its_rows(four_on_cpus: Ranks, text: Path, tmp_path: Path) -> None:
    words = (*SIX_STEPS, "--data", str(text), "--out", str(tmp_path))
    four_on_cpus.run(train_here, *words)
    (tmp_path / "history.jsonl").unlink()
    assert four_on_cpus.run(train_here, *words, "--resume") == [True] * 4
    assert rows_of(tmp_path) == []


def refusal_here(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        train_here(*words)
    return str(caught.value)


def test_a_checkpoint_of_another_model_is_refused(
    four_on_cpus: Ranks, text: Path, one_rank: Path
) -> None:
    words = (*SIX_STEPS, "--data", str(text), "--out", str(one_rank), "--resume", "--width", "64")
    for said in four_on_cpus.run(refusal_here, *words):
        assert "step-0000006 is of a run with width 32 and this one has width 64" in said
        assert "\n" not in said
    assert len(rows_of(one_rank)) == 6


def without_room_for_checkpoints(*words: str) -> str:
    save = Checkpoints.save

    def limited(checkpoints: Checkpoints, step: int) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
        try:
            save(checkpoints, step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with mock.patch.object(Checkpoints, "save", limited):
        return refusal_here(*words)


def test_a_checkpoint_for_which_there_is_no_room(
    four_on_cpus: Ranks, text: Path, tmp_path: Path
) -> None:
    """How the mistake is shown, and once: test_run."""
    words = (*SIX_STEPS, "--data", str(text), "--out", str(tmp_path), "--layout", "fsdp2")
    for said in four_on_cpus.run(without_room_for_checkpoints, *words):
        assert "cannot be written: " in said
        assert "\n" not in said
    assert len(rows_of(tmp_path)) == 3


@needs_deepspeed
def test_a_checkpoint_without_zero_is_refused(
    four_on_cpus: Ranks, text: Path, one_rank: Path
) -> None:
    paths = ("--data", str(text), "--out", str(one_rank))
    for said in four_on_cpus.run(refusal_here, *SIX_STEPS, *paths, "--resume", "--layout", "zero2"):
        assert "is of a run without ZeRO: use its --layout, or another --out" in said


@pytest.mark.parametrize(("model", "layout"), [("gpt", "fsdp1"), ("lstm", "tp")])
def test_fp16_with_its_loss_scale(
    four_on_cpus: Ranks, text: Path, tmp_path: Path, model: str, layout: str
) -> None:
    paths = ("--data", str(text), "--out", str(tmp_path))
    words = (*SIX_STEPS, *paths, "--model", model, "--layout", layout, "--precision", "fp16")
    four_on_cpus.run(train_here, *words, "--policy.max-norm", "0.3")
    rows = rows_of(tmp_path)
    assert sum(row["finite"] and row["clipped"] for row in rows) >= 3
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("layout", ["fsdp2", STAGES[1]])
def test_a_run_that_diverges_says_which_parameters(
    four_on_cpus: Ranks, text: Path, tmp_path: Path, layout: str
) -> None:
    paths = ("--data", str(text), "--out", str(tmp_path), "--save-every", "0")
    diverges = ("--policy", "none", "--optimizer", "sgd", "--lr", "1e30", "--steps", "3")
    norms = ("--tensor-norms", "2") if layout == "fsdp2" else ()
    words = (*TINY, *paths, *diverges, *norms, "--layout", layout)
    assert four_on_cpus.run(train_here, *words) == [True] * 4
    first, *_, last = rows_of(tmp_path)
    assert first["finite"]
    assert "nonfinite_parameters" not in first
    assert not last["finite"]
    assert last["nonfinite_parameters"]
    if norms:
        assert math.hypot(*first["tensor_norms"].values()) == pytest.approx(first["total_norm"])
        assert last["nonfinite_parameters"].keys() == last["tensor_norms"].keys()
        assert ["tensor_norms" in row for row in rows_of(tmp_path)] == [True, False, True]


@needs_deepspeed
def test_deepspeeds_launcher(text: Path, one_rank: Path, tmp_path: Path) -> None:
    bin_folder = Path(sys.executable).parent
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    start = (sys.executable, str(bin_folder / "deepspeed"), "--num_gpus=2", "--module")
    options = ("--steps", "6", "--save-every", "0", "--layout", "zero2")
    words = command(text, tmp_path, *options, launcher=(*start, f"--master_port={port}"))
    words.remove("-m")  # --module says so
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    done = run(words, DS_ACCELERATOR="cpu", PATH=path)
    assert done.returncode == 0, done.stderr
    check_same_training(tmp_path, one_rank)
