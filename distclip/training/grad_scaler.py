"""`GradScaler`: the loss scale that gradients still have, and what the scaler must know afterwards.

For each optimizer a scaler keeps a stage and whether an overflow was found. distclip writes both as
`unscale_` would, from a norm that all ranks share; `scaler.step` and `scaler.update` then work as
always.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from distclip import torch_private
from distclip.arguments import kind_of, shown
from distclip.training import optimizers, wrappers


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


def is_used(scaler: GradScaler | None) -> bool:
    """Whether a loss has been scaled by it."""
    return scaler is not None and is_on(scaler) and torch_private.loss_scale(scaler) is not None


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
    for optimizer in stepped:
        wrappers.check_accumulated(optimizer)
    scale = torch_private.loss_scale(scaler)
    # For which of a wrapper and its optimizers `unscale_` was called is the trainer's affair.
    each = [inner for optimizer in stepped for inner in _with_stage(scaler, optimizer)]
    # `unscale_` itself where it raises, and where only some gradients are unscaled already.
    if scale is None or any(stage is not OptState.READY for _, stage in each):
        for optimizer, stage in each:
            if stage is not OptState.UNSCALED:
                scaler.unscale_(optimizer)
        return None
    return scale.double().reciprocal()


def unscale_unless_alike(
    scaler: GradScaler, attached: Sequence[Optimizer], scale: Tensor | None
) -> Tensor | None:
    """`scale` if all gradients stay scaled until their optimizers step; else unscales all now.

    Args:
        scale: what the gradients of an optimizer that steps now still need.
    """
    stages = [stage_of(scaler, optimizer) for optimizer in attached]
    all_ready = all(stage is OptState.READY for stage in stages)
    if scale is not None and all_ready and all(map(torch_private.takes_scaled_gradients, attached)):
        return scale
    for optimizer, stage in zip(attached, stages, strict=True):
        if stage is OptState.READY:
            scaler.unscale_(optimizer)
    return None


class _WithStage(NamedTuple):
    optimizer: Optimizer
    stage: OptState


def _with_stage(scaler: GradScaler, optimizer: Optimizer) -> list[_WithStage]:
    """The optimizers behind `optimizer`, each with the later of its stage and its wrapper's."""
    outer = stage_of(scaler, optimizer)
    inner = [_WithStage(each, stage_of(scaler, each)) for each in wrappers.unwrapped([optimizer])]
    return [each if outer is OptState.READY else each._replace(stage=outer) for each in inner]


def stage_of(scaler: GradScaler, optimizer: Optimizer) -> OptState:
    """What the scaler has done with the gradients of an optimizer since its `update`."""
    return cast(OptState, torch_private.scaler_state(scaler, optimizer)["stage"])


def found_inf(scaler: GradScaler, stepped: Sequence[Optimizer]) -> Tensor:
    """1 where the scaler will skip these optimizers, as it knows after `record` or `unscale_`."""
    states = [torch_private.scaler_state(scaler, optimizer) for optimizer in stepped]
    found = [each for state in states for each in state["found_inf_per_device"].values()]
    device = found[0].device
    return torch.stack([each.to(device).reshape(()) for each in found]).amax()


@contextmanager
def keeping_scale(scaler: GradScaler) -> Generator[None]:
    """Lets `update` leave the scale as it was: it has been called for these gradients already."""
    kept = [each.clone() for each in torch_private.scale_and_growth(scaler)]
    yield
    for now, before in zip(torch_private.scale_and_growth(scaler), kept, strict=True):
        now.copy_(before)


def mark_stepped(scaler: GradScaler, stepped: Sequence[Optimizer]) -> None:
    """Lets `update` take the step for done where it was left out."""
    for optimizer in stepped:
        torch_private.scaler_state(scaler, optimizer)["stage"] = OptState.STEPPED


def record(scaler: GradScaler, stepped: Sequence[Optimizer], found_inf: Tensor) -> None:
    """Writes what `unscale_` would: unscaled, and whether an overflow was found on any rank.

    For wrappers and for what they hold, because `scaler.step` may be given either.
    """
    inner = wrappers.unwrapped(stepped)
    # `update` adds up what is found for each, in place: all must have one shape. It is the one that
    # torch gives it: ShardedGradScaler has one dim, but Adam's fused step takes none.
    is_sharded = hasattr(scaler, "process_group")
    flat = is_sharded and not any(map(torch_private.takes_scaled_gradients, inner))
    for each in inner:
        optimizers.start_momentum_(each)  # scaler.step() may skip through found_inf
    for optimizer in stepped:
        for each in wrappers.known_to_scaler(optimizer):
            _record(scaler, each, found_inf, flat)


def _record(scaler: GradScaler, optimizer: Optimizer, found_inf: Tensor, flat: bool) -> None:
    scale = cast(Tensor, torch_private.loss_scale(scaler))
    state = torch_private.scaler_state(scaler, optimizer)
    # Each optimizer needs a tensor of its own.
    found = found_inf.to(scale.device, copy=True).reshape([1] if flat else [])
    known = cast("dict[torch.device, Tensor]", state["found_inf_per_device"])
    # ShardedGradScaler sums it over ranks, and fused steps skip where it is 1, but not at 2.
    state["found_inf_per_device"] = {
        device: torch.maximum(before.reshape(found.shape), found.to(device)).clamp(max=1)
        for device, before in known.items()
    } or {scale.device: found}
    state["stage"] = OptState.UNSCALED


def step_optimizer(
    optimizer: Optimizer, scaler: GradScaler | None, found_inf: Tensor | None = None
) -> None:
    """`optimizer.step()`, or `scaler.step(optimizer)` after `record(..., found_inf)`."""
    if scaler is None or not scaler.is_enabled():
        optimizer.step()
        return
    if found_inf is not None and _is_forgotten(scaler, optimizer):
        record(scaler, [optimizer], found_inf)
    if wrappers.steps_through(optimizer, scaler):
        optimizer.step()
    elif _skips_itself(optimizer, scaler):
        scaler.step(optimizer)
    else:
        _step_unless_found(optimizer, scaler)


def _skips_itself(optimizer: Optimizer, scaler: GradScaler) -> bool:
    """Whether `scaler.step` does right by it; else the host must decide."""
    if wrappers.is_wrapper(optimizer) or optimizers.skips_wrongly(optimizer):
        return False
    scale = torch_private.loss_scale(scaler)
    return scale is None or not optimizers.reads_too_early(optimizer, scale.device)


def _is_forgotten(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Whether another wrapper has called `scaler.update` since `record`."""
    return any(stage is OptState.READY for _, stage in _with_stage(scaler, optimizer))


def _step_unless_found(optimizer: Optimizer, scaler: GradScaler) -> None:
    # torch would set what a fused step reads on the wrapper, where the step does not see it.
    state = torch_private.scaler_state(scaler, optimizer)
    if not any(bool(found) for found in state["found_inf_per_device"].values()):
        optimizer.step()
    mark_stepped(scaler, wrappers.known_to_scaler(optimizer))
