"""Gradients that torch's own clipping gets wrong: the rows of `python -m benchmarks.correctness`.

A new row is one `Case` in `CASES`. `answers.py` asks the libraries and judges what they answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from tests.support.ranks import mesh

NUM_RANKS = 4


@dataclass(frozen=True)
class Setup:
    """Gradients ready to be clipped; `whole` are float64 copies of them before any sharding."""

    passed: nn.Module | list[nn.Parameter]  # what the clipping function is called with
    params: list[nn.Parameter]
    whole: list[Tensor]


@dataclass(frozen=True)
class Answer:
    """What the call returned on one rank (`norm` or `error`), and the gradients after it."""

    norm: float | None
    largest: float  # the gradient element furthest from zero, with its sign; NaN wins
    before: float  # the same before the call
    num_nan: int = 0
    numel: int = 0
    error: str = ""
    message: str = ""


def show_norm(answer: Answer) -> str:
    return "-" if answer.norm is None else f"{answer.norm:.6g}"


def show_gradient(answer: Answer) -> str:
    return f"{show_norm(answer)}, g {answer.largest:.3g}"


def show_nan(answer: Answer) -> str:
    return f"{show_norm(answer)}, {answer.num_nan} of {answer.numel} NaN"


@dataclass(frozen=True)
class Case:
    """How the gradients come about, how they are clipped, and what a right answer looks like."""

    key: str
    title: str
    build: Callable[[], Setup]
    ranks: int = 1
    max_norm: float = 1.0
    norm_type: float = 2.0
    show: Callable[[Answer], str] = show_norm
    refusal: tuple[str, str] | None = None  # the error that is right, and a word of its message
    must_refuse: bool = False  # no number would be right
    grad_tolerance: float = 1e-5
    torch_hangs: bool = False


# Gradients of one process -------------------------------------------------------------------------


def plain(grads: Sequence[Tensor], times: int = 1) -> Setup:
    """Parameters with the given gradients, each parameter passed `times` times."""
    params = [nn.Parameter(torch.empty_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return Setup(params * times, params, [g.to(torch.float64, copy=True) for g in grads])


def filled(value: float, numel: int, dtype: torch.dtype = torch.float32) -> Setup:
    return plain([torch.full((numel,), value, dtype=dtype)])


def listed(*values: float, times: int = 1) -> Setup:
    return plain([torch.tensor(values)], times)


def normal(*shape: int, num: int = 1, dtype: torch.dtype = torch.float32) -> Setup:
    generator = torch.Generator().manual_seed(0)
    return plain([torch.randn(shape, generator=generator).to(dtype) for _ in range(num)])


# Gradients of several ranks -----------------------------------------------------------------------


class Branches(nn.Module):
    """Two layers side by side on whole numbers: float32 gradients and their averages are exact."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, width), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.arange(1, self.first.out_features + 1, dtype=x.dtype)
        return ((self.first(x) + 2 * self.second(x)) * weights).sum()


Wrap = Callable[[Branches], nn.Module]


def trained(wrap: Wrap, width: int = 8, pass_module: bool = False) -> Setup:
    """One backward of a wrapped model; the whole gradients come from an unwrapped float64 copy."""
    torch.manual_seed(0)
    model = Branches(width)
    reference = deepcopy(model).double()
    wrapped = wrap(model)
    inputs = torch.arange(1.0, 33.0).reshape(2, 16)
    wrapped(inputs).backward()
    reference(inputs.double()).backward()
    params = list(wrapped.parameters())
    whole = [p.grad.clone() for p in reference.parameters() if p.grad is not None]
    return Setup(wrapped if pass_module else params, params, whole)


def shard_on_two_meshes(model: Branches) -> nn.Module:
    root = mesh((2, NUM_RANKS // 2), ("dp", "ep"))
    fully_shard(model.first, mesh=root["dp"])
    fully_shard(model.second, mesh=root["ep"])
    return model


def shard_one_layer(model: Branches) -> nn.Module:
    fully_shard(model.first, mesh=mesh((NUM_RANKS,), ("dp",)))
    return model


def shard_all(model: Branches) -> nn.Module:
    return fully_shard(model, mesh=mesh((NUM_RANKS,), ("dp",)))


def fsdp1(model: Branches, use_orig_params: bool = False) -> nn.Module:
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, device_id=cpu, use_orig_params=use_orig_params)


def poisoned(rank: int) -> Setup:
    """A NaN in the part of the first weight that `rank` holds, and nowhere else."""
    setup = trained(shard_all)
    setup.whole[0][rank * len(setup.whole[0]) // NUM_RANKS, 0] = math.nan
    if dist.get_rank() == rank:
        setup.params[0].grad.to_local()[0, 0] = math.nan
    return setup


# --------------------------------------------------------------------------------------------------

ON_RANKS = (
    Case("two_meshes", "FSDP2 parameters on two meshes", partial(trained, shard_on_two_meshes)),
    Case("beside_plain", "a DTensor beside a plain tensor", partial(trained, shard_one_layer)),
    Case("nan_lost", "a NaN on one rank, p=inf", partial(poisoned, NUM_RANKS - 1),
         norm_type=math.inf),
    Case("fsdp1_list", "FSDP1, list of flat parameters", partial(trained, fsdp1),
         refusal=("LayoutError", "module")),
    Case("fsdp1_orig_list", "FSDP1, list of original parameters",
         partial(trained, partial(fsdp1, use_orig_params=True)), refusal=("LayoutError", "module")),
    Case("fsdp1_module", "FSDP1, module (torch: its method)",
         partial(trained, fsdp1, pass_module=True)),
    Case("empty_shard", "an empty FSDP2 shard, p=inf", partial(trained, shard_all, width=2),
         norm_type=math.inf, torch_hangs=True),
)  # fmt: skip
ALONE = (
    Case("fp16_overflow", "4,096 fp16 values of 3,000",
         partial(filled, 3000.0, 4096, torch.float16), show=show_gradient, grad_tolerance=1e-3),
    Case("tiny", "2,000 values of 1e-30", partial(filled, 1e-30, 2000)),
    Case("huge", "2,000 values of 1e30", partial(filled, 1e30, 2000), show=show_gradient),
    Case("high_power", "1,000 values of 1e-6, p=8", partial(filled, 1e-6, 1000), norm_type=8.0),
    Case("bf16", "24 bf16 layers of 256 x 256",
         partial(normal, 256, 256, num=24, dtype=torch.bfloat16), grad_tolerance=8e-3),
    Case("large_tensor", "38M float32 values on the CPU", partial(normal, 38_000_000)),
    Case("infinite_limit", "max_norm=inf, g = [inf, 3, 4]", partial(listed, math.inf, 3.0, 4.0),
         max_norm=math.inf, show=show_nan),
    Case("twice", "a parameter given twice, g = [3, 4]", partial(listed, 3.0, 4.0, times=2),
         show=show_gradient),
    Case("negative_limit", "max_norm=-1, g = [3, 4]", partial(listed, 3.0, 4.0), max_norm=-1.0,
         show=show_gradient, refusal=("ValueError", "max_norm"), must_refuse=True),
)  # fmt: skip
CASES = {case.key: case for case in (*(replace(c, ranks=NUM_RANKS) for c in ON_RANKS), *ALONE)}
