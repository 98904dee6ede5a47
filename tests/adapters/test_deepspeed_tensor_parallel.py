"""DeepSpeed engines with tensor-parallel layers (an `mpu`): each element counts once."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import distclip
from distclip.adapters.deepspeed import attach
from tests.support import engine_policies, engines
from tests.support.engine_policies import Case
from tests.support.engines import config, engine, norm_of
from tests.support.ranks import Ranks, same_bits_everywhere

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)

HIDDEN = 10
TENSOR, DATA = ((0, 1), (2, 3)), ((0, 2), (1, 3))


@functools.cache
def group_of(pairs: tuple[tuple[int, int], ...]) -> Any:
    groups = {pair: dist.new_group(pair) for pair in pairs}
    return next(group for pair, group in groups.items() if dist.get_rank() in pair)


class Mpu:
    """Ranks 0 1 | 2 3 split tensors; 0 2 | 1 3 have other data.

    Libraries name the methods for tensor parallelism differently: `name` is one such name.
    """

    def __init__(self, name: str) -> None:
        tensor, data = group_of(TENSOR), group_of(DATA)
        for kind, group in ((name, tensor), ("model_parallel", tensor), ("data_parallel", data)):
            setattr(self, f"get_{kind}_group", functools.partial(_itself, group))
            setattr(self, f"get_{kind}_rank", functools.partial(dist.get_rank, group))
            setattr(self, f"get_{kind}_world_size", functools.partial(dist.get_world_size, group))


def _itself(group: Any) -> Any:
    return group


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

    def __init__(self, says_dim: bool) -> None:
        super().__init__()
        rank = dist.get_rank(group_of(TENSOR))
        for name, dim in SPLIT_DIMS.items():
            layer, attribute = name.split(".")
            whole = self.get_parameter(name).detach()
            part: Any = nn.Parameter(whole.chunk(2, dim)[rank].clone())
            if says_dim:
                part.tensor_model_parallel, part.partition_dim, part.partition_stride = True, dim, 1
            else:
                part.model_parallel = True
            setattr(self.get_submodule(layer), attribute, part)

    def forward(self, x: Tensor) -> Tensor:
        group = group_of(TENSOR)
        hidden = self.up(Sum.apply(self.norm(x), group, False)).tanh()
        return Sum.apply(F.linear(hidden, self.down.weight), group, True) + self.down.bias


SPLIT_DIMS = {"up.weight": 0, "up.bias": 0, "down.weight": 1}


def joined(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, from the parts of two tensor-parallel ranks."""
    dist.all_gather_object(found := [{}, {}], mine, group=group_of(TENSOR))
    return {
        name: torch.cat([part[name] for part in found], SPLIT_DIMS[name])
        if name in SPLIT_DIMS
        else tensor
        for name, tensor in mine.items()
    }


def gradients_of_one_process(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    whole = Whole().double()
    whole.load_state_dict(weights)
    for data_rank in range(2):
        inputs, targets = (t.double() for t in engines.batch(0, data_rank))
        (engines.loss_of(whole, inputs, targets, torch.float64) / 2).backward()
    return {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}


def halves(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [{"params": params[::2]}, {"params": params[1::2]}]


def one_step(made: Any, dtype: str, case: Case) -> None:
    handle = attach(made, case.policy)
    weights = engines.masters(made)
    inputs, targets = engines.batch(0, dist.get_rank(group_of(DATA)))
    made.backward(engines.loss_of(made, inputs, targets, engines.DTYPES[dtype]))
    grads = joined(engines.gradients(made))
    with engines.collectives() as counts:
        made.step()
    assert counts == [1]
    whole_weights = joined(weights)
    expected = case.expected(grads, whole_weights)
    engine_policies.check(joined(engines.updates(made, weights)), expected)
    norm, p = handle.report.total_norm, case.policy.norm_type
    assert norm.item() == pytest.approx(norm_of(grads, p), rel=2e-7)
    whole_norm = norm_of(gradients_of_one_process(whole_weights), p)
    assert norm.item() == pytest.approx(whole_norm, rel=1e-6 if dtype == "fp32" else 1e-2)
    assert same_bits_everywhere(norm)
    handle.detach()


def tensor_parallel(stage: int, dtype: str, name: str, says_dim: bool) -> None:
    with engine(config(stage, dtype), Split(says_dim), groups=halves, mpu=Mpu(name)) as made:
        with pytest.raises(distclip.LayoutError, match=r"cannot clip the units of"):
            attach(made, engine_policies.AGC.policy)
        for case in engine_policies.WITHOUT_UNITS:
            one_step(made, dtype, case)


@pytest.mark.parametrize(
    ("stage", "dtype", "name", "says_dim"),
    [
        (0, "fp32", "model_parallel", False),
        (0, "bf16", "tensor_model_parallel", True),
        (1, "fp32", "slice_parallel", False),
        (2, "fp32", "tensor_model_parallel", True),
        (3, "fp32", "tensor_model_parallel", True),
    ],
)
def test_tensor_parallel_layers(
    four_engine_ranks: Ranks, stage: int, dtype: str, name: str, says_dim: bool
) -> None:
    four_engine_ranks.run(tensor_parallel, stage, dtype, name, says_dim)
