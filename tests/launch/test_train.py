"""launch/train.py as a user runs it: torchrun, real process groups, a small folder of text."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import distclip

LAUNCH = Path(__file__).parents[2] / "launch"
TORCHRUN = (sys.executable, str(LAUNCH / "run.py"), "--standalone")
TINY = ("--width", "32", "--depth", "1", "--context", "32", "--batch", "8", "--warmup", "2", "--device", "cpu")
SECONDS = 240  # machines are shared: usually a tenth of it
# On the library that these tests import, the built wheel or the checkout, and with one thread a rank.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path(distclip.__file__).parents[1]}:{LAUNCH}"}
# Most of a tiny run is the import of torch on every rank: the layouts of as many ranks share one torchrun.
ONE_AFTER_ANOTHER = """
import sys, torch, train, ranks
from options import MIN_RANKS, read_options
words = [word for word in sys.argv[1:] if word not in MIN_RANKS]
out = words[words.index("--out") + 1]
device = torch.device("cpu")
ranks.join(device, timeout=60.0)
for layout in [word for word in sys.argv[1:] if word in MIN_RANKS]:
    train.train(read_options([*words, "--layout", layout, "--out", f"{out}/{layout}"]), device)
torch.distributed.destroy_process_group()
"""
pytestmark = pytest.mark.timeout(300)
ROW = {"step", "loss", "total_norm", "limit", "coefficient", "clipped", "finite", "lr", "seconds", "tokens"}
# Ranks add in another order, and AdamW makes large steps of small differences.
SAME_TRAINING = 1e-5


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for module in (json, subprocess):
        source = Path(module.__file__)
        (folder / source.name).write_text(source.read_text())
    return folder


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The output folder of one rank without torchrun: the training that every layout has to repeat."""
    out = tmp_path_factory.mktemp("whole")
    done = train(0, text, out, "--steps", "6", "--save-every", "3")
    assert done.returncode == 0, done.stderr
    assert "clipped" in done.stdout
    return out


def command(num_ranks, text, out, *options):
    start = (*TORCHRUN, f"--nproc-per-node={num_ranks}") if num_ranks else (sys.executable,)
    return [*start, str(LAUNCH / "train.py"), "--data", str(text), "--out", str(out), *TINY, *options]


def train(num_ranks, text, out, *options):
    """One run; 0 ranks is plain python."""
    return run(command(num_ranks, text, out, *options))


def run(words):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=ENVIRONMENT, **pipes) as parent:
        try:
            out, err = parent.communicate(timeout=SECONDS)
        finally:
            kill(parent)
    return subprocess.CompletedProcess(words, parent.returncode, out, err)


def rows_of(out):
    """The lines of metrics.jsonl, each read as strict JSON."""
    refuse = pytest.fail
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda word: refuse(f"{word} is not JSON")) for line in lines]


def numbers(out):
    """All that a step computed; only how long it took may differ between two equal runs."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows_of(out)]


def test_one_rank_writes_every_step_and_a_picture(whole):
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert all(set(row) == ROW and row["tokens"] == 8 * 32 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert any(row["clipped"] and row["coefficient"] == pytest.approx(1 / row["total_norm"]) for row in rows)
    assert (whole / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-0000003", "step-0000006"]


@pytest.mark.parametrize(("num_ranks", "layouts"), [(2, ["ddp", "fsdp1", "fsdp2", "tp"]), (4, ["hsdp", "fsdp2+tp"])])
def test_every_layout_trains_as_one_rank_does(text, whole, tmp_path, num_ranks, layouts):
    several = tmp_path / "several.py"
    several.write_text(ONE_AFTER_ANOTHER)
    words = command(num_ranks, text, tmp_path, "--steps", "6", "--save-every", "0")
    words[words.index(str(LAUNCH / "train.py"))] = str(several)
    done = run([*words, *layouts])
    assert done.returncode == 0, done.stderr
    for layout in layouts:
        for row, expected in zip(rows_of(tmp_path / layout), rows_of(whole), strict=True):
            for name in ("loss", "total_norm", "coefficient"):
                assert row[name] == pytest.approx(expected[name], rel=SAME_TRAINING), (layout, row["step"], name)
            assert row["clipped"] == expected["clipped"]


def test_a_killed_run_goes_on_to_the_same_bits(text, tmp_path):
    options = ("--steps", "40", "--save-every", "4", "--layout", "fsdp2")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert train(2, text, undisturbed, *options).returncode == 0
    kill_after(10, command(2, text, killed, *options), killed / "metrics.jsonl")
    known = len((killed / "metrics.jsonl").read_text().splitlines())
    assert 10 <= known < 40
    # What a kill in the middle of a checkpoint leaves must not be chosen, whatever its name says.
    (killed / "checkpoints" / "unfinished-36").mkdir(exist_ok=True)
    (killed / "checkpoints" / "step-0000036").mkdir()
    done = train(2, text, killed, *options, "--resume")
    assert done.returncode == 0, done.stderr
    assert "going on after step" in done.stdout
    assert numbers(killed) == numbers(undisturbed)


def kill_after(num_lines, words, path):
    """Starts a run and kills torchrun and its ranks with SIGKILL as soon as the file has that many lines."""
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as parent:
        deadline = time.monotonic() + SECONDS
        try:
            while not path.exists() or path.read_text().count("\n") < num_lines:
                assert time.monotonic() < deadline
                assert parent.poll() is None
                time.sleep(0.02)
        finally:
            kill(parent)


def kill(parent):
    """Ends a run that still goes on, and the ranks that torchrun would leave behind."""
    if parent.poll() is None:
        for pid in [*children_of(parent.pid), parent.pid]:
            os.kill(pid, signal.SIGKILL)


def children_of(parent):
    for path in Path("/proc").glob("[0-9]*/stat"):
        # The name in brackets may hold blanks; the parent is the second field behind it.
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended while we looked
        if int(fields[1]) == parent:
            yield int(path.parent.name)


def test_under_torchrun_a_mistake_is_one_line_from_one_rank(tmp_path):
    done = train(2, tmp_path / "nowhere", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr == f"train.py: error: --data {tmp_path / 'nowhere'}: no such folder\n"


def test_a_checkpoint_of_another_model_is_refused(text, whole):
    done = train(0, text, whole, "--steps", "9", "--resume", "--width", "64")
    assert done.returncode == 2
    assert "step-0000006 is of a run with width 32 and this one has width 64" in done.stderr
    assert done.stderr.count("\n") == 1
    assert len(rows_of(whole)) == 6


@pytest.mark.parametrize(
    ("words", "num_ranks", "said"),
    [
        (["--policy", "nope"], 1, "--policy nope: there are clip-norm, tensor-norm"),
        (["--policy.max-norm", "-1"], 1, "max_norm"),
        (["--layuot", "tp"], 1, "Unrecognized options: --layuot, tp"),
        (["--model", "rnn"], 1, "invalid choice 'rnn' for argument '--model'"),
        (["--steps", "0"], 1, "--steps 0: at least 1"),
        (["--width", "30"], 1, "--width 30: a gpt of 4 heads needs a multiple of 8"),
        (["--layout", "hsdp"], 2, "--layout hsdp needs 4 ranks or more and there are 2"),
        (["--layout", "fsdp2+tp"], 3, "--layout fsdp2+tp needs 4 ranks or more and there are 3"),
        (["--batch", "9"], 2, "--batch 9 cannot be shared out evenly over 2 data ranks"),
    ],
)
def test_wrong_options_say_what_to_do(launch, monkeypatch, words, num_ranks, said):
    monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
    with pytest.raises(launch.ranks.UserError) as caught:
        launch.read_options(words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_policy_brings_its_own_options(launch):
    assert launch.read_options(["--policy", "clip-norm", "--policy.max-norm", "0.5"]).policy == distclip.ClipNorm(0.5)
    assert launch.read_options(["--policy=none", "--steps", "3"]).policy == distclip.ClipNorm(float("inf"))


def test_folders_without_text_are_refused(launch, tmp_path):
    (tmp_path / "picture").write_bytes(b"\0" * 1000)
    with pytest.raises(launch.ranks.UserError, match="0 bytes of text in it, and a sequence takes 34"):
        launch.data.read_corpus(tmp_path, context=32)


@pytest.fixture
def launch(monkeypatch):
    """launch/options.py, which imports its neighbours as a script does, with `ranks` and `data` beside it."""
    monkeypatch.syspath_prepend(str(LAUNCH))
    options = importlib.import_module("options")
    options.data, options.ranks = importlib.import_module("data"), importlib.import_module("ranks")
    return options
