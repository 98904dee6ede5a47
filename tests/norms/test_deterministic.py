"""A step calls no operator whose order of additions varies on CUDA."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import distclip
from distclip import (
    AGC,
    AdaGC,
    AutoClip,
    ClipBlockRMS,
    ClipNorm,
    Clipper,
    ClipTensorNorm,
    ClipValue,
    Policy,
    ZClip,
)
from tests.support.layouts import LAYOUTS, lay_out, random_wholes
from tests.support.ranks import Ranks

POLICIES: list[Policy] = [
    *[ClipNorm(0.5, p) for p in (1.0, 2.0, 8.0, math.inf)],
    *[ClipTensorNorm(0.1, p) for p in (2.0, 8.0, math.inf)],
    *[AGC(0.01, norm_type=p) for p in (2.0, 8.0, math.inf)],
    AGC(0.01, unit_dim=-1),
    ClipBlockRMS(0.1),
    ClipValue(0.1),
    ZClip(),
    AutoClip(),
    AdaGC(),
]
# What torch.use_deterministic_algorithms documents, of operators without a backward.
VARIES = {
    *("index_add", "index_copy", "index_reduce", "scatter_add", "scatter_reduce", "put"),
    *("bincount", "histc", "median"),
}


class Deterministic(TorchDispatchMode):
    """Fails on an operator that torch documents as nondeterministic on CUDA, and counts all."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.overloadpacket.__name__.strip("_")
        self.called.append(name)
        tensors = [each for each in args if isinstance(each, Tensor)]
        if torch.cuda.is_available() and all(each.is_cpu for each in tensors):
            return func(*args, **(kwargs or {}))  # on the host, which makes the kernels' tables
        assert name not in VARIES, f"{func} has no fixed order on CUDA"
        if name in ("cumsum", "cumprod"):
            assert not args[0].is_floating_point(), f"{func} has no fixed order on CUDA"
        if name == "index_put":
            assert not any(args[3:4]), f"{func} accumulates in no fixed order on CUDA"
        if name in ("index_put", "scatter"):  # of two writes to one element, either may be last
            for index in args[1] if name == "index_put" else args[2:3]:
                assert len(index.unique()) == index.numel(), func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Linear(5, 6), nn.Linear(6, 5))
    for param in layers.parameters():
        param.grad = torch.randn_like(param)
    return layers


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("lacks", [False, True])
def test_every_policy(policy: Policy, lacks: bool) -> None:
    layers = model()
    if lacks:  # a gradient in the middle
        layers[1].weight.grad = None
    clipper = Clipper(layers, policy)
    with Deterministic() as mode:
        for _ in range(3):
            clipper.clip_()
    assert mode.called


CALLS: list[Callable[[nn.Module], object]] = [
    lambda layers: distclip.clip_grad_norm_(layers, 0.1),
    lambda layers: distclip.clip_grad_norm_(layers, 0.1, math.inf),
    lambda layers: distclip.clip_grad_value_(layers, 0.1),
    lambda layers: Clipper(layers, AGC(0.01), on_nonfinite="zero").clip_(scale=0.5),
]


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("call", CALLS)
def test_functions(call: Callable[[nn.Module], object]) -> None:
    with Deterministic():
        call(model())


def sharded_steps(layouts: list[str], device: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for layout in layouts:
            wholes = random_wholes(LAYOUTS[layout], seed=1)
            for policy in POLICIES:
                clipper = Clipper(lay_out(wholes, LAYOUTS[layout], device), policy)
                with Deterministic():
                    clipper.clip_()
    finally:
        torch.use_deterministic_algorithms(False)


def test_sharded_units(four_ranks: Ranks) -> None:
    four_ranks.run(sharded_steps, sorted(LAYOUTS)[:2], four_ranks.device)
