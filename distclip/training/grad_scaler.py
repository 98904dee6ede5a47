"""`GradScaler`: the loss scale that gradients still have, and what the scaler must know afterwards.

For each optimizer a scaler keeps a stage and whether an overflow was found. distclip writes both as
`unscale_` would, from a norm that all ranks share; `scaler.step` and `scaler.update` then work as
always.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from distclip import torch_private
from distclip.arguments import kind_of, shown
from distclip.training import optimizers


def check_scaler(scaler: Any) -> None:
    """Raises TypeError unless `scaler` is a GradScaler, or one like it, or None."""
    if scaler is None or (hasattr(scaler, "is_enabled") and hasattr(scaler, "unscale_")):
        return
    closure = ", or `closure=` if it is the closure of a step" if callable(scaler) else ""
    raise TypeError(
        f"cannot unscale with scaler={shown(scaler)}: it is {kind_of(scaler)}, which keeps no loss "
        f"scale, and the gradients would stay as they are. Pass a torch.amp.GradScaler, or "
        f"None{closure}."
    )


def is_on(scaler: GradScaler | None) -> bool:
    return scaler is not None and scaler.is_enabled()


def inverse_scale(scaler: GradScaler | None, stepped: Sequence[Optimizer]) -> Tensor | None:
    """1 / scale, a float64 scalar; None where the gradients are not scaled, or no longer.

    Raises:
        ValueError: a scaler without an optimizer.
        RuntimeError, AssertionError: torch's own, where `scaler.unscale_(optimizer)` raises them.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    if not stepped:
        raise ValueError(
            "cannot unscale: a scaler was given without an optimizer, but a GradScaler keeps for "
            "each optimizer whether its gradients are still scaled. Pass the optimizer as well: "
            "`clipper.clip_(optimizer, scaler=scaler)`."
        )
    scale = torch_private.loss_scale(scaler)
    stages = [torch_private.scaler_state(scaler, optimizer)["stage"] for optimizer in stepped]
    # `unscale_` itself where it raises, and where only some gradients are unscaled already.
    if scale is None or any(stage is not OptState.READY for stage in stages):
        for optimizer, stage in zip(stepped, stages, strict=True):
            if stage is not OptState.UNSCALED:
                scaler.unscale_(optimizer)
        return None
    return scale.double().reciprocal()


def record(scaler: GradScaler, stepped: Sequence[Optimizer], found_inf: Tensor) -> None:
    """Writes what `unscale_` would: unscaled, and whether an overflow was found on any rank."""
    scale = cast(Tensor, torch_private.loss_scale(scaler))
    for optimizer in stepped:
        optimizers.start_momentum_(optimizer)  # scaler.step() may skip through found_inf
        state = torch_private.scaler_state(scaler, optimizer)
        # `update` adds these up in place, and each optimizer needs a tensor of its own. Its shape
        # is the one that torch gives it: ShardedGradScaler has one dim, but Adam's fused step
        # takes none.
        is_sharded = hasattr(scaler, "process_group")
        flat = is_sharded and not torch_private.takes_scaled_gradients(optimizer)
        found = found_inf.to(scale.device, copy=True).reshape([1] if flat else [])
        known = cast("dict[torch.device, Tensor]", state["found_inf_per_device"])
        state["found_inf_per_device"] = {
            device: torch.maximum(before.reshape(found.shape), found.to(device))
            for device, before in known.items()
        } or {scale.device: found}
        state["stage"] = OptState.UNSCALED


def step_optimizer(optimizer: Optimizer, scaler: GradScaler | None) -> None:
    """`optimizer.step()`, or `scaler.step(optimizer)` after `record`."""
    if scaler is None or not scaler.is_enabled():
        optimizer.step()
    elif not optimizers.skips_wrongly(optimizer):
        scaler.step(optimizer)
    else:
        state = torch_private.scaler_state(scaler, optimizer)
        if not any(bool(found) for found in state["found_inf_per_device"].values()):
            optimizer.step()
        state["stage"] = OptState.STEPPED
