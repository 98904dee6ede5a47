"""`DistClip` with Lightning's DeepSpeedStrategy: it hands the engine to DeepSpeed's adapter."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

import distclip
from tests.support import engines
from tests.support import lightning_runs as runs
from tests.support.lightning_runs import LIMIT, quietly, train_whole
from tests.support.ranks import Ranks

pytestmark = pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("lightning", "deepspeed")),
    reason="needs lightning and deepspeed",
)


def accelerator() -> Any:
    """Lightning wants a CUDAAccelerator for DeepSpeed, and an index of each rank's device."""
    from lightning.pytorch.accelerators import CUDAAccelerator

    class CPUs(CUDAAccelerator):
        def setup_device(self, device: torch.device) -> None: ...

        def setup(self, trainer: Any) -> None: ...

        def teardown(self) -> None: ...

        @staticmethod
        def parse_devices(devices: int) -> int:
            return devices

        @staticmethod
        def get_parallel_devices(devices: int) -> list[torch.device]:
            return [torch.device("cpu", index) for index in range(devices)]

        @staticmethod
        def is_available() -> bool:
            return True

    return CPUs()


def stages() -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"
    )
    engines.load()
    with quietly():
        modules = runs.modules()
        import lightning.pytorch as pl
        from lightning.pytorch.strategies import DeepSpeedStrategy

        def fit(stage: int, clip: Any) -> Any:
            run = modules.Norms(clip)
            config = {
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "train_micro_batch_size_per_gpu": runs.BATCH,
            }
            trainer = pl.Trainer(
                accelerator=accelerator(),
                devices=2,
                strategy=DeepSpeedStrategy(config=config, process_group_backend="gloo"),
                callbacks=[clip, run],
                max_epochs=1,
                logger=False,
                use_distributed_sampler=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
            )
            trainer.fit(modules.Net(), modules.loader("ddp", 3))
            return run

        for stage in (1, 3):
            run = fit(stage, modules.DistClip(distclip.ClipNorm(LIMIT), tensor_norms=True))
            assert len(run.clip.report.tensor_norms()) == len(
                [*runs.make_net(torch.float32).parameters()]
            )
            assert run.norms == pytest.approx(train_whole(3), rel=3e-6)
            assert run.logged == run.norms
            assert run.clip.clippers == []
            assert run.clip.state_dict().keys() == {"optimizers"}
        with pytest.raises(ValueError, match="cannot clip with overlap= under DeepSpeed"):
            fit(2, modules.DistClip(overlap=True))


def test_zero(two_engine_ranks: Ranks) -> None:
    two_engine_ranks.run(stages)


def an_engine_of_fabric() -> None:
    engines.load()
    with quietly():
        from lightning.fabric import Fabric

        from distclip.adapters.lightning import clip_gradients

        with engines.engine(engines.config(2)) as made:
            fabric = Fabric(accelerator="cpu", devices=1)
            with pytest.raises(ValueError, match=r"deepspeed\.attach\(fabric\.strategy\.model"):
                clip_gradients(fabric, made, made.optimizer)


def test_fabric_is_told_to_attach(two_engine_ranks: Ranks) -> None:
    two_engine_ranks.run(an_engine_of_fabric)
