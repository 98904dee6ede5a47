"""What distclip knows of torch's fused optimizers: their kernels divide by `grad_scale`, and skip by `found_inf`."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

_FUSED = (Adam, AdamW, SGD, Adagrad)  # exactly these: a subclass may have a step of its own
_ATTRIBUTES = ("grad_scale", "found_inf")


def folds(optimizer: Optimizer) -> bool:
    """Whether `step()` divides every gradient by `grad_scale` and can skip by `found_inf`."""
    return type(optimizer) in _FUSED and _all_fused(optimizer) and not skips_wrongly(optimizer)


def skips_wrongly(optimizer: Optimizer) -> bool:
    """Whether a fused step that `found_inf` skips raises or leaves wrong state, so that the host must decide.

    Groups that are not fused assert that there is no `found_inf`. The first step of SGD with momentum keeps an
    uninitialised buffer, which `start_momentum_` prevents unless there is dampening.
    """
    if type(optimizer) not in _FUSED or not any(group.get("fused") for group in optimizer.param_groups):
        return False
    return not _all_fused(optimizer) or any(group["dampening"] for group, _ in _without_momentum(optimizer))


def start_momentum_(optimizer: Optimizer) -> None:
    """Gives fused SGD momentum buffers of zeros before its first step, which then does the same.

    torch allocates them uninitialised on the first step; if `found_inf` skips that step, the next one uses what lay
    in memory. With dampening the first step differs from those that follow, and the host decides on it.
    """
    for group, param in _without_momentum(optimizer):
        if group["fused"] and not group["dampening"]:
            optimizer.state[param]["momentum_buffer"] = torch.zeros_like(cast(Tensor, param.grad))


def _without_momentum(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], Tensor]]:
    for group in optimizer.param_groups if type(optimizer) is SGD else ():
        if group["momentum"] != 0:
            stepped = (p for p in group["params"] if p.grad is not None)
            yield from ((group, p) for p in stepped if optimizer.state.get(p, {}).get("momentum_buffer") is None)


def _all_fused(optimizer: Optimizer) -> bool:
    return all(group.get("fused") for group in optimizer.param_groups)


def found_inf(finite: Tensor) -> Tensor:
    """As GradScaler has it: 1 where not finite; float32."""
    return (~finite).float()


def fold_(optimizer: Optimizer, factor: Tensor | None, found: Tensor | None) -> None:
    """Has the next `step()` multiply by `factor` and skip where `found` is 1; None: it does not."""
    if found is not None:
        start_momentum_(optimizer)
    cast(Any, optimizer).grad_scale = _grad_scale(factor)
    cast(Any, optimizer).found_inf = found


def unfold_(optimizer: Optimizer) -> None:
    for name in _ATTRIBUTES:
        vars(optimizer).pop(name, None)


@contextmanager
def folded(optimizer: Optimizer, factor: Tensor | None, found: Tensor | None) -> Generator[None, None, None]:
    fold_(optimizer, factor, found)
    try:
        yield
    finally:
        unfold_(optimizer)


def _grad_scale(factor: Tensor | None) -> Tensor | None:
    # Where the host knows that it is 1, the kernel need not write the gradients back.
    if factor is None or (factor.device.type == "cpu" and factor.item() == 1):
        return None
    return factor.reciprocal().float()
