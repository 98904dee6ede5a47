"""Clipping inside `optimizer.step()`, for training loops that are not the user's."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from distclip.report import Report
from distclip.step import Decision
from distclip.torch_private import outside_of_graphs
from distclip.training import grad_scaler, optimizers
from distclip.training.optimizers import HiddenGradients


class Decide(Protocol):
    """Decides on the gradients that `stepped` is about to step; they still need `scale`."""

    def __call__(
        self,
        stepped: list[Optimizer],
        scale: Tensor | None,
        on_apply: Callable[[Tensor], None] | None = None,
        /,
    ) -> Decision: ...


class StepHook:
    """Clips in every step of one optimizer; see `Clipper.attach`.

    A pre-hook clips, and a wrapper around `optimizer.step` restores what the step must not leave
    behind, also where it raises. The hook alone does the work because a framework may put a step
    of its own in the place of the wrapper (accelerate does, under a scaler); what a raising step
    left behind is then restored by the next one.

    Attributes:
        report: of the latest step; None before the first.
    """

    report: Report | None = None

    def __init__(self, optimizer: Optimizer, scaler: GradScaler | None, decide: Decide) -> None:
        self._optimizer, self._scaler, self._decide = optimizer, scaler, decide
        self._hidden = HiddenGradients()
        self._folded = False
        self._in_wrapper = False
        self._clipped = False  # in the step that runs now
        before, after = cast(Any, self._before), cast(Any, self._after)
        self._hooks = [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]
        self._step_before = vars(optimizer).get("step")
        self._wrapper = _wrapped_step(optimizer, self._run)
        vars(optimizer)["step"] = self._wrapper

    def remove(self) -> None:
        """Ends it. The optimizer is as it was before."""
        for hook in self._hooks:
            hook.remove()
        if vars(self._optimizer).get("step") is self._wrapper:
            del vars(self._optimizer)["step"]
            if self._step_before is not None:
                vars(self._optimizer)["step"] = self._step_before
        self._end()

    @outside_of_graphs
    def _run(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._in_wrapper = True
        try:
            return step(*args, **kwargs)
        finally:
            self._in_wrapper = False
            self._end()

    @outside_of_graphs
    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._in_wrapper and self._clipped:
            return None  # torch calls the hooks again where a step calls `super().step()`
        self._end()
        self._clipped = True
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._clip()
            return None
        return args[:1], {**kwargs, "closure": self._clipping(closure)}

    @outside_of_graphs
    def _after(self, *_: Any) -> None:
        if not self._in_wrapper:
            self._end()

    def _end(self) -> None:
        self._hidden.restore()
        if self._folded:
            optimizers.unfold_(self._optimizer)
        self._folded = self._clipped = False

    def _clipping(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, whose gradients are clipped after each evaluation."""

        def clipping() -> Any:
            self._hidden.restore()
            loss = closure()
            with torch.no_grad():
                self._apply(self._decide([], None), scaled=False)
            return loss

        return clipping

    @torch.no_grad()
    def _clip(self) -> None:
        optimizer: Any = self._optimizer
        # GradScaler.step sets both, where it calls a fused optimizer.
        loss_scale, found_inf = (getattr(optimizer, n, None) for n in ("grad_scale", "found_inf"))
        scaled = found_inf is not None
        scale = None if loss_scale is None else cast(Tensor, loss_scale).double().reciprocal()
        on_apply = None
        if scaled and self._scaler is not None and self._scaler.is_enabled():
            on_apply = functools.partial(grad_scaler.record, self._scaler, [optimizer])
        decision = self._decide([optimizer], scale, on_apply)
        if decision.has_one_factor and optimizers.fold([optimizer], decision.plan):
            optimizers.fold_(optimizer, decision.factor, decision.skip(scaled))
            decision.take_effect()
            self._folded = not scaled  # the scaler takes its attributes away itself
            self.report = decision.report
            return
        if scaled:
            optimizers.fold_(optimizer, None, None)
        self._apply(decision, scaled)

    def _apply(self, decision: Decision, scaled: bool) -> None:
        decision.apply_()
        skip = decision.skip(scaled)
        if skip is not None and decision.is_known_nonfinite:
            self._hidden.hide(_params(self._optimizer))
        self.report = decision.report


def _params(optimizer: Optimizer) -> Iterable[Tensor]:
    return (param for group in optimizer.param_groups for param in group["params"])


def _wrapped_step(optimizer: Optimizer, run: Callable[..., Any]) -> Any:
    """`optimizer.step` inside `run`: a bound method, as torch's schedulers expect."""
    step = optimizer.step

    @functools.wraps(step)
    def wrapper(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return run(step, args, kwargs)

    return types.MethodType(wrapper, optimizer)
