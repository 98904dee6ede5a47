"""A tiny model that is trained in Lightning on ranks, and the same in one process in float64."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import reference

LR = 0.2
LIMIT = 0.5
BATCH = 3  # samples of one rank in one step
WORLD = 2


def make_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2)]
    return nn.Sequential(*layers).to(dtype)


def samples(num: int) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, generator=made), 3 * torch.randn(2, generator=made) + index)
        for index in range(num)
    ]


def loss_of(net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return (net(inputs) - targets).square().mean()


def whole_batches(steps: int, world: int = WORLD, accumulate: int = 1) -> list[list[Any]]:
    """What all ranks see in each step, as the Trainer deals it."""
    size = BATCH * world
    dealt = samples(steps * accumulate * size)
    batches = [dealt[first : first + size] for first in range(0, len(dealt), size)]
    return [batches[first : first + accumulate] for first in range(0, len(batches), accumulate)]


def train_whole(
    steps: int, world: int = WORLD, accumulate: int = 1, limit: float = LIMIT, lr: float = LR
) -> list[float]:
    """The norms before clipping of SGD with `ClipNorm(limit)`, in float64 in one process."""
    net = make_net(torch.float64)
    params, norms = list(net.parameters()), []
    for batches in whole_batches(steps, world, accumulate):
        net.zero_grad()
        for batch in batches:
            inputs, targets = (torch.stack(each).double() for each in zip(*batch, strict=True))
            (loss_of(net, inputs, targets) / accumulate).backward()
        grads = [param.grad for param in params]
        norms.append(reference.total_norm(grads).item())
        with torch.no_grad():
            for param, clipped in zip(params, reference.clip_norm(grads, limit), strict=True):
                param.sub_(lr * clipped)
    return norms


def modules() -> Any:
    """`lightning.pytorch`, and what is made of it: imported on the ranks alone."""
    from tests.support import lightning_modules

    return lightning_modules


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
