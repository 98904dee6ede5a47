"""What distclip knows of `GradScaler`, whose state is private: all of it is here.

A scaler keeps, by optimizer, a stage and whether an overflow was found. distclip writes both as `unscale_` would,
from a norm that all ranks share; `scaler.step` and `scaler.update` then work as always.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from distclip.training import fused


def is_on(scaler: GradScaler | None) -> bool:
    return scaler is not None and scaler.is_enabled()


def inverse_scale(scaler: GradScaler | None, optimizers: Sequence[Optimizer]) -> Tensor | None:
    """1 / scale, a float64 scalar; None where the gradients are not scaled, or no longer.

    Raises:
        ValueError: a scaler without an optimizer.
        RuntimeError, AssertionError: torch's own, where `scaler.unscale_(optimizer)` would raise them.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    if not optimizers:
        raise ValueError(
            "cannot unscale: a scaler was given without an optimizer, but a GradScaler keeps by optimizer whether its "
            "gradients are still scaled. Pass the optimizer as well: `clipper.clip_(optimizer, scaler=scaler)`."
        )
    stages = [_state(scaler, optimizer)["stage"] for optimizer in optimizers]
    scale = cast(Any, scaler)._scale
    # `unscale_` itself where it raises, and where some gradients are unscaled already and others not.
    if scale is None or any(stage is not OptState.READY for stage in stages):
        for optimizer, stage in zip(optimizers, stages, strict=True):
            if stage is not OptState.UNSCALED:
                scaler.unscale_(optimizer)
        return None
    return cast(Tensor, scale).double().reciprocal()


def record(scaler: GradScaler | None, optimizers: Sequence[Optimizer], finite: Tensor) -> None:
    """Tells the scaler what `unscale_` would have: unscaled, and whether an overflow was found on any rank."""
    if scaler is None or not scaler.is_enabled():
        return
    scale = cast(Tensor, cast(Any, scaler)._scale)
    for optimizer in optimizers:
        fused.start_momentum_(optimizer)  # scaler.step() may skip through found_inf
        state = _state(scaler, optimizer)
        # A tensor of its own for each, since `update` adds them up in place; of the shape that torch gives it:
        # ShardedGradScaler has one dim, but Adam's fused step takes none.
        flat = hasattr(scaler, "process_group") and not hasattr(optimizer, "_step_supports_amp_scaling")
        found = fused.found_inf(finite).to(scale.device).reshape([1] if flat else [])
        known = cast("dict[torch.device, Tensor]", state["found_inf_per_device"])
        joined = {device: torch.maximum(t.reshape(found.shape), found.to(device)) for device, t in known.items()}
        state["found_inf_per_device"] = joined or {scale.device: found}
        state["stage"] = OptState.UNSCALED


def step(scaler: GradScaler, optimizer: Optimizer) -> None:
    """`scaler.step(optimizer)`, after `record`."""
    if not fused.skips_wrongly(optimizer):
        scaler.step(optimizer)
        return
    state = _state(scaler, optimizer)
    if not any(bool(found) for found in state["found_inf_per_device"].values()):
        optimizer.step()
    state["stage"] = OptState.STEPPED


def _state(scaler: GradScaler, optimizer: Optimizer) -> dict[str, Any]:
    return cast(Any, scaler)._per_optimizer_states[id(optimizer)]
