"""The command line: each mistake is one line that says what to do."""

from __future__ import annotations

import pytest

import distclip
from launch.options import read_options
from launch.ranks import UserError


@pytest.mark.parametrize(
    ("words", "num_ranks", "said"),
    [
        (["--policy", "nope"], 1, "--policy nope: there are clip-norm, tensor-norm"),
        (["--policy.max-norm", "-1"], 1, "max_norm"),
        (["--layuot", "tp"], 1, "Unrecognized options: --layuot, tp"),
        (["--model", "rnn"], 1, "invalid choice 'rnn' for argument '--model'"),
        (["--steps", "0"], 1, "--steps 0: at least 1"),
        (["--width", "30"], 1, "--width 30: a gpt of 4 heads needs a multiple of 8"),
        (["--width", "0"], 1, "--width 0 --depth 3: both at least 1"),
        (["--layout", "hsdp"], 2, "--layout hsdp needs 4 ranks or more and there are 2"),
        (["--layout", "fsdp2+tp"], 3, "--layout fsdp2+tp needs 4 ranks or more and there are 3"),
        (["--layout", "hsdp"], 5, "--layout hsdp pairs the ranks up and there are 5"),
        (["--layout", "tp"], 3, "and there are 3 ranks: use 4 or fewer"),
        (["--batch", "9"], 2, "--batch 9 cannot be shared out evenly over 2 data ranks"),
        (["--corrupt", "2"], 1, "--corrupt 2.0: a share, 0 to 1"),
        (["--policy", "agc", "--clip", "1"], 1, "--clip 1.0 with --policy agc: cannot take"),
    ],
)
def test_wrong_options_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, words: list[str], num_ranks: int, said: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
    with pytest.raises(UserError) as caught:
        read_options(words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_limit_beside_the_policy_s_own() -> None:
    found = read_options(["--policy", "skip-spike", "--clip", "0.5"]).policy
    assert found == distclip.SkipSpike() & distclip.ClipNorm(0.5)


def test_a_policy_brings_its_own_options() -> None:
    words = ["--policy", "clip-norm", "--policy.max-norm", "0.5"]
    assert read_options(words).policy == distclip.ClipNorm(0.5)
    words = [
        "--policy=none",
        "--steps",
        "3",
        "--local_rank=0",
    ]  # the last from DeepSpeed's launcher
    assert read_options(words).policy == distclip.ClipNorm(float("inf"))
