"""What torch's optimizers do with a gradient: which they step, and which multiply it themselves.

A fused kernel divides the gradient by `grad_scale`, and leaves the step out where `found_inf` is 1.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from distclip.norms.plan import Plan
from distclip.norms.reduce import gather_objects, rank_group
from distclip.training.wrappers import params_of

_FUSED = (Adam, AdamW, SGD, Adagrad)  # exactly these: a subclass may have a step of its own
_ATTRIBUTES = ("grad_scale", "found_inf")


def fold(optimizers: Sequence[Optimizer], plan: Plan) -> bool:
    """Whether these multiply all gradients of the plan, and no other, by one factor."""
    planned = {id(p.param) for p in plan.params if p.param.grad is not None}
    stepped = {id(p) for p in params_of(optimizers) if p.grad is not None}
    return planned == stepped and all(map(multiplies, optimizers))


def folds_its_own(optimizer: Optimizer, plan: Plan) -> bool:
    """Whether an optimizer multiplies gradients of the plan alone by one factor."""
    planned = {id(p.param) for p in plan.params}
    return planned.issuperset(map(id, params_of([optimizer]))) and multiplies(optimizer)


def multiplies(optimizer: Optimizer) -> bool:
    """Whether `step()` divides every gradient by `grad_scale` and can skip by `found_inf`."""
    is_known = type(optimizer) in _FUSED and _all_fused(optimizer)
    return is_known and not skips_wrongly(optimizer)


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
    """Makes the next `step()` multiply by `factor`, and skip where `found` is 1."""
    if found is not None:
        start_momentum_(optimizer)
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
    if factor is None or (factor.device.type == "cpu" and factor.item() == 1):
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


class CheckedOptimizers:
    """The optimizers that are known to step what a plan holds; keeps none of them alive."""

    def __init__(self) -> None:
        self._checked: list[tuple[weakref.ref[Optimizer], ...]] = []

    def check(self, optimizers: Sequence[Optimizer], plan: Plan) -> None:
        """Raises ValueError, on every rank, unless these step what the plan holds and nothing else.

        Collective: the first time with these optimizers, an all-gather of a short text.
        """
        known = [[ref() for ref in refs] for refs in self._checked]
        if list(optimizers) in known:
            return
        for rank, found in gather_objects(_difference(optimizers, plan), rank_group(plan)).items():
            if found is not None:
                raise ValueError(
                    f"cannot unscale and clip together: on rank {rank} {found}. Some gradients "
                    f"would be left scaled, or be unscaled although the scaler does not know it. "
                    f"Pass all optimizers of the parameters that the Clipper holds, "
                    f"`[first, second]`; or call `scaler.unscale_(optimizer)` for each before."
                )
        alive = zip(self._checked, known, strict=True)
        self._checked = [refs for refs, each in alive if None not in each]
        self._checked.append(tuple(map(weakref.ref, optimizers)))


def _difference(optimizers: Sequence[Optimizer], plan: Plan) -> str | None:
    stepped, planned = {id(p) for p in params_of(optimizers)}, {id(p.param) for p in plan.params}
    left = [p.name for p in plan.params if p.param.requires_grad and id(p.param) not in stepped]
    if left:
        return f"no optimizer given steps {left[0]!r}"
    if others := stepped - planned:
        return f"{len(others)} parameters of the optimizer are not the Clipper's"
    return None
