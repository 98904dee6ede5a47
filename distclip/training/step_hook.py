"""Clipping inside `optimizer.step()`, for training loops that are not the user's."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from distclip.decision import Decision
from distclip.report import Report
from distclip.torch_private import has_values, in_backward, outside_of_graphs
from distclip.training import folding, grad_scaler, optimizers, wrappers
from distclip.training.optimizers import HiddenGradients
from distclip.training.rounds import Change, Rounds


class Decide(Protocol):
    """Decides on the gradients that `stepped` is about to step; they still need `scale`."""

    def __call__(
        self,
        stepped: list[Optimizer],
        scale: Tensor | None,
        on_apply: Callable[[Tensor], None] | None = None,
        /,
    ) -> Decision: ...


class AttachedClipper:
    """What `Clipper.attach` returns.

    Attributes:
        report: of the latest step; None before the first.
    """

    report: Report | None = None

    def __init__(
        self,
        given: Sequence[Optimizer],
        scaler: GradScaler | None,
        decide: Decide,
        rounds: Rounds,
    ) -> None:
        self._hooks: list[StepHook] = []
        try:
            for handle in given:
                for optimizer in wrappers.unwrapped([handle]):
                    hook = StepHook(optimizer, handle, scaler, decide, rounds, self._set_report)
                    self._hooks.append(hook)
        except ValueError:
            self.remove()
            raise

    def remove(self) -> None:
        """Ends it. The optimizers are as they were before."""
        for hook in self._hooks:
            hook.remove()

    def _set_report(self, report: Report) -> None:
        self.report = report


class StepHook:
    """Clips in every step of one optimizer.

    A pre-hook clips, and a wrapper around `optimizer.step` leaves a step out, and restores what the
    step must not leave behind, also where it raises. The hook alone does the work where a framework
    has put a step of its own in the place of the wrapper (accelerate does, under a scaler). The
    wrapper alone does it for optimizers without hooks (schedule-free's).

    Args:
        handle: what the user holds: the optimizer, or a wrapper that passes steps on to it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        handle: Optimizer,
        scaler: GradScaler | None,
        decide: Decide,
        rounds: Rounds,
        set_report: Callable[[Report], None],
    ) -> None:
        self.optimizer = optimizer
        self._handle, self.scaler, self._decide = handle, scaler, decide
        self._rounds, self._set_report = rounds, set_report
        self._hidden = HiddenGradients()
        self._folded = False
        self._in_wrapper = False
        self._clipped = False  # in the step that runs now
        rounds.join(self)
        self._hooks: list[Any] = []
        if not wrappers.is_wrapper(optimizer):
            before, after = cast(Any, self._before), cast(Any, self._after)
            self._hooks = [
                optimizer.register_step_pre_hook(before),
                optimizer.register_step_post_hook(after),
            ]
        self._step_before = vars(optimizer).get("step")
        self._wrapper = _wrapped_step(optimizer, self._run)
        vars(optimizer)["step"] = self._wrapper
        self._removed = False

    def remove(self) -> None:
        """Ends it. The optimizer is as it was before."""
        self._removed = True
        for hook in self._hooks:
            hook.remove()
        if vars(self.optimizer).get("step") is self._wrapper:
            del vars(self.optimizer)["step"]
            if self._step_before is not None:
                vars(self.optimizer)["step"] = self._step_before
        self._rounds.leave(self)
        self._end()

    @outside_of_graphs
    def _run(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._removed:  # somebody has wrapped the wrapper
            return step(*args, **kwargs)
        self._in_wrapper = True
        try:
            if not self._hooks:
                args, kwargs = self._before_arguments(args, kwargs)
            return step(*args, **kwargs)
        except _LeftOut as left_out:
            if left_out.hook is not self:
                raise
            return left_out.result
        except BaseException:
            # A scaler takes away what it has set only where the step returns.
            optimizers.unfold_(self.optimizer)
            self._rounds.end()
            raise
        finally:
            self._in_wrapper = False
            self._end()

    def _before_arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        changed = self._before(self.optimizer, (self.optimizer, *args), kwargs)
        return (args, kwargs) if changed is None else (changed[0][1:], changed[1])

    @outside_of_graphs
    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._in_wrapper and self._clipped:
            return None  # torch calls the hooks again where a step calls `super().step()`
        self._hidden.forget()  # by a step that raised without the wrapper
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
            optimizers.unfold_(self.optimizer)
        if self._clipped:
            self._rounds.stepped()
        self._folded = self._clipped = False

    def _clipping(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, whose gradients are clipped after each evaluation."""
        is_first = True

        def clipping() -> Any:
            nonlocal is_first
            self._hidden.restore()
            loss = closure()
            self._rounds.end()
            with torch.no_grad():
                decision = self._decide([self.optimizer], None)
                decision.apply_()
                self._set_report(decision.report)
                # In later evaluations the step has done a part of its work.
                self._leave_out(decision.skip(False), loss, at_once=is_first)
            is_first = False
            return loss

        return clipping

    @torch.no_grad()
    def _clip(self) -> None:
        optimizer = self.optimizer
        if in_backward():
            self._check_covers()
        # GradScaler.step sets both, where it calls a fused optimizer or a wrapper of one.
        loss_scale, found_inf = (self._from_scaler(name) for name in ("grad_scale", "found_inf"))
        is_set = getattr(optimizer, "found_inf", None) is not None  # not on its wrapper
        together = cast("list[StepHook]", self._rounds.members())
        is_shared = len(together) > 1
        scaler = next((s for each in together if grad_scaler.is_used(s := each.scaler)), None)
        scaled = found_inf is not None or (is_shared and scaler is not None)
        decision, change = self._rounds.join_round(self) if is_shared else (None, Change.NONE)
        if scaler is None:
            self._check_scaled(decision, change, loss_scale)
        if is_first := decision is None:
            decision = self._decide_for(together, loss_scale, scaler if scaled else None)
        elif scaled and scaler is not None:
            grad_scaler.record(scaler, [optimizer], decision.found_inf)
        self._set_report(decision.report)
        skip = decision.skip(scaled)
        others = [each.optimizer for each in together if each is not self]
        factors = folding.factors([optimizer], decision, others)
        multiplies = optimizers.multiplies(optimizer)
        if multiplies:
            optimizers.fold_(optimizer, factors.get(id(optimizer)), skip)
            self._folded = not is_set  # a scaler takes away what it has set
        elif is_set:
            optimizers.fold_(optimizer, None, None)
        mine = {id(param) for param in wrappers.params_of([optimizer])}
        is_partial = is_shared and decision.in_grad  # the others clip their own
        if is_partial and not factors:
            decision.apply_(lambda p: p.grad if id(p) in mine else None, decision.scale)
        if is_first:
            if is_partial:
                decision.take_effect()
            else:
                decision.apply_without(mine if factors else ())
            self._rounds.begin(self, decision)
        if not multiplies:
            self._leave_out(skip, None, at_once=True)

    def _check_covers(self) -> None:
        """Raises ValueError where backward has not ended, and others are yet to be stepped."""
        stepped = {id(param) for param in wrappers.params_of([self.optimizer])}
        held = self._rounds.plan.params
        if any(each.param.requires_grad and id(each.param) not in stepped for each in held):
            raise ValueError(
                f"cannot clip in a step of {type(self.optimizer).__qualname__} that a hook calls "
                f"in backward: other parameters of the Clipper have no gradient yet, and the norm "
                f"would be that of the few that have one. Attach by "
                f"`clipper.attach_in_backward(optimizers)`."
            )

    def _from_scaler(self, name: str) -> Tensor | None:
        found = getattr(self.optimizer, name, None)
        return vars(self._handle).get(name) if found is None else found

    def _check_scaled(
        self, decision: Decision | None, change: Change, loss_scale: Tensor | None
    ) -> None:
        """Raises ValueError where a scaler is at work that nobody has passed."""
        differs = decision is not None and (decision.scale is None) != (loss_scale is None)
        if change is Change.UNCOUNTED or differs:
            raise ValueError(
                f"cannot clip the gradients of {type(self.optimizer).__qualname__} with the norm "
                f"that it shares with other optimizers: they were multiplied after that norm was "
                f"measured, as a GradScaler does that unscales those of each optimizer in its own "
                f"step. Pass the scaler: `clipper.attach(optimizer, scaler)` for each of them."
            )

    def _decide_for(
        self, together: Sequence[StepHook], loss_scale: Tensor | None, scaler: GradScaler | None
    ) -> Decision:
        stepped = [each.optimizer for each in together]
        scale = None if loss_scale is None else loss_scale.double().reciprocal()
        if scaler is None:
            return self._decide(stepped, scale)
        if len(stepped) > 1:
            scale = grad_scaler.unscale_unless_alike(scaler, stepped, scale)
        known = [
            each
            for each in stepped
            if each is self.optimizer or grad_scaler.stage_of(scaler, each) is OptState.UNSCALED
        ]
        return self._decide(stepped, scale, functools.partial(grad_scaler.record, scaler, known))

    def _leave_out(self, skip: Tensor | None, result: Any, at_once: bool) -> None:
        """Leaves the step out where `skip` is 1, and lets it return `result`."""
        if skip is None or not has_values(skip) or not bool(skip):
            return
        if self._in_wrapper and at_once:
            raise _LeftOut(self, result)
        self._hidden.hide(wrappers.params_of([self.optimizer]))


class _LeftOut(BaseException):
    """Leads from a hook out of the step; not an `Exception`, which others might catch."""

    def __init__(self, hook: StepHook, result: Any) -> None:
        super().__init__("the step is left out: the norm is not finite, or a policy vetoes it")
        self.hook, self.result = hook, result


def _wrapped_step(optimizer: Optimizer, run: Callable[..., Any]) -> Any:
    """`optimizer.step` inside `run`: a bound method, as torch's schedulers expect."""
    step = optimizer.step

    @functools.wraps(step)
    def wrapper(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return run(step, args, kwargs)

    return types.MethodType(wrapper, optimizer)
