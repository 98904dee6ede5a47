"""torchtitan's own Trainer on CPUs: what it takes, and a model small enough.

torchtitan picks the device when it is imported, and on a machine without an accelerator it picks
CUDA. This module has to be imported before any other part of torchtitan. What is replaced, and why:

- the device: `torch.cpu`, with the figures of memory that its metrics ask for;
- the kernel of FlexAttention, which has no backward on CPUs: torch's own attention, same mask;
- the sum in FSDP's reduce-scatter, which torchtitan asks of NCCL with a factor of 1;
- the call of torch's pipeline schedule, which 0.3.0 makes as torch does after 2.13;
- new meshes for each trainer: those of one layout share them. gloo keeps a busy thread for each
  process group, and torch's caches confuse equal meshes.

The Trainer, its steps, models, meshes, optimizers and checkpoints are its own.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torchtitan.tools import utils


class CpuDevice:
    """`torch.cpu`, and what torchtitan's memory monitor asks of a device."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any) -> str:
        return "A100"  # it warns of names that it does not know

    def get_device_properties(self, device: Any) -> Any:
        return SimpleNamespace(total_memory=2**30)

    def memory_stats(self, device: Any) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self) -> None: ...

    def empty_cache(self) -> None: ...


utils.device_type, utils.device_module = "cpu", CpuDevice()  # before the imports below

from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.models.common import attention  # noqa: E402
from torchtitan.models.deepseek_v3 import config_registry as deepseek_v3  # noqa: E402
from torchtitan.models.llama3 import config_registry as llama3  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

from distclip.adapters.torchtitan import install  # noqa: E402, F401


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, scale: Any, enable_gqa: bool, **_: Any
) -> tuple[Tensor, None]:
    mask = create_mask(block_mask.mask_mod, q.shape[0], None, q.shape[2], k.shape[2], device="cpu")
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
    ), None


_dims: dict[tuple[Any, ...], ParallelDims] = {}


def dims_of(parallelism: Any, world_size: int) -> ParallelDims:
    made = new_dims(parallelism, world_size)
    key = tuple(getattr(made, f.name) for f in fields(made) if not f.name.startswith("_"))
    return _dims.setdefault(key, made)


new_dims = ParallelDims.from_config
ParallelDims.from_config = staticmethod(dims_of)  # type: ignore[method-assign]
attention._compiled_create_block_mask = create_block_mask
attention.FlexAttention._compiled_flex_attn = staticmethod(dense_attention)


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, *, tokenizer_path: str | None = None) -> None:
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        raise NotImplementedError

    def decode(self, *args: Any, **kwargs: Any) -> str:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        raise NotImplementedError


class RandomTokens(BaseDataLoader):
    """The same tokens for every rank of the same batch index, and for every layout of a batch."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        vocab_size: int = 64

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        seq_len: int,
        local_batch_size: int,
        **_: Any,
    ) -> None:
        self._config, self._next = config, 0
        self._ranks, self._rank = dp_world_size, dp_rank
        self._shape = (local_batch_size, seq_len + 1)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        batch, length = self._shape
        while True:
            first = (self._next * self._ranks + self._rank) * batch
            self._next += 1
            rows = [self._row(first + index, length) for index in range(batch)]
            tokens = torch.stack(rows)
            positions = torch.arange(length - 1).expand(batch, -1).contiguous()
            yield {"input": tokens[:, :-1], "positions": positions}, tokens[:, 1:].contiguous()

    def _row(self, index: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(self._config.vocab_size, (length,), generator=generator)

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._next = state_dict["next"]


class MicrobatchSchedule:
    """`step` of a pipeline schedule as torchtitan 0.3.0 calls it, on the schedule of torch 2.13."""

    def __init__(self, schedule: Any) -> None:
        self._schedule = schedule

    def step(self, *, arg_mbs: Any, kwarg_mbs: Any, target_mbs: Any, **kwargs: Any) -> None:
        stages = getattr(self._schedule, "_stages", None) or [self._schedule._stage]
        for stage in stages:
            stage.has_backward = True
            stage.clear_runtime_states()
        self._schedule._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, **kwargs)


def sum_without_factor(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    return model


def config(model: str = "llama3", *, layers: int = 1, **parallelism: Any) -> Any:
    """torchtitan's debug model, with fewer layers and without what is for accelerators alone.

    With spmd_types, the default, torch 2.13 cannot shard over several ranks.
    """
    made: Any = (
        deepseek_v3.deepseek_v3_debugmodel() if model == "moe" else llama3.llama3_debugmodel()
    )
    spec = made.model_spec
    parallelize, pipeline = spec.parallelize_fn, spec.pipelining_fn

    def parallelize_fn(*args: Any, **kwargs: Any) -> torch.nn.Module:
        return sum_without_factor(parallelize(*args, **kwargs))

    def pipelining_fn(*args: Any, **kwargs: Any) -> Any:
        schedule, *others = pipeline(*args, **kwargs)
        return MicrobatchSchedule(schedule), *others

    spec.model.layers = spec.model.layers[:layers]
    made.model_spec = replace(spec, parallelize_fn=parallelize_fn, pipelining_fn=pipelining_fn)
    made.tokenizer, made.dataloader = NoTokenizer.Config(), RandomTokens.Config()
    # FlexAttention's masks are split over context-parallel ranks in blocks of 128 rows.
    context = parallelism.get("context_parallel_degree", 1)
    made.training.seq_len, made.training.local_batch_size = (8, 2) if context == 1 else (256, 2)
    made.training.steps = 3
    made.training.disable_cuda_graphs = True
    made.training.mixed_precision_param = "float32"
    made.debug.seed = 7
    made.validator.enable = False
    made.activation_checkpoint = None
    made.parallelism.spmd_backend = "partial_dtensor"
    made.parallelism.pipeline_parallel_schedule = "1F1B"
    for name, value in parallelism.items():
        setattr(made.parallelism, name, value)
    return made


@contextlib.contextmanager
def trainer(made: Any, folder: Path | None = None) -> Iterator[Trainer]:
    """A trainer, and afterwards the process as it was: torchtitan turns off garbage collection."""
    logging.getLogger().setLevel(logging.ERROR)
    if folder is not None:
        made.dump_folder = str(folder)
    trained = None
    try:
        yield (trained := made.build())
    finally:
        if trained is not None:
            trained.close()
        gc.enable()


class Logged:
    """The norms that a trainer logs."""

    def __init__(self, trained: Trainer) -> None:
        self.norms: list[float] = []
        trained.metrics_processor.log = self._log  # type: ignore[method-assign]

    def _log(self, step: int, loss: float, largest: float, norm: float, **_: Any) -> None:
        self.norms.append(norm)


def run_steps(trained: Trainer, count: int = 1) -> list[float]:
    """Runs the trainer's own steps, and returns the norms that it logged."""
    logged = Logged(trained)
    batches = trained.batch_generator(trained.dataloader)
    for _ in range(count):
        trained.step += 1
        trained.train_step(batches)
    return logged.norms
