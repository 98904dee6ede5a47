"""What has no gradient is not looked at: quantised and frozen weights, meta and lazy tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import AGC, AdaGC, ClipNorm, Clipper
from tests.support import reference
from tests.support.ranks import Ranks, same_bits_everywhere


class Unreadable(Tensor):
    """Stands for the tensors of quantisation libraries, which know few operations."""

    @staticmethod
    def __new__(cls, packed: Tensor) -> Unreadable:
        return Tensor._make_wrapper_subclass(cls, (4, 4), dtype=torch.bfloat16)  # type: ignore[attr-defined]

    def __init__(self, packed: Tensor) -> None:
        self.packed = packed

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Unreadable(args[0].packed)
        raise NotImplementedError(f"{func} on a quantised weight")


def unreadable() -> nn.Parameter:
    return nn.Parameter(Unreadable(torch.zeros(8, dtype=torch.uint8)), requires_grad=False)


def integers(dtype: torch.dtype) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)


WITHOUT: dict[str, Callable[[], nn.Parameter]] = {
    "uint8": integers(torch.uint8),
    "int8": integers(torch.int8),
    "bool": integers(torch.bool),
    "quantised": unreadable,
    "float8": integers(torch.float8_e4m3fn),
    "frozen": lambda: nn.Parameter(torch.full((4, 4), torch.nan), requires_grad=False),
    "meta": lambda: nn.Parameter(torch.empty(4, 4, device="meta")),
    "frozen meta": lambda: nn.Parameter(torch.empty(4, device="meta"), requires_grad=False),
    "lazy": lambda: nn.LazyLinear(3).weight,
}


class Adapted(nn.Module):
    """A frozen weight that may be of any kind, and two that train."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Parameter(torch.randn(3, 4))
        self.base = WITHOUT[kind]()
        self.b = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.b @ self.a


GIVEN: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda model: model,
    "list": lambda model: list(model.parameters()),
    "generator": lambda model: model.parameters(),
    "names": lambda model: list(model.named_parameters()),
}
GROUPS: dict[str, Callable[[nn.Module], Any]] = {
    **GIVEN,
    "group of a module": lambda model: [{"params": model}],
    "group of a list": lambda model: [{"params": list(model.parameters())}],
    "group of a generator": lambda model: [{"params": model.parameters()}],
    "groups": lambda model: [{"params": [p]} for p in model.parameters()],
    "optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1).param_groups,
}
POLICIES = [ClipNorm(0.5), AGC(0.01), AdaGC(max_norm=0.5)]


def make(kind: str) -> tuple[Adapted, Tensor]:
    """A model with gradients, and their norm."""
    model = Adapted(kind)
    (model(torch.ones(2, 4)) * 3).square().sum().backward()
    return model, reference.total_norm([model.a.grad, model.b.grad])


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("given", GROUPS)
@pytest.mark.parametrize("kind", WITHOUT)
def test_a_clipper_leaves_out_what_has_no_gradient(kind: str, given: str, policy: Any) -> None:
    model, norm = make(kind)
    clipper = Clipper(GROUPS[given](model), policy)
    clipper.plan.verify()
    assert "all" in str(clipper.plan) or "group0" in str(clipper.plan)
    torch.testing.assert_close(clipper.clip_().total_norm.double(), norm, rtol=1e-6, atol=0)
    expected, _ = make(kind)
    Clipper([("a", expected.a), ("b", expected.b)], policy).clip_()
    if given != "groups" or policy.scope is distclip.Scope.UNIT:
        torch.testing.assert_close(model.a.grad, expected.a.grad)
        torch.testing.assert_close(model.b.grad, expected.b.grad)
    assert model.base.grad is None
    clipper.load_state_dict(clipper.state_dict())


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("kind", WITHOUT)
def test_functions_leave_out_what_has_no_gradient(kind: str, given: str) -> None:
    model, norm = make(kind)
    got = distclip.clip_grad_norm_(GIVEN[given](model), 1e9, error_if_nonfinite=True)
    torch.testing.assert_close(got.double(), norm, rtol=1e-6, atol=0)
    distclip.clip_grads_with_norm_(GIVEN[given](model), 1.0, norm)
    after = reference.total_norm([model.a.grad, model.b.grad])
    torch.testing.assert_close(after.item(), 1.0, rtol=1e-5, atol=0)
    distclip.clip_grad_value_(GIVEN[given](model), 1e-3)
    assert model.a.grad.abs().max() <= 1e-3
    if given == "module":
        assert distclip.get_total_norm(model) < 1e-3 * 24**0.5 + 1e-9


@pytest.mark.parametrize("scaled", [False, True])
def test_optimizers_may_hold_it_too(scaled: bool) -> None:
    model, _ = make("uint8")
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    scaler.scale(model(torch.ones(2, 4)).square().sum()).backward()
    true = reference.total_norm([model.a.grad, model.b.grad]) / (8 if scaled else 1)
    for given in (model, list(model.parameters())):
        clipper = Clipper(given, ClipNorm(1e9))
        decision = clipper.decide(optimizer, scaler)
        torch.testing.assert_close(decision.total_norm, true, rtol=1e-6, atol=0)
    clipper.step(optimizer, scaler)
    scaler.update()


def test_a_list_of_nothing_else() -> None:
    for kind in ("uint8", "lazy", "quantised"):
        only = [WITHOUT[kind]()]
        assert distclip.clip_grad_norm_(only, 1.0).item() == 0.0
        assert Clipper(only).clip_().total_norm.item() == 0.0
        distclip.clip_grad_value_(only, 1.0)
        distclip.clip_grads_with_norm_(only, 1.0, torch.tensor(2.0))


def on_ranks(wrapper: str, kind: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(Adapted(kind), nn.Linear(4, 4))
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    elif wrapper == "fsdp2":
        fully_shard(model, ignored_params={p for p in model.parameters() if not p.requires_grad})
    torch.manual_seed(dist.get_rank())
    model(torch.randn(2, 4)).square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    wholes = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
    norm = reference.total_norm(wholes)
    assert len(wholes) == 4
    optimizer, limit = torch.optim.SGD(model.parameters(), lr=0.1), ClipNorm(1e9)
    everything: dict[str, Any] = {
        "function, module": lambda: distclip.clip_grad_norm_(model, 1e9),
        "function, list": lambda: distclip.clip_grad_norm_(list(model.parameters()), 1e9),
        "function, generator": lambda: distclip.clip_grad_norm_(model.parameters(), 1e9),
        "clipper, groups": lambda: Clipper(optimizer.param_groups, limit).clip_().total_norm,
        "clipper, list": lambda: Clipper(model.parameters(), limit).clip_().total_norm,
        "clipper, units": lambda: Clipper(model, AGC(1e9)).clip_(optimizer).total_norm,
    }
    for name, call in everything.items():
        got = call()
        torch.testing.assert_close(got.double(), norm, rtol=1e-6, atol=0, msg=name)
        assert same_bits_everywhere(got)
    Clipper(model).plan.verify()
    Clipper(list(model.parameters())).plan.verify()
    distclip.clip_grad_value_(model.parameters(), 1e9)


@pytest.mark.parametrize("kind", ["uint8", "quantised", "frozen"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_adapters_on_frozen_weights_on_several_ranks(
    four_on_cpus: Ranks, wrapper: str, kind: str
) -> None:
    if wrapper == "fsdp2" or kind != "quantised":  # DDP broadcasts, which these weights cannot
        four_on_cpus.run(on_ranks, wrapper, kind)


def empty_on_one_rank() -> None:
    """Functions without a collective, and ranks that know each other by a mesh."""
    from tests.support.ranks import mesh

    params = [] if dist.get_rank() == 1 else [nn.Parameter(torch.ones(2))]
    for param in params:
        param.grad = torch.full((2,), 3.0)
    distclip.clip_grad_value_(params, 1.0)
    distclip.clip_grads_with_norm_(params, 1.0, torch.tensor(2.0))
    on = mesh((4,), ("pp",))
    norm = distclip.clip_grad_norm_(params, 1.0, mesh=on)
    assert same_bits_everywhere(norm)
    torch.testing.assert_close(norm.item(), (3 * 2 * 0.25) ** 0.5, rtol=1e-5, atol=0)
    assert distclip.get_total_norm([p.grad for p in params], mesh=on) <= norm
    if not params:
        with pytest.raises(distclip.LayoutError, match="given no parameter"):
            distclip.clip_grad_norm_(params, 1.0)


def test_an_empty_list_on_one_rank(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(empty_on_one_rank)
