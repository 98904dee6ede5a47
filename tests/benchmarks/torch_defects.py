"""The rows of `python -m benchmarks.correctness`: gradients whose norm torch's own clipping gets wrong.

A new row is one `Case` in `CASES`. Every case is judged against float64 arithmetic on the whole gradients.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

NUM_RANKS = 4


@dataclass(frozen=True)
class Setup:
    """Gradients ready to be clipped; `whole` are float64 clones of them from before any sharding."""

    handed: nn.Module | list[nn.Parameter]  # what the clipping function is given
    params: list[nn.Parameter]
    whole: list[Tensor]


@dataclass(frozen=True)
class Answer:
    """What one rank was told (`norm` or `error`) and what it then found in its gradients."""

    norm: float | None
    largest: float  # the gradient element furthest from zero, with its sign; NaN wins
    before: float  # the same before the call
    num_nan: int = 0
    numel: int = 0
    error: str = ""
    message: str = ""


def just_norm(answer: Answer) -> str:
    return "-" if answer.norm is None else f"{answer.norm:.6g}"


def norm_and_gradient(answer: Answer) -> str:
    return f"{just_norm(answer)}, g {answer.largest:.3g}"


def norm_and_nan(answer: Answer) -> str:
    return f"{just_norm(answer)}, {answer.num_nan} of {answer.numel} NaN"


@dataclass(frozen=True)
class Case:
    """One row: how the gradients come about, how they are clipped, and what a right answer looks like."""

    key: str
    title: str
    build: Callable[[], Setup]
    ranks: int = NUM_RANKS
    max_norm: float = 1.0
    norm_type: float = 2.0
    show: Callable[[Answer], str] = just_norm
    refusal: tuple[str, str] | None = None  # the error that is right, and a word of its message
    must_refuse: bool = False  # no number would be right
    grad_tolerance: float = 1e-5
    may_hang: bool = False


# Gradients of one process -------------------------------------------------------------------------


def plain(make_grads: Callable[[], list[Tensor]], times: int = 1) -> Setup:
    """Parameters with the given gradients, each parameter listed `times` times."""
    torch.manual_seed(0)
    params = []
    for grad in make_grads():
        params.append(nn.Parameter(torch.empty_like(grad)))
        params[-1].grad = grad
    return Setup(params * times, params, [p.grad.to(torch.float64, copy=True) for p in params])


def filled(value: float, numel: int, dtype: torch.dtype = torch.float32) -> Callable[[], Setup]:
    return partial(plain, lambda: [torch.full((numel,), value, dtype=dtype)])


def listed(*values: float, times: int = 1) -> Callable[[], Setup]:
    return partial(plain, lambda: [torch.tensor(values)], times)


def normal(*shape: int, tensors: int = 1, dtype: torch.dtype = torch.float32) -> Callable[[], Setup]:
    return partial(plain, lambda: [torch.randn(shape).to(dtype) for _ in range(tensors)])


# Gradients of several ranks -----------------------------------------------------------------------


class Branches(nn.Module):
    """Two layers side by side on whole numbers, so that float32 gradients and their averages are exact."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, width), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.arange(1, self.first.out_features + 1, dtype=x.dtype)
        return ((self.first(x) + 2 * self.second(x)) * weights).sum()


def trained(wrap: Callable[[Branches], nn.Module], width: int = 8, hand_module: bool = False) -> Setup:
    """One backward pass of a wrapped model; the whole gradients come from an unwrapped float64 copy."""
    torch.manual_seed(0)
    model = Branches(width)
    reference = deepcopy(model).double()
    wrapped = wrap(model)
    inputs = torch.arange(1.0, 33.0).reshape(2, 16)
    wrapped(inputs).backward()
    reference(inputs.double()).backward()
    params = list(wrapped.parameters())
    return Setup(wrapped if hand_module else params, params, [p.grad.clone() for p in reference.parameters()])


def every_rank_mesh() -> torch.distributed.DeviceMesh:
    return init_device_mesh("cpu", (NUM_RANKS,), mesh_dim_names=("dp",))


def shard_on_two_meshes(model: Branches) -> nn.Module:
    root = init_device_mesh("cpu", (2, NUM_RANKS // 2), mesh_dim_names=("dp", "ep"))
    fully_shard(model.first, mesh=root["dp"])
    fully_shard(model.second, mesh=root["ep"])
    return model


def shard_one_layer(model: Branches) -> nn.Module:
    fully_shard(model.first, mesh=every_rank_mesh())
    return model


def shard_all(model: Branches) -> nn.Module:
    return fully_shard(model, mesh=every_rank_mesh())


def flat_shard(model: Branches, use_orig_params: bool) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)


def poisoned(rank: int) -> Setup:
    """A NaN in the part of the first weight that `rank` holds, and nowhere else."""
    setup = trained(shard_all)
    setup.whole[0][rank * len(setup.whole[0]) // NUM_RANKS, 0] = math.nan
    if torch.distributed.get_rank() == rank:
        setup.params[0].grad.to_local()[0, 0] = math.nan
    return setup


# Asking a library, and the right answer -----------------------------------------------------------


def torch_clip(handed: nn.Module | list[nn.Parameter], max_norm: float, norm_type: float) -> Tensor:
    """torch as its documentation says to use it: FSDP1 modules have a method of their own."""
    if isinstance(handed, FullyShardedDataParallel):
        return handed.clip_grad_norm_(max_norm, norm_type)
    norm = torch.nn.utils.clip_grad_norm_(handed, max_norm, norm_type)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def distclip_clip(handed: nn.Module | list[nn.Parameter], max_norm: float, norm_type: float) -> Tensor:
    # Not at the top of the file: the column of torch must print while distclip is missing or broken.
    return import_module("distclip").clip_grad_norm_(handed, max_norm, norm_type)


LIBRARIES = {"torch": torch_clip, "distclip": distclip_clip}


def local_values(param: nn.Parameter) -> Tensor:
    grad = torch.empty(0) if param.grad is None else param.grad
    return (grad.to_local() if isinstance(grad, DTensor) else grad).detach().double().flatten()


def largest(values: Tensor) -> float:
    return values[values.abs().argmax()].item() if len(values) else 0.0


def gradient_values(setup: Setup) -> Tensor:
    return torch.cat([local_values(p) for p in setup.params])


def ask(library: str, case: Case, setup: Setup) -> Answer:
    before = largest(gradient_values(setup))
    norm, error, message = None, "", ""
    try:
        norm = LIBRARIES[library](setup.handed, case.max_norm, case.norm_type).item()
    except Exception as raised:  # whatever it is, it is the answer
        error, message = type(raised).__name__, str(raised)
    values = gradient_values(setup)
    return Answer(norm, largest(values), before, int(values.isnan().sum()), len(values), error, message)


def right_answer(case: Case, setup: Setup) -> Answer:
    """The definition in float64: one norm over every element, and torch's coefficient from it."""
    values = torch.cat([grad.flatten() for grad in setup.whole])
    before, p = largest(values), case.norm_type
    if case.must_refuse:
        return Answer(None, before, before, error=case.refusal[0])
    norm = (values.abs().max() if math.isinf(p) else values.abs().pow(p).sum().pow(1 / p)).item()
    # An infinite limit asks for the norm alone: no gradient may change, whatever the norm.
    coefficient = 1.0 if math.isinf(case.max_norm) else min(1.0, case.max_norm / (norm + 1e-6))
    clipped = values * (math.nan if math.isnan(norm) else coefficient)
    return Answer(norm, largest(clipped), before, int(clipped.isnan().sum()), len(clipped))


LIST_REFUSAL = ("LayoutError", "module")
CASES = (
    Case("two_meshes", "FSDP2 parameters on two meshes", partial(trained, shard_on_two_meshes)),
    Case("beside_plain", "a DTensor beside a plain tensor", partial(trained, shard_one_layer)),
    Case("nan_lost", "a NaN on one rank, p=inf", partial(poisoned, NUM_RANKS - 1), norm_type=math.inf),
    Case("fsdp1_list", "FSDP1, list of flat parameters",
         partial(trained, partial(flat_shard, use_orig_params=False)), refusal=LIST_REFUSAL),
    Case("fsdp1_orig_list", "FSDP1, list of original parameters",
         partial(trained, partial(flat_shard, use_orig_params=True)), refusal=LIST_REFUSAL),
    Case("fsdp1_module", "FSDP1, module (torch: its method)",
         partial(trained, partial(flat_shard, use_orig_params=False), hand_module=True)),
    Case("empty_shard", "an empty FSDP2 shard, p=inf", partial(trained, shard_all, width=2),
         norm_type=math.inf, may_hang=True),
    Case("fp16_overflow", "4,096 fp16 values of 3,000", filled(3000.0, 4096, torch.float16), 1,
         show=norm_and_gradient, grad_tolerance=1e-3),
    Case("tiny", "2,000 values of 1e-30", filled(1e-30, 2000), 1),
    Case("huge", "2,000 values of 1e30", filled(1e30, 2000), 1, show=norm_and_gradient),
    Case("high_power", "1,000 values of 1e-6, p=8", filled(1e-6, 1000), 1, norm_type=8.0),
    Case("bf16", "24 bf16 layers of 256 x 256", normal(256, 256, tensors=24, dtype=torch.bfloat16), 1,
         grad_tolerance=8e-3),
    Case("large_tensor", "38M float32 values on the CPU", normal(38_000_000), 1),
    Case("infinite_limit", "max_norm=inf, g = [inf, 3, 4]", listed(math.inf, 3.0, 4.0), 1,
         max_norm=math.inf, show=norm_and_nan),
    Case("twice", "a parameter given twice, g = [3, 4]", listed(3.0, 4.0, times=2), 1,
         show=norm_and_gradient),
    Case("negative_limit", "max_norm=-1, g = [3, 4]", listed(3.0, 4.0), 1, max_norm=-1.0,
         show=norm_and_gradient, refusal=("ValueError", "max_norm"), must_refuse=True),
)  # fmt: skip
