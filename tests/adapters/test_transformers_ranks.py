"""`DistClip` on two ranks: the Trainer's layouts against the whole training in float64."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import distclip
from tests.support import trainers
from tests.support.ranks import Ranks
from tests.support.trainers import MAX_NORM, everyone, norms_of, trainer, whole

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers"
)

WRAP = {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 30}
# On CPUs accelerate's FSDP1 cannot send the weights of the first rank to the others.
FSDP1 = {**WRAP, "version": 1, "sync_module_states": False}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp1": {"fsdp": True, "fsdp_config": FSDP1},
    "fsdp1, flat": {"fsdp": True, "fsdp_config": {**FSDP1, "use_orig_params": False}},
    "fsdp2": {"fsdp": True, "fsdp_config": WRAP},
}


def full(param: torch.Tensor) -> torch.Tensor:
    return param.full_tensor() if hasattr(param, "full_tensor") else param


def weights_of(trained: Any, layout: str) -> dict[str, torch.Tensor]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if layout.startswith("fsdp1"):
        with FullyShardedDataParallel.summon_full_params(trained.model_wrapped):
            named = {n: p.detach().clone() for n, p in trained.model.named_parameters()}
    else:
        named = {n: full(p).detach() for n, p in trained.model.named_parameters()}
    return {name.replace("_fsdp_wrapped_module.", ""): p for name, p in named.items()}


def same_as_whole(layouts: dict[str, dict[str, Any]], folder: str) -> None:
    from distclip.adapters.transformers import DistClip

    for layout, options in layouts.items():
        for max_grad_norm in (1.0, 0, None):
            clip, model = DistClip(distclip.ClipNorm(MAX_NORM)), trainers.Net()
            with trainers.quiet():
                made = trainer(
                    folder,
                    [clip],
                    model,
                    num=20,  # five micro-batches a rank: the last step has one
                    gradient_accumulation_steps=2,
                    max_grad_norm=max_grad_norm,
                    **copy.deepcopy(options),
                )
                made.train()
                weights = weights_of(made, layout)
            expected, norms = whole(everyone(model.seen), [2, 2, 1])
            assert min(norms) > MAX_NORM  # it did clip
            assert norms_of(made) == pytest.approx(norms, rel=2e-6), layout
            assert clip.report.total_norm.item() == pytest.approx(norms[-1], rel=2e-6)
            assert made.args.max_grad_norm == max_grad_norm
            for name, param in expected.named_parameters():
                torch.testing.assert_close(
                    weights[name].double(), param.detach(), rtol=1e-6, atol=1e-7
                )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_of_the_trainer(two_engine_ranks: Ranks, tmp_path: Path, layout: str) -> None:
    two_engine_ranks.run(same_as_whole, {layout: LAYOUTS[layout]}, str(tmp_path))
