"""Several groups and optimizers: each fused optimizer takes its own factor; others are clipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import SGD, AdamW, Muon, Optimizer

import distclip
from distclip import AdaGC, ClipNorm, Clipper, ClipTensorNorm, ClipValue, decision
from tests.support import reference
from tests.support.ranks import Ranks, device_of, mesh
from tests.support.training import make_scaler
from tests.support.wrapped import local
from tests.support.writes import counted_writes

CLOSE = {"rtol": 2e-6, "atol": 2e-7}
LIMITS = {"matrices": 0.4, "rest": 0.1, "embedding": 0.2}
ONLY_MEASURED = {"matrices": math.inf, "rest": 0.1, "embedding": math.inf}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.norm(x + self.down(self.up(x).relu()))


def make_model(device: str = "cpu") -> Model:
    torch.manual_seed(2)
    return Model().to(device_of(device))


def groups_of(model: Model) -> dict[str, list[nn.Parameter]]:
    matrices = [model.up.weight, model.down.weight]
    rest = [model.up.bias, model.down.bias, *model.norm.parameters()]
    return {"matrices": matrices, "rest": rest, "embedding": [model.embedding.weight]}


def make_clipper(model: Model, limits: dict[str, float], **options: Any) -> Clipper:
    groups = [
        {"params": params, "name": name, "policy": ClipNorm(limits[name])}
        for name, params in groups_of(model).items()
    ]
    return Clipper(groups, **options)


def loss_of(model: nn.Module, step: int, rank: int = 0, size: int = 1) -> Tensor:
    tokens = torch.randint(12, (8, 6), generator=torch.Generator().manual_seed(step))
    tokens = tokens.chunk(size)[rank].to(next(model.parameters()).device)
    return 50 * model(tokens).pow(3).mean()


def fused(params: Any) -> Optimizer:
    return AdamW(params, lr=0.01, fused=True)


def foreach(params: Any) -> Optimizer:
    return AdamW(params, lr=0.01, foreach=True)


def muon(params: Any) -> Optimizer:
    return Muon(params, lr=0.01)


def sgd(params: Any) -> Optimizer:
    return SGD(params, lr=0.01, momentum=0.9, fused=True)


def eight_bit(params: Any) -> Optimizer:
    optim = pytest.importorskip("torchao.optim")
    return optim.AdamW8bit(params, lr=0.01, block_size=8)


def schedule_free(params: Any) -> Any:
    optimizer = pytest.importorskip("schedulefree").AdamWScheduleFree(params, lr=0.01)
    optimizer.train()
    return optimizer


# What steps the matrices, the rest and the embedding.
SETS: dict[str, tuple[Callable[[Any], Any], ...]] = {
    "three fused": (fused, sgd, fused),
    "Muon beside fused": (muon, fused, fused),
    "foreach beside fused": (fused, foreach, fused),
    "8-bit beside fused": (eight_bit, fused, sgd),
    "schedule-free beside fused": (fused, fused, schedule_free),
    "none fused": (muon, foreach, foreach),
}


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """torchao compiles its step, which takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Trained(NamedTuple):
    model: Model
    clipper: Clipper
    reports: list[distclip.Report]
    written: int


def train(
    way: str, makes: Any, limits: dict[str, float], scaled: bool, scale: float | None = None
) -> Trained:
    """Four steps; under a scaler the second overflows."""
    model, scaler = make_model(), make_scaler(scaled)
    pairs = zip(makes, groups_of(model).values(), strict=True)
    stepped = [make(params) for make, params in pairs]
    clipper = make_clipper(model, limits)
    attached = clipper.attach(stepped, scaler) if way == "attach" else None
    reports: list[distclip.Report] = []
    with counted_writes() as written:
        for step in range(4):
            model.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if scaled and step == 1:
                model.up.weight.grad[0, 0] = math.inf
            if way == "step":
                reports.append(clipper.step(stepped, scaler, scale))
            else:
                if way == "clip_":
                    reports.append(clipper.clip_(stepped, scaler, scale))
                for each in stepped:
                    scaler.step(each) if isinstance(each, Optimizer) else each.step()
                if attached is not None:
                    reports.append(attached.report)
            scaler.update()
    assert not any(vars(each).keys() & {"grad_scale", "found_inf"} for each in stepped)
    return Trained(model, clipper, reports, sum(written))


def train_by_hand(
    makes: Any, limits: dict[str, float], overflows: bool, scale: float = 1.0
) -> tuple[Model, list[dict[str, float]]]:
    """Each group is multiplied by its own coefficient, and the optimizers step; with its norms."""
    model = make_model()
    groups = groups_of(model)
    stepped = [make(params) for make, params in zip(makes, groups.values(), strict=True)]
    norms: list[dict[str, float]] = []
    for step in range(4):
        model.zero_grad()
        loss_of(model, step).backward()
        norms.append({})
        for name, params in groups.items():
            grads = [p.grad.double() * scale for p in params]
            norms[-1][name] = reference.total_norm(grads).item()
            for param, grad in zip(params, reference.clip_norm(grads, limits[name]), strict=True):
                param.grad = grad.float()
        if not (overflows and step == 1):
            for each in stepped:
                each.step()
    return model, norms


def weights(model: nn.Module) -> Tensor:
    return torch.cat([local(p.detach()).flatten() for p in model.parameters()])


@pytest.mark.parametrize("limits", [LIMITS, ONLY_MEASURED], ids=["all", "one clipped"])
@pytest.mark.parametrize("how", ["plain", "scaled", "scale="])
@pytest.mark.parametrize("name", SETS)
def test_each_optimizer_takes_the_factor_of_its_group(
    name: str, how: str, limits: dict[str, float]
) -> None:
    makes = SETS[name]
    scaled, scale = how == "scaled", 0.25 if how == "scale=" else None
    expected, norms = train_by_hand(makes, limits, scaled, scale or 1.0)
    assert all(n > 2 * LIMITS[group] for group, n in norms[-1].items())
    for way in ("step", "clip_") if scale else ("step", "clip_", "attach"):
        model, _, reports, written = train(way, makes, limits, scaled, scale)
        last = {group: norm.item() for group, norm in reports[-1].norms.items()}
        # Muon rounds to bfloat16 and makes small directions large; its step is 0.01.
        close = {"rtol": 0.0, "atol": 5e-4} if muon in makes else CLOSE
        assert last == pytest.approx(norms[-1], rel=2.0**-8 if muon in makes else 1e-5)
        torch.testing.assert_close(weights(model), weights(expected), **close)
        if way == "clip_":
            continue
        # Where it is attached, a scaler unscales what is not fused.
        needs_scale = way == "step" and how != "plain"
        others = [g for g, make in zip(LIMITS, makes, strict=True) if make not in (fused, sgd)]
        assert bool(written) == any(needs_scale or limits[g] < math.inf for g in others)


def test_print_says_who_multiplies() -> None:
    model = make_model()
    matrices, rest, embedding = groups_of(model).values()
    clipper = make_clipper(model, LIMITS)
    assert "multipl" not in str(clipper.plan)
    loss_of(model, 0).backward()
    stepped = [muon(matrices), fused(rest), sgd(embedding)]
    clipper.step(stepped)
    assert str(clipper.plan).splitlines()[-3:] == [
        "Muon: gradients are multiplied before its step (only torch's own optimizers with "
        "fused=True do it themselves)",
        "AdamW: its kernel multiplies by the factor of 'rest'",
        "SGD: its kernel multiplies by the factor of 'embedding'",
    ]
    del stepped
    assert "multipl" not in str(clipper.plan)  # it keeps none of them alive


def test_print_still_says_it_when_the_plan_is_made_anew() -> None:
    """An attached optimizer that gets parameters."""
    model = make_model()
    _, rest, embedding = groups_of(model).values()
    optimizer = fused(rest)
    clipper = Clipper(rest)
    clipper.attach(optimizer)
    first = clipper.plan
    optimizer.add_param_group({"params": embedding})
    loss_of(model, 0).backward()
    optimizer.step()
    assert clipper.plan is not first
    assert str(clipper.plan).endswith("AdamW: its kernel multiplies by the factor of 'all'")


REASONS: dict[str, tuple[Callable[[Model], tuple[Clipper, list[Optimizer]]], str]] = {
    "several groups": (
        lambda m: (make_clipper(m, LIMITS), [fused(m.parameters())]),
        "it steps several groups, and takes one factor",
    ),
    "others": (
        lambda m: (Clipper(groups_of(m)["rest"]), [fused(m.parameters())]),
        "it steps parameters that the Clipper does not hold",
    ),
    "shared": (
        lambda m: (Clipper(m), [fused(m.parameters()), sgd(groups_of(m)["rest"])]),
        "another optimizer steps some of the same",
    ),
    "per tensor": (
        lambda m: (Clipper(m, ClipTensorNorm(0.1)), [fused(m.parameters())]),
        "limits per tensor are several factors",
    ),
    "by value": (
        lambda m: (Clipper(m, ClipValue(0.1)), [fused(m.parameters())]),
        "limits per element are several factors",
    ),
    "zero": (
        lambda m: (Clipper(m, on_nonfinite="zero"), [fused(m.parameters())]),
        'on_nonfinite="zero" sets them to zero',
    ),
    "elsewhere": (
        lambda m: (Clipper(m, gradient=lambda p: p.grad), [fused(m.parameters())]),
        "they are not in `.grad`",
    ),
    "float64": (
        lambda m: (Clipper(m.double()), [fused(m.parameters())]),
        "all are float64, a factor is float32",
    ),
}


@pytest.mark.parametrize("way", ["step", "attach"])
@pytest.mark.parametrize("name", REASONS)
def test_what_cannot_fold_is_clipped_before_and_says_why(name: str, way: str) -> None:
    make, why = REASONS[name]
    model = make_model()
    clipper, stepped = make(model)
    if name == "shared" and way == "attach":
        return  # the second optimizer finds gradients that the first has changed
    loss_of(model, 0).backward()
    before = [p.grad.clone() for p in model.parameters()]
    if way == "step":
        clipper.step(stepped)
    else:
        clipper.attach(stepped)
        for each in stepped:
            each.step()
    assert f"gradients are multiplied before its step ({why})" in str(clipper.plan)
    held = {id(p.param) for p in clipper.plan.params}
    for param, was in zip(model.parameters(), before, strict=True):
        # A fused kernel that is given no factor leaves gradients as they are.
        assert torch.equal(param.grad, was) == (id(param) not in held)


def test_skips_on_the_device_with_limits_per_tensor() -> None:
    """A fused optimizer leaves out its step itself, whoever clips."""
    model = make_model()
    optimizer = fused(model.parameters())
    clipper = Clipper(model, AdaGC(), on_nonfinite="skip")
    loss_of(model, 0).backward()
    model.up.weight.grad[0, 0] = math.nan
    before = weights(model)
    with pytest.MonkeyPatch.context() as patch:
        waits = property(lambda _: pytest.fail("waits"))
        patch.setattr(decision.Decision, "is_left_out", waits)
        assert clipper.step(optimizer).skipped
    assert torch.equal(weights(model), before)
    assert all(state["step"] == 0 for state in optimizer.state.values())


def on_ranks(device: str, kind: str, way: str, scaled: bool) -> float:
    """Groups under FSDP2 and HSDP as in one process, with one collective."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shape, axes = ((2, 2), ("replicate", "shard")) if kind == "hsdp" else ((4,), ("shard",))
    results = []
    for ours in (True, False):
        model, scaler = make_model(device), GradScaler(device, init_scale=256.0, enabled=scaled)
        fully_shard(model, mesh=mesh(shape, axes, device))
        groups = groups_of(model)
        make = fused if ours else foreach  # torch cannot step DTensors by fused SGD
        stepped = [make(params) for params in groups.values()]
        limits = LIMITS if ours else dict.fromkeys(LIMITS, math.inf)
        clipper = make_clipper(model, limits)
        attached = clipper.attach(stepped, scaler) if ours and way == "attach" else None
        for step in range(3):
            model.zero_grad()
            scaler.scale(loss_of(model, step, rank, size)).backward()
            with CommDebugMode() as comms, counted_writes() as written:
                if not ours:
                    report = clipper.clip_(stepped, scaler)
                    for name, params in groups.items():
                        factor = min(1.0, LIMITS[name] / (report.norms[name].item()))
                        for param in params:
                            local(param.grad).mul_(factor)
                if ours and way == "step":
                    clipper.step(stepped, scaler)
                else:
                    for each in stepped:
                        scaler.step(each)
            if ours and way == "step":
                assert comms.get_total_counts() == 1
            if ours and (device == "cpu" or scaled):
                assert not written
            assert attached is None or attached.report.clipped
            scaler.update()
        results.append(weights(model).cpu())
    torch.testing.assert_close(*results, **CLOSE)
    return results[0].double().sum().item()


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("way", ["step", "attach"])
@pytest.mark.parametrize("kind", ["fsdp2", "hsdp"])
def test_groups_on_ranks(four_ranks: Ranks, kind: str, way: str, scaled: bool) -> None:
    four_ranks.run(on_ranks, four_ranks.device, kind, way, scaled)
