"""What torch's optimizers do with a gradient: which they step, and which multiply it themselves.

A fused kernel divides the gradient by `grad_scale`, and leaves the step out where `found_inf` is 1.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from distclip.arguments import kind_of, shown
from distclip.norms.plan import Plan
from distclip.sharding.layout import LocalParam
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


class CheckedOptimizers:
    """What the optimizers given so far step beside what a Clipper holds; keeps none of them alive.

    Optimizers get parameters during training (`add_param_group`), and parameters are unfrozen.
    """

    def __init__(self) -> None:
        self._seen: list[_Seen] = []

    def look_again(self) -> None:
        """Call it when the Clipper holds other parameters than before."""
        for each in self._seen:
            each.stepped = None

    def new_params(
        self, optimizers: Sequence[Optimizer], params: Sequence[LocalParam], scaled: bool
    ) -> list[Tensor]:
        """The parameters that these optimizers have begun to step since they were seen first.

        Only where they stepped nothing but the Clipper's parameters at that time: a Clipper may
        hold a part of what an optimizer steps.

        Args:
            params: those that the Clipper holds.
            scaled: the gradients still need a factor, so that all must be held.

        Raises:
            ValueError: gradients would be left scaled, or be unscaled although a scaler does not
                know it.
        """
        stepped = params_of(optimizers)
        seen = next((each for each in self._seen if each.is_of(optimizers)), None)
        if seen is None or not seen.is_same(stepped):
            held = {id(param.param) for param in params}
            others = [param for param in stepped if id(param) not in held]
            covers = seen.covers if seen is not None else not any(map(_is_trained, others))
            self._seen = [each for each in self._seen if each.is_alive() and each is not seen]
            self._seen.append(
                seen := _Seen(tuple(map(weakref.ref, optimizers)), stepped, others, covers)
            )
        trained = [param for param in seen.others if _is_trained(param)]
        if trained and seen.covers:
            return trained
        if trained:
            _check_replaced(trained, stepped, params)
        if scaled:
            _check_same(trained, stepped, params)
        return []


@dataclass
class _Seen:
    """The optimizers of one call, and the parameters that they stepped.

    Attributes:
        stepped: None where they have to be compared with the Clipper's again.
        others: those that the Clipper does not hold.
        covers: when they were seen first, the Clipper held all that they trained.
    """

    optimizers: tuple[weakref.ref[Optimizer], ...]
    stepped: list[Tensor] | None
    others: list[Tensor]
    covers: bool

    def is_of(self, optimizers: Sequence[Optimizer]) -> bool:
        same_number = len(optimizers) == len(self.optimizers)
        return same_number and all(
            ref() is o for ref, o in zip(self.optimizers, optimizers, strict=True)
        )

    def is_alive(self) -> bool:
        return all(ref() is not None for ref in self.optimizers)

    def is_same(self, stepped: Sequence[Tensor]) -> bool:
        known = self.stepped
        return known is not None and len(stepped) == len(known) and all(map(is_, stepped, known))


def unheld_gradient(optimizers: Sequence[Optimizer]) -> ValueError | None:
    """The error where these step gradients, and none of what a Clipper holds has one."""
    param = next((param for param in params_of(optimizers) if param.grad is not None), None)
    return None if param is None else _replaced(param)


def _check_replaced(
    others: Sequence[Tensor], stepped: Sequence[Tensor], params: Sequence[LocalParam]
) -> None:
    """Raises ValueError where an optimizer steps a parameter in the place of one that is held."""
    ids = {id(param) for param in stepped}
    left = [p.param for p in params if p.param.grad is None and id(p.param) not in ids]
    shapes = {param.shape for param in left if param.requires_grad}
    for other in others:
        if other.grad is not None and other.shape in shapes:
            raise _replaced(other)


def _replaced(param: Tensor) -> ValueError:
    return ValueError(
        f"cannot clip: the optimizer steps a parameter of shape {list(param.shape)} that the "
        f"Clipper does not hold, and what it holds instead has no gradient: others have taken the "
        f"places of those that the Clipper was made with (fully_shard, FSDP, parallelize_module, "
        f"`load_state_dict(assign=True)`). Make the Clipper after the model has been wrapped, or "
        f"pass the module instead of a list."
    )


def _is_trained(param: Tensor) -> bool:
    return param.requires_grad or param.grad is not None


def _check_same(
    others: Sequence[Tensor], stepped: Sequence[Tensor], params: Sequence[LocalParam]
) -> None:
    ids = {id(param) for param in stepped}
    left = [p.name for p in params if p.param.requires_grad and id(p.param) not in ids]
    if not left and not others:
        return
    if left:
        found = f"no optimizer given steps {left[0]!r}"
    else:
        shape = list(others[0].shape)
        found = f"{len(others)} parameters of the optimizer are not the Clipper's (shape {shape})"
    raise ValueError(
        f"cannot unscale and clip together: {found}. Some gradients would be left scaled, or be "
        f"unscaled although the scaler does not know it. Pass all optimizers of the parameters "
        f"that the Clipper holds, `[first, second]`; or call `scaler.unscale_(optimizer)` for each "
        f"before."
    )
