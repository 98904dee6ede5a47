"""Clipping inside `optimizer.step()`, for loops that are not the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from distclip.report import Report
from distclip.step import Decision, report_of, write_
from distclip.training import fused
from distclip.training import grad_scaler as amp

if TYPE_CHECKING:
    from distclip.clipper import Clipper


class StepHook:
    """The hooks of one clipper on one optimizer; see `Clipper.attach`.

    Attributes:
        report: of the latest step; None before the first.
    """

    report: Report | None = None

    def __init__(self, clipper: Clipper, optimizer: Optimizer, scaler: GradScaler | None) -> None:
        self._clipper, self._optimizer, self._scaler = clipper, optimizer, scaler
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._folded = False
        self._running: FrameType | None = None  # of the step that called the hook, and not of one inside it
        before, after = cast(Any, self._before), cast(Any, self._after)
        self._hooks = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def remove(self) -> None:
        """Ends it; the optimizer is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._end()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        caller = _caller_of_hook()
        if self._running is not None and _is_inside(caller, self._running):
            return None  # a step that calls `super().step()` has the hooks called twice
        self._end()  # of a step that raised
        self._running = caller
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._clip()
            return None
        return args[:1], {**kwargs, "closure": self._clipped(closure)}

    def _after(self, *_: Any) -> None:
        if _caller_of_hook() is self._running:
            self._end()

    def _end(self) -> None:
        self._show()
        if self._folded:
            fused.unfold_(self._optimizer)
        self._folded, self._running = False, None

    def _clipped(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def clipped() -> Any:
            self._show()
            loss = closure()
            with torch.no_grad():
                self._clip_in_place(self._clipper.decide([], None), scaled=False)
            return loss

        return clipped

    @torch.no_grad()
    def _clip(self) -> None:
        optimizer, clipper = self._optimizer, self._clipper
        # Set by GradScaler.step, if this is called from there.
        scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        scaled = found_inf is not None
        inverse = None if scale is None else cast(Tensor, scale).double().reciprocal()
        decision = clipper.decide([optimizer], None, inverse)
        amp.record(self._scaler if scaled else None, [optimizer], decision.finite)
        if clipper.folds([optimizer]):
            fused.fold_(optimizer, decision.factor, clipper.found_inf(decision, scaled))
            self._folded = not scaled  # the scaler takes its attributes away itself
            self.report = report_of(decision)
            return
        if scaled:
            fused.fold_(optimizer, None, None)
        self._clip_in_place(decision, scaled)

    def _clip_in_place(self, decision: Decision, scaled: bool) -> None:
        write_(decision)
        found_inf = self._clipper.found_inf(decision, scaled)
        if found_inf is not None and bool(found_inf):
            self._hide()
        self.report = report_of(decision)

    def _hide(self) -> None:
        """Nothing inside `step()` can leave the step out, but an optimizer steps no parameter without a gradient."""
        params = (p for group in self._optimizer.param_groups for p in group["params"])
        self._hidden = [(p, p.grad) for p in params if p.grad is not None]
        for param, _ in self._hidden:
            param.grad = None

    def _show(self) -> None:
        for param, grad in self._hidden:
            param.grad = grad
        self._hidden = []


def _caller_of_hook() -> FrameType | None:
    frame = inspect.currentframe()
    hook = frame.f_back if frame is not None else None
    return hook.f_back if hook is not None else None


def _is_inside(frame: FrameType | None, outer: FrameType) -> bool:
    while frame is not None and frame is not outer:
        frame = frame.f_back
    return frame is outer
