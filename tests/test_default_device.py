"""`torch.set_default_device` moves the models that people make, and nothing that distclip makes for
itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import distclip
from tests.support.ranks import Ranks, mesh
from tests.support.wrapped import local, loss_of, make_model, tokens_of_all_ranks

POLICIES = [
    *(distclip.ClipNorm(1.0, p) for p in (1.0, 2.0, 3.0, 8.0, math.inf)),
    distclip.ClipTensorNorm(1.0),
    distclip.ClipBlockRMS(0.1),
    distclip.ClipValue(0.1),
    distclip.AGC(),
    distclip.AutoClip(),
    distclip.ZClip(),
    distclip.AdaGC(),
]


def parameters() -> list[nn.Parameter]:
    """Long enough for every way of the kernels, in 16 bits as well."""
    made = []
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        for shape in ((300, 301), (70, 2), (5_000,)):
            generator = torch.Generator().manual_seed(seed)
            param = nn.Parameter(torch.ones(shape, dtype=dtype))
            param.grad = torch.randn(shape, generator=generator).to(dtype)
            made.append(param)
    return made


def elsewhere(meta: bool) -> AbstractContextManager[Any]:
    """Tensors without values, which nothing could compute with."""
    return torch.device("meta") if meta else nullcontext()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("rule", ["propagate", "skip", "zero"])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_clipper(policy: distclip.Policy, rule: str, overlap: bool) -> None:
    results = []
    for meta in (False, True):
        params = parameters()
        with elsewhere(meta):
            clipper = distclip.Clipper(params, policy, on_nonfinite=rule, overlap=overlap)
            reports = [clipper.clip_().to_dict() for _ in range(2)]
            saved = clipper.state_dict()
            clipper.load_state_dict(saved)
            skipped = int(clipper.skipped)
        results.append((reports, skipped, str(saved), [p.grad for p in params]))
    assert results[0][:3] == results[1][:3]
    torch.testing.assert_close(results[0][3], results[1][3], rtol=0, atol=0)


@pytest.mark.parametrize("p", [1.0, 2.0, 8.0, math.inf])
def test_gradients_without_elements(p: float) -> None:
    param = nn.Parameter(torch.zeros(0))
    param.grad = torch.zeros(0)
    with elsewhere(True):
        assert (
            distclip.Clipper([param], distclip.ClipNorm(1.0, p)).clip_().to_dict()["total_norm"]
            == 0
        )


def test_the_functions() -> None:
    results: list[list[Tensor]] = []
    for meta in (False, True):
        params = parameters()
        grads = [p.grad for p in params]
        with elsewhere(meta):
            found = [
                distclip.get_total_norm(grads, math.inf),
                distclip.clip_grad_norm_(params, 50.0),
                distclip.functional.clip_by_global_norm(grads, 1.0)[1],
                distclip.functional.clip_by_norm(grads[0], 1.0, axes=[0]),
            ]
            distclip.clip_grads_with_norm_(params, 1.0, found[1])
            distclip.clip_grad_value_(params, 1e-3)
        results.append([*found, *grads])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def fsdp2(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=mesh((4,), ("fsdp",)))


def fsdp1(model: nn.Module) -> nn.Module:
    """Has no mesh: its ranks are the world."""
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def a_sharded_model(wrap: Callable[[nn.Module], nn.Module], policy: distclip.Policy) -> None:
    tokens = tokens_of_all_ranks().chunk(4)[dist.get_rank()]
    results = []
    for meta in (False, True):
        model = wrap(make_model())
        loss_of(model, tokens).backward()
        with elsewhere(meta):
            clipper = distclip.Clipper(model, policy)
            clipper.plan.verify()
            norm = clipper.clip_().total_norm
        results.append([norm, *(local(p.grad) for p in model.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_on_ranks(four_ranks: Ranks) -> None:
    for policy in (distclip.ClipNorm(1e-3), distclip.AGC(), distclip.AdaGC()):
        four_ranks.run(a_sharded_model, fsdp2, policy)
        four_ranks.run(a_sharded_model, fsdp1, policy)
