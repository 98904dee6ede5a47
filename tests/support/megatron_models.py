"""Megatron's own GPT and optimizers on CPUs, with gradients and weights that an oracle knows."""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ETP = "expert_tensor_parallel_size"
# Only Transformer Engine's attention is split over context-parallel ranks.
NOT_OF_MODELS = ("context_parallel_size", "num_distributed_optimizer_instances")


class CudaIsCpu(TorchFunctionMode):
    """Megatron has no switch for the CPU: what it makes on "cuda" lies on the CPU.

    Its optimizers compare `tensor.type()` with names of CUDA's types.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


@contextmanager
def on_cpu() -> Iterator[None]:
    here = mock.patch.object(torch.cuda, "current_device", return_value=torch.device("cpu"))
    stream = mock.patch.object(torch.cuda, "Stream")
    with warnings.catch_warnings(), CudaIsCpu(), here, stream:
        warnings.simplefilter("ignore")  # Transformer Engine and Apex are not installed
        yield


class Case(NamedTuple):
    """How Megatron runs a model.

    Attributes:
        sizes: of `initialize_model_parallel`.
        dtype: of the model.
        distributed: by the distributed optimizer.
        num_experts: None for a dense model.
        tied: the embedding is the output layer too.
        config: for OptimizerConfig.
        ddp: for DistributedDataParallelConfig.
        num_chunks: of the model on each pipeline stage.
    """

    sizes: dict[str, int]
    dtype: torch.dtype = torch.float32
    distributed: bool = False
    num_experts: int | None = None
    tied: bool = True
    config: dict[str, Any] = {}  # noqa: RUF012
    ddp: dict[str, Any] = {}  # noqa: RUF012
    num_chunks: int = 1


def sizes(tensor: int = 1, pipeline: int = 1, **more: int) -> dict[str, int]:
    return {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, **more}


class Whole(NamedTuple):
    """A tensor of the whole model, in float64."""

    weight: Tensor
    grad: Tensor


@dataclass
class Run:
    """A model of Megatron and its optimizer, on this rank.

    Attributes:
        wholes: all tensors of the whole model by a key that the ranks agree on.
        stepped_with: the gradients that the inner optimizers have stepped with, by what they step.
    """

    state: Any
    chunks: list[Any]
    optimizer: Any
    wholes: dict[str, Whole] = field(default_factory=dict)
    stepped_with: dict[Tensor, Tensor] = field(default_factory=dict)

    def fill(self, seed: int = 0, scale: float = 1.0) -> None:
        """Other gradients, as Megatron leaves them after backward: the same on ranks with copies.

        Collective: an all-gather.
        """
        self.optimizer.zero_grad()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        mine: dict[str, Whole] = {}
        for key, param in self.named_parameters():
            if not param.requires_grad:
                continue
            whole = _whole(seed, key, shape=self.whole_shape(param)) * scale
            param.main_grad.copy_(self.local_part(whole, param))
            weight = _whole_weight(key, self.whole_shape(param)).to(param.dtype)
            mine[key] = Whole(weight.double(), whole.double())
        everyone: list[dict[str, Whole]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        self.wholes = {key: whole for one in everyone for key, whole in one.items()}

    @property
    def grads(self) -> list[Tensor]:
        return [one.grad for one in self.wholes.values()]

    @property
    def weights(self) -> list[Tensor]:
        return [one.weight for one in self.wholes.values()]

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """With names in the whole model, however it is sharded."""
        stages = self.state.get_pipeline_model_parallel_world_size()
        for index, chunk in enumerate(self.chunks):
            first_layer = self.state.get_pipeline_model_parallel_rank() + index * stages
            if stages == 1:
                first_layer *= 2
            for name, param in chunk.named_parameters():
                yield self._key(name, param, first_layer), param

    def _key(self, name: str, param: Any, first_layer: int) -> str:
        if getattr(param, "shared_embedding", False):
            return "embedding.word_embeddings.weight"
        name = re.sub(r"^(module\.)+", "", name)
        name = _with_number_after("layers.", first_layer, name)
        if self.is_expert(param):
            ranks = self.state.get_expert_model_parallel_world_size()
            first = self.state.get_expert_model_parallel_rank() * (4 // ranks)
            name = _with_number_after("local_experts.", first, name)
        return name

    def is_expert(self, param: Any) -> bool:
        return not getattr(param, "allreduce", True)

    def num_parts(self, param: Any) -> int:
        if not getattr(param, "tensor_model_parallel", False):
            return 1
        if self.is_expert(param):
            return self.state.get_expert_tensor_parallel_world_size()
        return self.state.get_tensor_model_parallel_world_size()

    def whole_shape(self, param: Any) -> tuple[int, ...]:
        shape = list(param.shape)
        if (parts := self.num_parts(param)) > 1:
            shape[param.partition_dim] *= parts
        return tuple(shape)

    def local_part(self, whole: Tensor, param: Any) -> Tensor:
        if (parts := self.num_parts(param)) == 1:
            return whole
        rank = (
            self.state.get_expert_tensor_parallel_rank()
            if self.is_expert(param)
            else self.state.get_tensor_model_parallel_rank()
        )
        return whole.chunk(parts, param.partition_dim)[rank]

    def members(self) -> list[Any]:
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])

    def record(self) -> None:
        """From now on, what inner optimizers step with is in `stepped_with`."""
        for member in self.members():
            if not member.is_stub_optimizer:
                member.optimizer.register_step_pre_hook(self._before_inner)

    def _before_inner(self, inner: Any, *_: Any) -> None:
        for group in inner.param_groups:
            for param in group["params"]:
                grad = getattr(param, "decoupled_grad", param.grad)
                self.stepped_with[param] = grad.clone()

    def check_steps(self, clipped: list[Tensor]) -> None:
        """That the inner optimizers have stepped with `clipped`, of all tensors of `wholes`."""
        expected = self.expected_steps(dict(zip(self.wholes, clipped, strict=True)))
        assert expected.keys() == self.stepped_with.keys()
        for stepped, grad in self.stepped_with.items():
            # A coefficient in float32, one product, and one rounding of an unscaled gradient.
            torch.testing.assert_close(grad.double(), expected[stepped], rtol=2.5e-7, atol=1e-12)
        self.stepped_with.clear()

    def expected_steps(self, clipped: dict[str, Tensor]) -> dict[Tensor, Tensor]:
        """Of whole tensors, what each inner optimizer should step with."""
        names = {param: name for name, param in self.named_parameters()}
        expected: dict[Tensor, Tensor] = {}
        for member in self.members():
            for param, stepped in [] if member.is_stub_optimizer else _pairs(member):
                part = self.local_part(clipped[names[param]], param)
                if hasattr(member, "gbuf_ranges"):
                    range_ = member._get_model_param_range_map(param)["param"]
                    part = part.reshape(-1)[range_.start : range_.end]
                expected[stepped] = part
        return expected


def _pairs(member: Any) -> Iterator[tuple[Any, Tensor]]:
    """The parameters of the model, and what is stepped for them."""
    if hasattr(member, "gbuf_ranges"):
        aware = member.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        mains = member.shard_float16_groups if aware else member.shard_fp32_from_float16_groups
        groups = [
            *zip(member.model_float16_groups, mains, strict=True),
            *zip(member.model_fp32_groups, member.shard_fp32_groups, strict=True),
        ]
    elif hasattr(member, "float16_groups"):
        groups = [
            *zip(member.float16_groups, member.fp32_from_float16_groups, strict=True),
            *zip(member.fp32_from_fp32_groups, member.fp32_from_fp32_groups, strict=True),
        ]
    else:
        groups = [(group["params"], group["params"]) for group in member.param_groups]
    for params, stepped in groups:
        yield from zip(params, stepped, strict=True)


@contextmanager
def running(case: Case, prepare: Callable[[Any], None] | None = None) -> Iterator[Run]:
    """The model on this rank, Megatron's parallel state, and an optimizer that has not stepped.

    Args:
        prepare: called with the model before it is wrapped.
    """
    with on_cpu():
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        parallel_state.initialize_model_parallel(**case.sizes, create_gloo_process_groups=False)
        try:
            ddp_config = DistributedDataParallelConfig(
                use_distributed_optimizer=case.distributed, grad_reduce_in_fp32=True, **case.ddp
            )
            chunks = []
            for index in range(case.num_chunks):
                chunk = _model(case, parallel_state, index)
                if prepare is not None:
                    prepare(chunk)
                chunks.append(DistributedDataParallel(chunk.config, ddp_config, chunk))
            run = Run(parallel_state, chunks, None)
            with torch.no_grad():
                for key, param in run.named_parameters():
                    param.copy_(run.local_part(_whole_weight(key, run.whole_shape(param)), param))
            run.optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    **{"optimizer": "adam", "lr": 0.01} | case.config,
                    use_distributed_optimizer=case.distributed,
                    bf16=case.dtype is torch.bfloat16,
                    fp16=case.dtype is torch.float16,
                    params_dtype=case.dtype,
                ),
                chunks,
                use_gloo_process_groups=False,
            )
            yield run
        finally:
            parallel_state.destroy_model_parallel()


def _model(case: Case, state: Any, index: int) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    tensor = case.sizes["tensor_model_parallel_size"]
    config = TransformerConfig(
        num_layers=2 * case.num_chunks,
        hidden_size=8,
        ffn_hidden_size=12,
        num_attention_heads=4,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=case.num_experts,
        bf16=case.dtype is torch.bfloat16,
        fp16=case.dtype is torch.float16,
        params_dtype=case.dtype,
        # Bias in experts is an error where tensor-parallel ranks split them.
        add_bias_linear=case.num_experts is None or case.sizes.get(ETP) == 1 or tensor == 1,
        **{name: size for name, size in case.sizes.items() if name not in NOT_OF_MODELS},
    )
    model: nn.Module = GPTModel(
        config,
        get_gpt_layer_local_spec(num_experts=case.num_experts),
        vocab_size=12,
        max_sequence_length=8,
        share_embeddings_and_output_weights=case.tied,
        pre_process=state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=index),
        post_process=state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=index),
        vp_stage=index if case.num_chunks > 1 else None,
    )
    return model if case.dtype is torch.float32 else Float16Module(config, model)


def _with_number_after(word: str, first: int, name: str) -> str:
    return re.sub(rf"(?<={re.escape(word)})\d+", lambda found: str(int(found[0]) + first), name)


def _whole_weight(key: str, shape: tuple[int, ...]) -> Tensor:
    return _whole("weight", key, shape=shape)


def _whole(*key: object, shape: tuple[int, ...]) -> Tensor:
    """The same on every rank that asks with the same key."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
    return torch.randn(shape, generator=generator)
