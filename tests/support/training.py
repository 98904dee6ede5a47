"""A few steps of one small model: as torch trains it, and as distclip does."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

import distclip
from tests.support.ranks import device_of

MAX_NORM = 0.5
Make = Callable[[nn.Module], Optimizer]


def make_model(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(device_of(device))


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step)).to(
        next(model.parameters())
    )
    return (10 * model(x) - 5).square().mean()


def make_scaler(enabled: bool = True, scale: float = 1024.0) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, enabled=enabled)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(
    way: str,
    make: Make,
    scaler: GradScaler,
    steps: int = 4,
    overflows: tuple[int, ...] = (),
    **options: object,
) -> tuple[nn.Module, Optimizer, list[distclip.Report]]:
    """`way`: clip_, step or attach; `overflows`: the steps at which a gradient is infinite."""
    model = make_model()
    optimizer = make(model)
    clipper = distclip.Clipper(model, distclip.ClipNorm(MAX_NORM), **options)
    attached = clipper.attach(optimizer) if way == "attach" else None
    reports = []
    for step in range(steps):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step in overflows:
            model[0].weight.grad[0, 0] = math.inf
        if way == "step":
            reports.append(clipper.step(optimizer, scaler))
        else:
            if way == "clip_":
                reports.append(clipper.clip_(optimizer, scaler=scaler))
            scaler.step(optimizer)
        if attached is not None and attached.report is not None:
            reports.append(attached.report)
        scaler.update()
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
    return model, optimizer, reports


def train_as_torch(
    make: Make, scaler: GradScaler, steps: int = 4, overflows: tuple[int, ...] = ()
) -> tuple[nn.Module, Optimizer, Tensor]:
    """unscale_, clip_grad_norm_, and no step where the norm is not finite."""
    model = make_model()
    optimizer = make(model)
    for step in range(steps):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step in overflows:
            model[0].weight.grad[0, 0] = math.inf
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        if norm.isfinite():
            assert norm > MAX_NORM
            optimizer.step()
        if scaler.is_enabled():
            scaler._per_optimizer_states[id(optimizer)]["stage"] = OptState.STEPPED
        scaler.update()
    return model, optimizer, norm


def states(optimizer: Optimizer) -> list[dict[str, object]]:
    return list(optimizer.state_dict()["state"].values())
