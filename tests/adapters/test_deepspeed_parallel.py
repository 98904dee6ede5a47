"""DeepSpeed engines with tensor-parallel layers, pipeline stages and experts: each element counts once.

DeepSpeed's own norm averages those of experts, so that it is no oracle here.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import distclip
from tests.adapters.test_deepspeed import APPLIED, attach, counted
from tests.support import engines, reference
from tests.support.engines import Applied, config, engine, norm_of
from tests.support.ranks import Ranks, same_bits_everywhere

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")

WIDTH, HIDDEN = 6, 10


@pytest.fixture(scope="module")
def four_engines() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


def check(update: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert update
    for name, found in update.items():
        torch.testing.assert_close(found, expected[name], **APPLIED, msg=lambda text, name=name: f"{name}: {text}")


def by_name(grads: dict[str, Tensor], clipped: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(grads, clipped, strict=True))


def everywhere(mine: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    dist.all_gather_object(found := [{}] * dist.get_world_size(), mine)
    return found


POLICIES = {
    "norm": (distclip.ClipNorm(0.5), lambda g, w: reference.clip_norm(g, 0.5)),
    "norm p=1": (distclip.ClipNorm(0.5, 1.0), lambda g, w: reference.clip_norm(g, 0.5, 1.0)),
    "norm p=inf": (distclip.ClipNorm(0.05, math.inf), lambda g, w: reference.clip_norm(g, 0.05, math.inf)),
    "tensor norm": (distclip.ClipTensorNorm(0.1), lambda g, w: reference.clip_tensor_norm(g, 0.1)),
    "block rms": (distclip.ClipBlockRMS(0.02), lambda g, w: reference.clip_block_rms(g, 0.02)),
    "value": (distclip.ClipValue(0.01), lambda g, w: reference.clip_value(g, 0.01)),
    "agc": (distclip.AGC(0.02), lambda g, w: reference.agc(w, g, 0.02)),
}


# --- tensor parallelism by an mpu ------------------------------------------------------------------------------------


class Mpu:
    """Ranks 0 1 | 2 3 split tensors; 0 2 | 1 3 have other data. `names` is the word for tensor parallelism."""

    def __init__(self, names: str = "model_parallel") -> None:
        rank = dist.get_rank()
        pairs = {pair: dist.new_group(pair) for pair in ((0, 1), (2, 3), (0, 2), (1, 3))}
        tensor, data = [pairs[pair] for pair in ((0, 1), (2, 3), (0, 2), (1, 3)) if rank in pair]
        for word, group in ((names, tensor), ("model_parallel", tensor), ("data_parallel", data)):
            setattr(self, f"get_{word}_group", lambda group=group: group)
            setattr(self, f"get_{word}_rank", lambda group=group: dist.get_rank(group))
            setattr(self, f"get_{word}_world_size", lambda group=group: dist.get_world_size(group))


class Sum(torch.autograd.Function):
    """The sum over a group, of activations or of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, forwards: bool) -> Tensor:
        ctx.group, ctx.backwards = group, not forwards
        if forwards:
            dist.all_reduce(x := x.clone(), group=group)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.backwards:
            dist.all_reduce(grad := grad.clone(), group=ctx.group)
        return grad, None, None


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(7)
        self.up, self.down = nn.Linear(7, HIDDEN), nn.Linear(HIDDEN, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).tanh())


class Split(Whole):
    """`up` along its outputs, `down` along its inputs."""

    def __init__(self, mpu: Mpu, says_dim: bool) -> None:
        super().__init__()
        self.group = mpu.get_model_parallel_group()
        rank = dist.get_rank(self.group)
        for layer, name, dim in ((self.up, "weight", 0), (self.up, "bias", 0), (self.down, "weight", 1)):
            part: Any = nn.Parameter(getattr(layer, name).detach().chunk(2, dim)[rank].clone())
            if says_dim:
                part.tensor_model_parallel, part.partition_dim, part.partition_stride = True, dim, 1
            else:
                part.model_parallel = True
            setattr(layer, name, part)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(Sum.apply(self.norm(x), self.group, False)).tanh()
        return Sum.apply(F.linear(hidden, self.down.weight), self.group, True) + self.down.bias


DIMS = {"up.weight": 0, "up.bias": 0, "down.weight": 1}


def joined(mine: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    """Whole tensors, from the parts of two tensor-parallel ranks."""
    dist.all_gather_object(found := [{}, {}], mine, group=group)
    return {n: torch.cat([f[n] for f in found], DIMS[n]) if n in DIMS else t for n, t in mine.items()}


def data_rank_gradients() -> dict[str, Tensor]:
    whole = Whole().double()
    for data_rank in range(2):
        inputs, targets = (t.double() for t in engines.batch(0, data_rank))
        (engines.loss_of(whole.double(), inputs, targets, torch.float64) / 2).backward()
    return {name: p.grad for name, p in whole.named_parameters()}


def halves(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [{"params": params[::2]}, {"params": params[1::2]}]


def tensor_parallel(stage: int, dtype: str, names: str, says_dim: bool) -> None:
    mpu = Mpu(names)
    for name, (policy, oracle) in POLICIES.items():
        model = Split(mpu, says_dim)
        with engine(config(stage, dtype), model, groups=halves, mpu=mpu) as made:
            if name == "agc":
                with pytest.raises(distclip.LayoutError, match=r"cannot clip the units of"):
                    attach(made, policy)
                continue
            handle = attach(made, policy)
            counts = counted(handle)
            inputs, targets = engines.batch(0, dist.get_rank(mpu.get_data_parallel_group()))
            made.backward(engines.loss_of(made, inputs, targets, engines.DTYPES[dtype]))
            grads = joined(engines.gradients(made), mpu.get_model_parallel_group())
            weights = engines.masters(made)
            made.step()
            update = {n: (weights[n] - after) / engines.LR for n, after in engines.masters(made).items()}
            whole_update = joined(update, mpu.get_model_parallel_group())
            whole_weights = joined(weights, mpu.get_model_parallel_group())
            expected = by_name(grads, oracle(list(grads.values()), list(whole_weights.values())))
            assert norm_of(expected) < 0.99 * norm_of(grads)
            check(whole_update, expected)
            norm = handle.report.total_norm
            assert norm.item() == pytest.approx(norm_of(grads, policy.norm_type), rel=2e-7)
            assert norm.item() == pytest.approx(
                norm_of(data_rank_gradients(), policy.norm_type), rel=1e-6 if dtype == "fp32" else 1e-2
            )
            assert same_bits_everywhere(norm)
            assert counts == [1]


@pytest.mark.parametrize(
    ("stage", "dtype", "names", "says_dim"),
    [
        (0, "fp32", "model_parallel", False),
        (0, "bf16", "tensor_model_parallel", True),
        (1, "fp32", "slice_parallel", False),
        (2, "fp32", "tensor_model_parallel", True),
        (3, "fp32", "tensor_model_parallel", True),
    ],
)
def test_tensor_parallel_layers(four_engines: Ranks, stage: int, dtype: str, names: str, says_dim: bool) -> None:
    four_engines.run(tensor_parallel, stage, dtype, names, says_dim)


# --- pipeline stages -------------------------------------------------------------------------------------------------


class Embed(nn.Linear):
    """Tied: the first layer multiplies by the weight, the last by its transpose."""

    def __init__(self) -> None:
        super().__init__(WIDTH, HIDDEN, bias=False)


def unembed(module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, module.weight.t())


def fill(model: nn.Module) -> None:
    """Weights that depend on the name and nothing else."""
    for name, param in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        param.data = torch.randn(param.shape, generator=generator) / 3


class Line(nn.Module):
    """What the pipeline computes, in one process, under the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.tied_modules = nn.ModuleDict({"embed": Embed()})
        for index in range(1, 4):
            self.add_module(str(index), nn.Linear(HIDDEN, HIDDEN))
        fill(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied_modules["embed"](x)
        for index in range(1, 4):
            x = self.get_submodule(str(index))(x)
        return unembed(self.tied_modules["embed"], x)


MICRO = 2


def line_batch(data_rank: int, micro: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * data_rank + micro)
    return torch.randn(4, WIDTH, generator=generator), torch.randn(4, WIDTH, generator=generator)


def pipeline(stages: int) -> Any:
    engines.load()
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    layers = [
        TiedLayerSpec("embed", Embed),
        *(LayerSpec(nn.Linear, HIDDEN, HIDDEN) for _ in range(3)),
        TiedLayerSpec("embed", Embed, forward_fn=unembed),
    ]
    model = PipelineModule(layers=layers, num_stages=stages, loss_fn=F.mse_loss, partition_method="uniform")
    fill(model)
    return model


def line_gradients() -> dict[str, Tensor]:
    model = Line().double()
    for data_rank in range(2):
        for micro in range(MICRO):
            inputs, targets = (t.double() for t in line_batch(data_rank, micro))
            (F.mse_loss(model(inputs), targets) / (2 * MICRO)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def piped(stage: int, dtype: str) -> None:
    grads = line_gradients()
    weights = {name: p.detach().double() for name, p in Line().named_parameters()}
    states: list[str] = []
    more = {"data_types": {"grad_accum_dtype": "fp32"}} if dtype == "bf16" else {}
    for policy, oracle in (*POLICIES.values(), (distclip.AdaGC(max_norm=0.5), POLICIES["norm"][1])):
        with (
            warnings.catch_warnings(),
            engine(config(stage, dtype, MICRO, **more), pipeline(2), groups=lambda m: m.parameters()) as made,
        ):
            warnings.simplefilter("ignore")
            handle = attach(made, policy)
            counts = counted(handle)
            before = engines.masters(made)
            data_rank = made.grid.get_data_parallel_rank()
            batches = iter([tuple(t.to(engines.DTYPES[dtype]) for t in line_batch(data_rank, m)) for m in range(MICRO)])
            made.train_batch(data_iter=batches)
            update = {n: (before[n] - after) / engines.LR for n, after in engines.masters(made).items()}
            norm = handle.report.total_norm
            assert same_bits_everywhere(norm)
            assert counts == [1]
            assert norm.item() == pytest.approx(norm_of(grads, policy.norm_type), rel=1e-6 if dtype == "fp32" else 2e-2)
            expected = by_name(grads, oracle(list(grads.values()), list(weights.values())))
            assert norm_of(expected) < 0.99 * norm_of(grads)
            if dtype == "fp32":
                check(update, expected)
            copies = [found["tied_modules.embed.weight"] for found in everywhere(update)]
            assert all(torch.equal(copy, copies[0]) for copy in copies)  # tied weights stay alike
            states.append(str(handle.state_dict()))
    dist.all_gather_object(everyone := [None] * 4, states)
    assert everyone == [states] * 4  # all ranks remember the tensors of all stages
    assert all(f"'{name}'" in states[-1] for name in grads)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (1, "bf16")])
def test_pipeline_stages_with_tied_weights(four_engines: Ranks, stage: int, dtype: str) -> None:
    four_engines.run(piped, stage, dtype)


# --- experts ---------------------------------------------------------------------------------------------------------

NUM_EXPERTS = 4


class Mixture(nn.Module):
    """Two layers of experts, spread over groups of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        engines.load()
        from deepspeed.moe.layer import MoE

        torch.manual_seed(0)
        self.inner = nn.Linear(7, WIDTH)
        self.moes = nn.ModuleList(
            MoE(WIDTH, nn.Linear(WIDTH, WIDTH), NUM_EXPERTS, ep_size=size, use_rts=False) for size in (2, 4)
        )
        self.outer = nn.Linear(WIDTH, 5)
        self.draw()

    def draw(self) -> None:
        """Every expert with weights of its own, alike on the ranks that hold it."""
        for index, moe in enumerate(self.moes):
            line = dist.get_rank() % moe.ep_size
            for local, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
                generator = torch.Generator().manual_seed(100 * index + line * moe.num_local_experts + local)
                for param in expert.parameters():
                    param.data = torch.randn(param.shape, generator=generator) / 3

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for moe in self.moes:
            x = x + moe(x)[0]
        return self.outer(x)


def expert_groups(model: nn.Module) -> Any:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    return split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})


def under_global_names(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of all ranks: the experts of each under the numbers that they would have on one rank, each tensor once."""
    found: dict[str, Tensor] = {}
    for rank, tensors in enumerate(everywhere(mine)):
        for name, tensor in tensors.items():
            before, word, after = name.partition("deepspeed_experts.")
            if word:
                local, _, rest = after.partition(".")
                size = (2, 4)[int(before.split(".")[1])]
                name = f"{before}{word}{rank % size * (NUM_EXPERTS // size) + int(local)}.{rest}"  # noqa: PLW2901
            found.setdefault(name, tensor)
    return found


def experts(stage: int, dtype: str) -> None:
    states: list[str] = []
    for name, (policy, oracle) in {**POLICIES, "adagc": (distclip.AdaGC(max_norm=0.5), POLICIES["norm"][1])}.items():
        with (
            warnings.catch_warnings(),
            engine(config(stage, dtype), Mixture(), groups=expert_groups) as made,
        ):
            warnings.simplefilter("ignore")
            handle = attach(made, policy)
            counts = counted(handle)
            step = Applied(made, 0, dtype)
            grads, weights, update = map(under_global_names, (step.grads, step.weights, step.update))
            assert len(grads) == 4 + 2 + 2 * 2 * NUM_EXPERTS
            expected = by_name(grads, oracle(list(grads.values()), list(weights.values())))
            assert norm_of(expected) < 0.99 * norm_of(grads)
            norm = handle.report.total_norm
            assert norm.item() == pytest.approx(norm_of(grads, policy.norm_type), rel=2e-7), name
            assert same_bits_everywhere(norm)
            check(update, expected)
            assert counts == [1]
            states.append(str(handle.state_dict()))
    dist.all_gather_object(everyone := [None] * 4, states)
    assert everyone == [states] * 4
    assert all(f"'{name}'" in states[-1] for name in grads)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "fp32"), (2, "bf16")])
def test_experts_on_groups_of_two_sizes(four_engines: Ranks, stage: int, dtype: str) -> None:
    four_engines.run(experts, stage, dtype)
