"""SkipSpike by the loss: the mean over the ranks, in the all-reduce of the norms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from distclip import ClipNorm, Clipper, LayoutError, PolicyBase, Scope, SkipSpike, ZClip
from distclip.policies import NormContext
from tests.policies.steps import F64, spiky_norms
from tests.support import reference
from tests.support.ranks import Ranks, device_of, mesh

POLICY = SkipSpike(3.0, 4)


def clipper_of(policy: Any = POLICY, **options: Any) -> tuple[nn.Parameter, Clipper]:
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([0.3, 0.4])
    return param, Clipper([param], policy, **options)


@pytest.mark.parametrize("settings", [(6.0, 128), (2.0, 8), (1.0, 2), (0.5, 7)])
@pytest.mark.parametrize("shift", [0.0, -40.0])
def test_it_accepts_the_losses_that_the_reference_accepts(
    settings: tuple[float, int], shift: float
) -> None:
    """Of norms that are all the same. Losses may lie below 0."""
    losses = [loss + shift for loss in spiky_norms(300, seed=1)]
    param, clipper = clipper_of(SkipSpike(*settings), max_consecutive_skips=1000)
    found = [not clipper.clip_(loss=loss).skipped for loss in losses]
    assert found == reference.accepts(losses, *settings, math.inf)
    assert {*map(bool, found)} == {True, False}
    assert param.grad.tolist() == pytest.approx([0.3, 0.4])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_a_spike(value: float) -> None:
    """From the first step on, and the window does not take it."""
    _, clipper = clipper_of()
    for loss in (value, 1.0, 1.1, 0.9, value, 1.05, torch.tensor([value], dtype=torch.float16)):
        is_finite = math.isfinite(loss)
        assert bool(clipper.clip_(loss=loss).skipped) is not is_finite
    state = clipper.state_dict()["groups"]["all"]["SkipSpike"]
    assert state["counts"].tolist() == [4, 4]
    assert state["values"][1].tolist() == [1.0, 1.1, 0.9, 1.05]


def test_norms_and_losses_have_windows_of_their_own() -> None:
    """Steps without a loss judge by the norm, and either is enough to leave out a step."""
    param, clipper = clipper_of()
    for k in range(8):
        loss = None if k % 2 else 1.0 + k / 10
        assert not clipper.clip_(loss=loss).skipped
    assert clipper.state_dict()["groups"]["all"]["SkipSpike"]["counts"].tolist() == [8, 4]
    assert clipper.clip_(loss=9.0).skipped
    assert not clipper.clip_().skipped
    param.grad = torch.tensor([3.0, 4.0])
    assert clipper.clip_(loss=1.2).skipped


def test_a_loss_of_any_kind() -> None:
    _, clipper = clipper_of(SkipSpike() & ClipNorm(1.0))
    weight = torch.ones(1, requires_grad=True)
    for loss in (1, 1.0, torch.tensor(1), torch.tensor([[1.0]]), weight * 2, weight.half()):
        assert not clipper.clip_(loss=loss).skipped
    assert clipper.decide(loss=1.0).accepted
    wrong: list[tuple[Any, type[Exception], str]] = [
        (torch.ones(2), ValueError, "one number for each rank"),
        (torch.tensor(True), ValueError, "one number for each rank"),
        (torch.tensor(1j), ValueError, "one number for each rank"),
        ("1", TypeError, "loss"),
        (True, TypeError, "loss"),
    ]
    before = str(clipper.state_dict())
    for loss, error, match in wrong:
        with pytest.raises(error, match=match):
            clipper.clip_(loss=loss)
    assert str(clipper.state_dict()) == before


def test_no_policy_judges_it() -> None:
    for policy in (ClipNorm(1.0), ZClip(), ClipNorm(1.0) & ZClip()):
        _, clipper = clipper_of(policy)
        with pytest.raises(ValueError, match="no policy of the Clipper may leave out steps"):
            clipper.clip_(loss=1.0)
    param, clipper = clipper_of()
    optimizer = AdamW([param])
    with pytest.raises(ValueError, match="closure"):
        clipper.step(optimizer, loss=1.0, closure=lambda: None)


class SmallLoss(PolicyBase):
    """A policy of one's own that sees the loss."""

    scope, norm_type = Scope.MODEL, 2.0

    def init(self, num_groups: int, device: torch.device) -> Any:
        return ()

    def limit(self, norms: Tensor, state: Any, context: NormContext) -> tuple[None, Any]:
        return None, state

    def accept(self, norms: Tensor, state: Any, context: NormContext) -> Tensor:
        assert context.loss is not None
        assert context.loss.dtype is F64
        return context.loss < 2.0


def test_a_policy_of_ones_own() -> None:
    _, clipper = clipper_of(SmallLoss())
    assert [bool(clipper.clip_(loss=x).skipped) for x in (1.0, 3.0)] == [False, True]


def averages(device: str, kind: str) -> list[float]:
    """The mean of 1, 2, 3, 4 is judged on all ranks; and with a step by the fused optimizer."""
    rank = dist.get_rank()
    model = nn.Linear(4, 4, device=device_of(device))
    root = mesh((2, 2), ("dp", "pp"), device)
    options: dict[str, Any] = {}
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "given mesh":
        options["mesh"] = root
    elif kind == "hsdp":
        fully_shard(model, mesh=mesh((2, 2), ("replicate", "shard"), device))
    else:
        fully_shard(model, mesh=root["dp"])
        options["mesh"] = root
    infinite = kind.endswith("inf")
    if infinite:
        other = nn.Linear(4, 4, device=device_of(device))
        fully_shard(other, mesh=root["dp"])
        groups = [
            {"params": other, "policy": ClipNorm(1.0, math.inf), "name": "largest"},
            {"params": list(model.parameters()), "policy": POLICY, "name": "rest"},
        ]
        model.other = other
    clipper = Clipper(groups if infinite else model, POLICY, **options)
    optimizer = AdamW(model.parameters(), fused=True)
    found: list[float] = []
    for step in range(7):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        mine = rank + 1.0 + (40.0 * rank if step == 5 else step / 10)
        loss = mine if not kind.startswith("last stage") or rank % 2 else None
        given = torch.tensor(loss, device=device_of(device)) if loss and step % 2 else loss
        with CommDebugMode() as comms:
            report = clipper.step(optimizer, loss=given)
        found.append(float(report.skipped))
        assert comms.get_total_counts() <= 1 + (kind == "last stage, inf")
    rows = clipper.state_dict()["groups"]["rest" if infinite else "all"]["SkipSpike"]["values"]
    return found + rows[1].tolist()


@pytest.mark.parametrize("kind", ["ddp", "given mesh", "hsdp", "last stage", "last stage, inf"])
def test_the_mean_of_the_ranks_is_judged(four_ranks: Ranks, kind: str) -> None:
    offset = 3.0 if kind.startswith("last stage") else 2.5
    kept = [offset + step / 10 for step in (4, 6, 2, 3)]
    for found in four_ranks.run(averages, four_ranks.device, kind):
        assert found[:7] == [0, 0, 0, 0, 0, 1, 0]
        assert found[7:] == pytest.approx(kept)


def unknown_ranks() -> str:
    _, clipper = clipper_of()
    try:
        clipper.clip_(loss=1.0)
    except LayoutError as error:
        found = str(error)
    loss = DTensor.from_local(torch.ones(()), mesh((4,), ("dp",)), [Partial()])
    try:
        clipper.clip_(loss=loss)
    except TypeError as error:
        return found + str(error)
    return ""


def test_which_ranks_train_together_must_be_known(four_on_cpus: Ranks) -> None:
    for text in four_on_cpus.run(unknown_ranks):
        assert "nothing says which ranks train together" in text
        assert "Pass `loss.full_tensor()`" in text
