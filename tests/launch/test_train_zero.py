"""launch/train.py on DeepSpeed's ZeRO, started by torchrun and by DeepSpeed's own launcher."""

import importlib
import importlib.util
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from tests.launch import test_train
from tests.launch.test_train import LAUNCH, ONE_AFTER_ANOTHER, SAME_TRAINING, command, numbers, rows_of, run, train

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]
text, whole = test_train.text, test_train.whole


def check_same_training(out, whole):
    for row, expected in zip(rows_of(out), rows_of(whole), strict=True):
        for name in ("loss", "total_norm", "coefficient"):
            assert row[name] == pytest.approx(expected[name], rel=SAME_TRAINING), (row["step"], name)
        assert row["clipped"] == expected["clipped"]


def test_every_stage_trains_as_one_rank_does(text, whole, tmp_path):
    several = tmp_path / "several.py"
    several.write_text(ONE_AFTER_ANOTHER)
    words = command(2, text, tmp_path, "--steps", "6", "--save-every", "0")
    words[words.index(str(LAUNCH / "train.py"))] = str(several)
    done = run([*words, "zero1", "zero2", "zero3"])
    assert done.returncode == 0, done.stderr
    for layout in ("zero1", "zero2", "zero3"):
        check_same_training(tmp_path / layout, whole)


def test_a_run_goes_on_to_the_same_bits(text, tmp_path):
    options = ("--steps", "6", "--save-every", "3", "--layout", "zero2", "--policy", "adagc")
    assert train(2, text, tmp_path, *options).returncode == 0
    undisturbed = numbers(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-0000006")  # as if it had been killed before
    done = train(2, text, tmp_path, *options, "--resume")
    assert done.returncode == 0, done.stderr
    assert "going on after step 3" in done.stdout
    assert numbers(tmp_path) == undisturbed


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_deepspeeds_launcher(text, whole, tmp_path, monkeypatch):
    monkeypatch.setitem(test_train.ENVIRONMENT, "DS_ACCELERATOR", "cpu")
    bin_folder = Path(sys.executable).parent
    monkeypatch.setitem(test_train.ENVIRONMENT, "PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    words = command(0, text, tmp_path, "--steps", "6", "--save-every", "0", "--layout", "zero2")
    launcher = [sys.executable, str(bin_folder / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    done = run([*launcher, *words[1:]])
    assert done.returncode == 0, done.stderr
    check_same_training(tmp_path, whole)


def test_a_checkpoint_of_another_layout_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(LAUNCH))
    zero, ranks = importlib.import_module("zero"), importlib.import_module("ranks")
    with pytest.raises(ranks.UserError, match="is of a run without ZeRO: use its --layout, or another --out"):
        zero.Zero(None, None).load(tmp_path)
