"""Thousands of steps on four ranks: the bits that they hold, and how much."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import SGD, AdamW, Optimizer

import distclip
from tests.faults.held import counts_of
from tests.support import reference
from tests.support.ranks import mesh
from tests.support.wrapped import local

AXES = ("replicate", "shard")
NAN_EVERY = 37  # steps; the loss of one rank in turn
PERIOD = 20  # steps after which lists come again, more of them than plans are kept
LISTS = "lists that change"
VARIANTS = ("step", "attach", LISTS)


class Sample(NamedTuple):
    """What one rank holds after some steps.

    Attributes:
        weights: the bits of its parameters and of the optimizer's state; equal on ranks with the
            same `shard`.
        states: the bits of what the policy remembers; equal everywhere.
        error: the relative difference of the last norm to float64 on whole gradients.
        counts: what must not grow.
    """

    step: int
    shard: int
    weights: str
    states: str
    error: float
    num_skipped: int
    counts: dict[str, float]


_runs: dict[str, Any] = {}


def begin(variant: str) -> None:
    torch.manual_seed(0)
    _runs[variant] = _Lists() if variant == LISTS else _Trained(variant)


def go_on(variant: str, num_steps: int) -> Sample:
    run = _runs[variant]
    for _ in range(num_steps):
        run.step()
    weights = [*run.tensors()]
    return Sample(
        run.num_steps,
        mesh((2, 2), AXES).get_coordinate()[1] if dist.is_initialized() else 0,
        _bits(weights),
        _bits(_leaves(run.clipper.state_dict())),
        run.error,
        int(run.clipper.skipped),
        counts_of(run.clipper),
    )


def end(variant: str) -> None:
    run = _runs.pop(variant)
    if run.attached is not None:
        run.attached.remove()


class _Trained:
    """HSDP over four ranks."""

    def __init__(self, variant: str) -> None:
        self.model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4), nn.Linear(4, 1))
        for layer in [*self.model, self.model]:
            fully_shard(layer, mesh=mesh((2, 2), AXES))
        self.num_steps, self.error, self.attached = 0, 0.0, None
        policy: Any = distclip.AutoClip(60.0, history=50) & distclip.ZClip(max_norm=None)
        if variant == "attach":
            policy = distclip.AdaGC(warmup_steps=10)
        options: Any = {"on_nonfinite": "skip", "tensor_norms": 7}
        self.clipper = distclip.Clipper(self.model, policy, **options)
        self.optimizer: Optimizer = AdamW(self.model.parameters(), lr=1e-3, fused=True)
        if variant == "attach":
            self.optimizer = SGD(self.model.parameters(), lr=1e-2, momentum=0.9, foreach=True)
            self.attached = self.clipper.attach(self.optimizer)

    def step(self) -> None:
        self.num_steps += 1
        rank, size = dist.get_rank(), dist.get_world_size()
        drawn = torch.Generator().manual_seed(self.num_steps * size + rank)
        x = torch.randn(8, 6, generator=drawn)
        loss = (self.model(x) - x.sum(1, keepdim=True).sin()).square().mean()
        broken = self.num_steps % NAN_EVERY == 0
        if broken and self.num_steps // NAN_EVERY % size == rank:
            loss = loss * math.nan
        loss.backward()
        right = None
        if self.num_steps % 100 == 1:
            right = reference.total_norm([_whole(p.grad) for p in self.model.parameters()])
        if self.attached is None:
            report = self.clipper.step(self.optimizer)
        else:
            self.optimizer.step()
            report = self.attached.report
        self.optimizer.zero_grad()
        assert report is not None
        assert bool(report.finite) != broken
        if right is not None:
            self.error = max(self.error, abs(report.total_norm.item() / right.item() - 1))
        if broken and self.num_steps % 2:
            assert report.nonfinite_parameters()

    def tensors(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        yield from _leaves(self.optimizer.state_dict())


class _Lists:
    """The functions on lists that change, and a Clipper of a model whose parameters do."""

    def __init__(self) -> None:
        self.model = nn.ParameterDict({f"p{i}": _laid_out(2 + i) for i in range(6)})
        self.model["head"] = _laid_out(9)
        self.clipper = distclip.Clipper(
            self.model, distclip.AdaGC(warmup_steps=10), on_nonfinite="skip"
        )
        self.num_steps, self.error, self.attached = 0, 0.0, None
        self.optimizer = SGD(self.model.parameters(), lr=1e-2)

    def step(self) -> None:
        self.num_steps += 1
        turn = self.num_steps % PERIOD
        drawn = random.Random(turn)  # the same on every rank
        if turn % 10 == 0:
            self.model["head"] = _laid_out(5 + turn)
            self.optimizer = SGD(self.model.parameters(), lr=1e-2)
        params = [*self.model.values()]
        for param in params[1:]:
            param.requires_grad_(drawn.random() < 0.7)
        self._make_gradients(params)
        broken = self.num_steps % NAN_EVERY == 0
        if broken:
            local(params[0].grad).fill_(math.nan)
        assert bool(self.clipper.step(self.optimizer).finite) != broken
        params[0].grad = torch.ones_like(params[0])
        some = drawn.sample(params, 4) if turn % 3 else params
        if self.num_steps % 100 == 1:
            grads = [_whole(param.grad) for param in some if param.grad is not None]
            found = distclip.get_total_norm([p.grad for p in some if p.grad is not None])
            right = reference.total_norm(grads)
            self.error = max(self.error, abs(found.item() / right.item() - 1))
        distclip.clip_grad_norm_(some, drawn.uniform(0.1, 2.0), drawn.choice([1.0, 2.0]))

    def _make_gradients(self, params: Sequence[Tensor]) -> None:
        drawn = torch.Generator().manual_seed(self.num_steps)
        for param in params:
            values = torch.randn(param.shape, generator=drawn)
            param.grad = _placed(values) if param.requires_grad else None

    def tensors(self) -> Iterator[Tensor]:
        yield from self.model.values()


def _laid_out(rows: int) -> nn.Parameter:
    return nn.Parameter(_placed(torch.linspace(-1, 1, rows * 3).reshape(rows, 3)))


def _placed(whole: Tensor) -> Tensor:
    """As under HSDP; in one process a plain tensor."""
    if not dist.is_initialized():
        return whole
    placements = [Replicate(), Shard(0)]
    return distribute_tensor(whole, mesh((2, 2), AXES), placements, src_data_rank=None)


def _whole(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def _leaves(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for key in sorted(state, key=str):
            yield from _leaves(state[key])


def _bits(tensors: Sequence[Tensor] | Iterator[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(local(tensor).detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def differences(ranks: Sequence[Sample]) -> list[str]:
    """Of one moment, on all ranks."""
    found = [f"step {ranks[0].step}: policies' states differ"] * (
        len({r.states for r in ranks}) > 1
    )
    for a, b in itertools.combinations(ranks, 2):
        if a.shard == b.shard and a.weights != b.weights:
            found.append(f"step {a.step}: copies of shard {a.shard} differ")
    return found
