"""What torch's optimizers do with a gradient: which they step, and which multiply it themselves.

A fused kernel divides the gradient by `grad_scale`, and leaves the step out where `found_inf` is 1.
Given a `grad_scale`, it writes every gradient back.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from distclip.arguments import kind_of, shown
from distclip.decision import Decision
from distclip.torch_private import host_has_values
from distclip.training.wrappers import params_of

_FUSED = (Adam, AdamW, SGD, Adagrad)  # exactly these: a subclass may have a step of its own
_ATTRIBUTES = ("grad_scale", "found_inf")


def check_steps(optimizers: Sequence[Optimizer], closure: object | None) -> None:
    """Raises unless there is an optimizer to step; with a closure, exactly one."""
    if not optimizers:
        raise TypeError(
            "cannot step: no optimizer was given, so the gradients would be clipped, and the step "
            "would count for the policy, but no parameter would change. Pass the optimizer, "
            "`clipper.step(optimizer)`, or call `clipper.clip_()` if it steps elsewhere."
        )
    if closure is not None and len(optimizers) > 1:
        raise ValueError(
            f"cannot step {len(optimizers)} optimizers with one closure: each evaluates it as "
            f"often as it likes, and clips what it leaves behind for the others too. Call "
            f"`step(optimizer, closure=closure)` for each of them, with a Clipper of its own."
        )


def check_attached(optimizers: Sequence[Optimizer], given: Any) -> None:
    """Raises TypeError unless there is an optimizer to attach to."""
    if not optimizers:
        raise TypeError(
            f"cannot attach to optimizer={shown(given)}: it is {kind_of(given)}, which has no "
            f"steps to clip in. Pass an optimizer, or a list of several."
        )


def multiplies(optimizer: Optimizer) -> bool:
    """Whether `step()` divides every gradient by `grad_scale` and can skip by `found_inf`."""
    is_known = type(optimizer) in _FUSED and _all_fused(optimizer)
    return is_known and not skips_wrongly(optimizer)


def takes_factor(optimizers: Sequence[Optimizer], decision: Decision) -> bool:
    """Whether a factor in the fused steps costs no more than to multiply the gradients before.

    Where nothing is clipped, only the host can leave out a factor of 1, and it does not wait for an
    accelerator to know it. A factor that is needed anyway costs nothing more.
    """
    known = host_has_values(decision.total_norm) or all(map(_steps_on_cpu, optimizers))
    return known or decision.scale is not None


def reads_too_early(optimizer: Optimizer, device: torch.device) -> bool:
    """Whether a step under a GradScaler may read the flag that it copies from `device` too early.

    Fused Adam copies `grad_scale` and `found_inf` to the CPU without waiting for them.
    """
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    return device.type != "cpu" and is_fused and _steps_on_cpu(optimizer)


def _steps_on_cpu(optimizer: Optimizer) -> bool:
    """Whether parameters lie on a CPU, as under FSDP's CPU offload; all of them or some."""
    return any(p.is_cpu for p in params_of([optimizer]) if p.grad is not None)


def skips_wrongly(optimizer: Optimizer) -> bool:
    """Whether a fused step raises or leaves wrong state where `found_inf` skips it.

    The host must then decide. Groups that are not fused assert that there is no `found_inf`. The
    first step of SGD with momentum keeps an uninitialised buffer, which `start_momentum_` prevents
    unless there is dampening.
    """
    groups = optimizer.param_groups
    if type(optimizer) not in _FUSED or not any(group.get("fused") for group in groups):
        return False
    dampened = any(each.group["dampening"] for each in _without_momentum(optimizer))
    return dampened or not _all_fused(optimizer)


def start_momentum_(optimizer: Optimizer) -> None:
    """Gives fused SGD momentum buffers of zeros before its first step, which then does the same.

    torch allocates them uninitialised in the first step, and where `found_inf` skips that step the
    next one uses what was in memory. With dampening the first step differs from those that follow,
    and the host decides.
    """
    for group, param in _without_momentum(optimizer):
        if group["fused"] and not group["dampening"]:
            zeros = torch.zeros_like(cast(Tensor, param.grad))
            optimizer.state[param]["momentum_buffer"] = zeros


class _GroupAndParam(NamedTuple):
    group: dict[str, Any]
    param: Tensor


def _without_momentum(optimizer: Optimizer) -> Iterator[_GroupAndParam]:
    for group in optimizer.param_groups if type(optimizer) is SGD else ():
        for param in group["params"] if group["momentum"] != 0 else ():
            state = optimizer.state.get(param, {})
            if param.grad is not None and state.get("momentum_buffer") is None:
                yield _GroupAndParam(group, param)


def _all_fused(optimizer: Optimizer) -> bool:
    return all(group.get("fused") for group in optimizer.param_groups)


def fold_(optimizer: Optimizer, factor: Tensor | None, found: Tensor | None) -> None:
    """Makes the next `step()` multiply by `factor`, and skip where `found` is 1.

    Waits for both where parameters lie on a CPU: see `reads_too_early`.
    """
    if found is not None:
        start_momentum_(optimizer)
    if _steps_on_cpu(optimizer):
        # One number serves all devices: a copy from the CPU to an accelerator is safe.
        factor, found = (None if each is None else each.cpu() for each in (factor, found))
    cast(Any, optimizer).grad_scale = _grad_scale(factor)
    cast(Any, optimizer).found_inf = found


def unfold_(optimizer: Optimizer) -> None:
    for name in _ATTRIBUTES:
        vars(optimizer).pop(name, None)


@contextmanager
def folded(
    optimizer: Optimizer, factor: Tensor | None, found: Tensor | None
) -> Generator[None, None, None]:
    fold_(optimizer, factor, found)
    try:
        yield
    finally:
        unfold_(optimizer)


def _grad_scale(factor: Tensor | None) -> Tensor | None:
    # Where the host knows that it is 1, the kernel need not write the gradients back.
    if factor is None or (host_has_values(factor) and factor.item() == 1):
        return None
    return factor.reciprocal().float()


class HiddenGradients:
    """Gradients taken off their parameters: torch's optimizers step none without a gradient.

    For where a step cannot be left out as a whole.
    """

    def __init__(self) -> None:
        self._hidden: list[tuple[Tensor, Tensor]] = []

    def hide(self, params: Iterable[Tensor]) -> None:
        self._hidden = [(p, p.grad) for p in params if p.grad is not None]
        for param, _ in self._hidden:
            param.grad = None

    def forget(self) -> None:
        """Leaves them off."""
        self._hidden = []

    def restore(self) -> None:
        """Puts them back, except where a new gradient has been put meanwhile."""
        for param, grad in self._hidden:
            if param.grad is None:
                param.grad = grad
        self._hidden = []
