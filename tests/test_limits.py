"""Limits that are none: an error that names the policy and its group, before anything is scaled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from distclip import (
    AdaGC,
    AutoClip,
    ClipNorm,
    Clipper,
    ClipTensorNorm,
    EmptyState,
    NormContext,
    PolicyBase,
    Scope,
    StatelessPolicy,
)
from distclip.limits import read_limits
from tests.support.ranks import Ranks, mesh


@dataclass(frozen=True)
class Returns(StatelessPolicy):
    """Limits of `value` for norms above `above`, else 1."""

    value: Any
    above: float = 0.0
    scope: Scope = Scope.MODEL
    norm_type: float = 2.0

    def limit(
        self, norms: Tensor, state: EmptyState, context: NormContext
    ) -> tuple[Any, EmptyState]:
        if not isinstance(self.value, float):
            return self.value, state
        return torch.where(norms > self.above, self.value, torch.ones_like(norms)), state


class Counted(NamedTuple):
    steps: Tensor


@dataclass(frozen=True)
class Falls(PolicyBase):
    """A limit that becomes negative in the third step."""

    scope = Scope.MODEL
    norm_type = 2.0

    def init(self, num_groups: int, device: torch.device) -> Counted:
        return Counted(torch.zeros((), dtype=torch.float64, device=device))

    def limit(self, norms: Tensor, state: Counted, context: NormContext) -> tuple[Any, Counted]:
        return 2 - state.steps, Counted(state.steps + 1)


def parameters(*grads: list[float]) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.zeros(len(grad))) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = torch.tensor(grad)
    return params


@pytest.mark.parametrize("scope", Scope, ids=str)
@pytest.mark.parametrize("mode", ["propagate", "raise", "skip", "zero"])
@pytest.mark.parametrize("value", [-1.0, math.nan, -math.inf, -1e-300])
def test_a_limit_that_is_none_raises_before_anything_is_scaled(
    value: float, mode: str, scope: Scope
) -> None:
    good, bad = parameters([30.0, 40.0], [3.0, 4.0])
    clipper = Clipper(
        [
            {"name": "good", "params": [good], "policy": ClipNorm(1.0)},
            {"name": "bad", "params": [bad], "policy": Returns(value, 1.0, scope)},
        ],
        on_nonfinite=mode,
    )
    optimizer = torch.optim.SGD([good, bad], lr=1.0)
    for call in (clipper.clip_, clipper.decide, lambda: clipper.step(optimizer)):
        with pytest.raises(ValueError, match=r"cannot clip group 'bad' with Returns\(.*negative"):
            call()
        assert good.grad.tolist() == [30.0, 40.0]
        assert bad.grad.tolist() == [3.0, 4.0]
        assert good.tolist() == [0.0, 0.0]
    handle = clipper.attach(optimizer)
    with pytest.raises(ValueError, match="group 'bad'"):
        optimizer.step()
    assert good.tolist() == [0.0, 0.0]
    handle.remove()
    bad.grad.mul_(0.01)
    assert clipper.clip_().coefficients["bad"] == 1.0
    assert clipper.skipped == 0


def test_a_statistic_that_goes_wrong_later() -> None:
    (param,) = parameters([3.0, 4.0])
    clipper = Clipper([param], Falls() & ClipNorm(9.0))
    for limit in (2.0, 1.0, 0.0):
        param.grad = torch.tensor([3.0, 4.0])
        assert clipper.clip_().limit == limit
    param.grad = torch.tensor([3.0, 4.0])
    with pytest.raises(ValueError, match=r"Minimum\(first=Falls\(\)"):
        clipper.clip_()
    assert param.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("mode", ["propagate", "skip", "zero"])
def test_a_norm_that_is_not_finite_says_nothing_about_limits(mode: str) -> None:
    for policy in (Returns(math.nan), AutoClip(), AdaGC(), ClipTensorNorm(1.0)):
        (param,) = parameters([math.nan, 4.0])
        report = Clipper([param], policy, on_nonfinite=mode).clip_()
        assert not report.finite


FORMS: dict[str, tuple[Any, str]] = {
    "float": (1, "1, an int"),
    "text": ("1.0", "'1.0', a str"),
    "int": (torch.tensor(1), "torch.int64"),
    "bool": (torch.tensor(True), "torch.bool"),
    "complex": (torch.tensor(1j), "torch.complex64"),
    "shape": (torch.ones(2), r"of shape \[2\]"),
    "one more dim": (torch.ones(1), r"of shape \[1\]"),
    "tuple": ((1.0,), "a tuple"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_limit_of_another_form_is_refused(form: str) -> None:
    returned, found = FORMS[form]
    (param,) = parameters([3.0, 4.0])
    match = rf"cannot clip group 'all' with Returns\(.*{found}.*torch\.full_like\(norms, 1\.0\)"
    with pytest.raises(TypeError, match=match):
        Clipper([param], Returns(returned)).clip_()
    assert param.grad.tolist() == [3.0, 4.0]


def test_none_and_other_floating_dtypes_are_limits() -> None:
    for returned, coefficient in (
        (None, 1.0),
        (torch.tensor(1.0), 0.2),
        (torch.tensor(1.0, dtype=torch.bfloat16), 0.2),
    ):
        (param,) = parameters([3.0, 4.0])
        report = Clipper([param], Returns(returned)).clip_()
        assert report.coefficient.item() == pytest.approx(coefficient)


def one_limit_for_all(value: float) -> None:
    on = mesh((2, 2), ("dp", "tp"))
    values = torch.arange(8.0) + 1 + 10 * 0
    param = nn.Parameter(distribute_tensor(values, on, [Shard(0), Replicate()], src_data_rank=None))
    for policy in (Returns(value), Returns(value, 0.0, Scope.TENSOR)):
        param.grad = param.detach().clone()
        clipper = Clipper([("w", param)], policy)
        if policy.scope is Scope.TENSOR:  # known to each rank, but not to distclip: one step later
            assert clipper.clip_().coefficient == 0
            param.grad = param.detach().clone()
        before = param.grad.to_local().clone()
        with pytest.raises(ValueError, match=r"cannot clip group 'all' with Returns"):
            clipper.clip_()
        assert torch.equal(param.grad.to_local(), before)


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_one_limit_for_all_ranks(four_ranks: Ranks, value: float) -> None:
    four_ranks.run(one_limit_for_all, value)


def a_limit_that_one_rank_knows(value: float, mode: str, norm_type: float) -> None:
    """Rows on four ranks; that of rank 2 has a limit that is none, in the second step."""
    on = mesh((4,), ("dp",))
    rank = dist.get_rank()
    rows = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.3, 0.4], [9.0, 12.0]])
    param = nn.Parameter(DTensor.from_local(rows[rank : rank + 1].clone(), on, [Shard(0)]))
    policy = Returns(value, 1000.0, Scope.UNIT, norm_type)
    clipper = Clipper([("w", param)], policy, on_nonfinite=mode)

    def gradient(scale_of_2: float = 1.0) -> Tensor:
        grad = rows.clone()
        grad[2] *= scale_of_2
        param.grad = DTensor.from_local(grad[rank : rank + 1], on, [Shard(0)])
        return grad

    def clipped(grad: Tensor) -> Tensor:
        return grad * (1 / grad.norm(norm_type, dim=1, keepdim=True)).clamp(max=1)

    for _ in range(2):  # twice: the error leaves nothing behind
        grad = gradient()
        assert clipper.clip_().finite
        torch.testing.assert_close(param.grad.full_tensor(), clipped(grad))
        grad = gradient(1e5)
        want = clipped(grad)
        want[2] = 0.0
        assert clipper.clip_().finite
        torch.testing.assert_close(param.grad.full_tensor(), want)
        grad = gradient()
        match = r"cannot clip group 'all' with Returns.*in the last step, on the ranks \[2\]"
        with pytest.raises(ValueError, match=match):
            clipper.clip_()
        assert torch.equal(param.grad.full_tensor(), grad)
    assert clipper.skipped == 0
    # A NaN of the gradients is none of a limit.
    grad = gradient(math.nan)
    assert not clipper.clip_().finite
    assert not gradient().isnan().any()
    assert clipper.clip_().finite


@pytest.mark.parametrize("mode", ["propagate", "skip", "zero"])
@pytest.mark.parametrize("norm_type", [2.0, 8.0, math.inf])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_limit_that_one_rank_knows(
    four_ranks: Ranks, value: float, mode: str, norm_type: float
) -> None:
    four_ranks.run(a_limit_that_one_rank_knows, value, mode, norm_type)


def test_limits_are_read_without_a_wait_for_the_device() -> None:
    """A meta tensor has no values: `.item()` and `bool()` raise."""
    (param,) = parameters([3.0, 4.0])
    clipper = Clipper([param], Returns(-1.0))
    (group,) = clipper.plan.groups
    norms = torch.ones((), dtype=torch.float64, device="meta")
    found = read_limits(norms, norms, group, clipper.plan, Returns(-1.0), lambda: norms > 0)
    assert found.limits.is_meta
    assert found.valid is not None
    ours = read_limits(norms, norms, group, clipper.plan, ClipNorm(1.0), lambda: norms > 0)
    assert ours.valid is None  # known, and costs nothing


@dataclass(frozen=True)
class OwnTensor(StatelessPolicy):
    """Returns a tensor that its user writes to between the steps."""

    max_norm: Tensor
    scope = Scope.MODEL
    norm_type = 2.0

    def limit(self, norms: Tensor, state: Any, context: Any) -> tuple[Tensor, Any]:
        return self.max_norm, state


def test_a_report_keeps_the_limit_of_its_step() -> None:
    (param,) = parameters([3.0, 4.0])
    policy = OwnTensor(torch.tensor(2.0, dtype=torch.float64))
    clipper = Clipper([param], policy)
    first = clipper.clip_()
    policy.max_norm.mul_(0.5)
    param.grad = torch.tensor([3.0, 4.0])
    second = clipper.clip_()
    assert [first.limit.item(), second.limit.item()] == [2.0, 1.0]
    assert second.coefficient.item() == pytest.approx(0.2)
