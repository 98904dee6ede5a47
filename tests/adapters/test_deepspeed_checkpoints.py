"""What policies remember on DeepSpeed engines, saved and loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import distclip
from distclip.adapters.deepspeed import attach
from tests.support import engines
from tests.support.engines import config, engine
from tests.support.ranks import Ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)

POLICIES = {
    "adagc": distclip.AdaGC(ratio=0.9, max_norm=2.0, beta=0.9, warmup_steps=2),
    "zclip": distclip.ZClip(z_thresh=0.5, warmup_steps=2, max_norm=8.0),
}


def resumed(stage: int, dtype: str, name: str, folder: str, attach_first: bool) -> None:
    settings = config(stage, dtype, gradient_clipping=0.01)
    with engine(settings, make_optimizer=engines.adamw) as made:
        handle = engines.attach_quietly(made, POLICIES[name])
        for step in range(3):
            engines.train_step(made, step, dtype)
        made.save_checkpoint(folder, client_state={"clipper": handle.state_dict()})
        for step in range(3, 6):
            engines.train_step(made, step, dtype)
        expected, end = engines.masters(made), str(handle.state_dict())
    with engine(settings, engines.make_model(seed=1), make_optimizer=engines.adamw) as made:
        handle = engines.attach_quietly(made, POLICIES[name]) if attach_first else None
        _, client_state = made.load_checkpoint(folder)
        handle = engines.attach_quietly(made, POLICIES[name]) if handle is None else handle
        handle.load_state_dict(client_state["clipper"])
        for step in range(3, 6):
            engines.train_step(made, step, dtype)
            # load_checkpoint had restored it
            assert getattr(made.optimizer, "clip_grad", 0.0) == 0.0
        found = engines.masters(made)
        assert all(torch.equal(found[n], weights) for n, weights in expected.items())
        assert str(handle.state_dict()) == end


@pytest.mark.parametrize(
    ("stage", "dtype", "name", "attach_first"),
    [
        (0, "fp32", "adagc", True),
        (0, "bf16", "zclip", True),
        (1, "fp32", "adagc", True),
        (2, "bf16", "adagc", False),
        (2, "fp32", "zclip", True),
        (3, "fp32", "adagc", True),
    ],
)
def test_a_resumed_run_goes_on_to_the_same_bits(
    two_engine_ranks: Ranks, tmp_path: Path, stage: int, dtype: str, name: str, attach_first: bool
) -> None:
    two_engine_ranks.run(resumed, stage, dtype, name, str(tmp_path), attach_first)


def moved_between_stages(first: int, second: int) -> None:
    with engine(config(first)) as made:
        handle = attach(made, POLICIES["adagc"])
        for step in range(3):
            engines.train_step(made, step)
        saved = handle.state_dict()
    with engine(config(second)) as made:
        handle = attach(made, POLICIES["adagc"])
        handle.load_state_dict(saved)
        assert str(handle.state_dict()) == str(saved)
        with pytest.raises(ValueError, match="cannot load the state of a Clipper"):
            handle.load_state_dict({"version": 1, "groups": {"all": {"ZClip": {}}}})


def test_a_state_fits_another_stage(two_engine_ranks: Ranks) -> None:
    two_engine_ranks.run(moved_between_stages, 0, 3)
    two_engine_ranks.run(moved_between_stages, 3, 2)
