"""What `prepare` returns."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from distclip.adapters.accelerate import checkpoints, own_clipping
from distclip.adapters.accelerate.optimizer_step import DecidedStep
from distclip.adapters.frameworks import claim, release
from distclip.clipper import Clipper
from distclip.decision import Decision
from distclip.errors import NonFiniteGradientError
from distclip.report import Report
from distclip.training import folding, grad_scaler, wrappers
from distclip.training.dead_hooks import remove_dead, remove_later

_OWNER = "distclip.adapters.accelerate"
_INSTEAD = "(the norm is `clipper.report.total_norm`), or end the other by `clipper.detach()`"

# All clippers that are in use, to find those whose accelerator has been freed.
_living: weakref.WeakSet[AcceleratedClipper] = weakref.WeakSet()


class AcceleratedClipper:
    """What `prepare` returns.

    Attributes:
        report: of the latest step; None before the first.
    """

    def __init__(self, accelerator: Any, clipper: Any, given: Sequence[Any]) -> None:
        self._accelerator, self._clipper = accelerator, clipper
        # Private, and a new list after `free_memory()`: nothing public says that it was called.
        self._prepared_with: list[Any] = accelerator._optimizers
        self._report: Report | None = None
        self._optimizers = list(given)
        self._is_attached = True
        self._steps: list[DecidedStep] = []
        self._end = self._begin()
        _living.add(self)

    def _begin(self) -> Callable[[], Any]:
        """Sets up everything outside of the clipper; returns what ends it."""
        remove_dead()
        claimed: list[Optimizer] = []
        try:
            for each in wrappers.unwrapped(self._optimizers):
                claim(each, _OWNER)
                claimed.append(each)
        except ValueError:
            _release_all(claimed)
            raise
        self._steps = [DecidedStep(each) for each in self._optimizers]
        own_clipping.refuse(self._accelerator, self._clipper, _OWNER, _INSTEAD)
        hooks = self._register_state(weakref.ref(self))
        clipper = weakref.ref(self._clipper)
        # Also where the user drops the clipper: nothing else holds it.
        end = weakref.finalize(
            self, _end, self._accelerator, clipper, claimed, list(self._steps), hooks
        )
        end.atexit = False
        return end

    def _register_state(self, find: Callable[[], AcceleratedClipper | None]) -> list[Any]:
        others = {o.index for o in _living if o._accelerator is self._accelerator}
        self.index = next(i for i in range(len(others) + 1) if i not in others)
        return checkpoints.register(self._accelerator, find, self.index)

    @property
    def report(self) -> Report | None:
        return self._report

    def clip_(self, scale: float | Tensor | None = None, step: int | None = None) -> Report | None:
        """Scales the gradients in place. Call it after backward and before `optimizer.step()`.

        While accelerate accumulates gradients (`not accelerator.sync_gradients`) it does nothing
        and returns None, on every rank. Under a scaler the gradients are unscaled as well, unless
        `accelerator.unscale_gradients` was called before; an overflow on any rank makes
        `optimizer.step()` skip on all. It skips as well where `on_nonfinite="skip"` says so.

        Under DeepSpeed `accelerator.backward` has clipped and stepped already: this returns the
        report of that step.

        Args:
            scale, step: as `Clipper.clip_` has them; not under DeepSpeed.

        Raises:
            RuntimeError: the clipper was detached; or, under a scaler, no `optimizer.step()` has
                followed the last call.
            LayoutError, NonFiniteGradientError, ValueError, TypeError: as `Clipper.clip_`.

        Collective: as `Clipper.clip_`; none where it does nothing.
        """
        self._check_attached()
        if not self._accelerator.sync_gradients:
            return None
        decision = self._decide(scale, step)
        decision.apply_()
        for each in self._steps:
            each.follow(decision)
        self._report = decision.report
        return self._report

    def step(
        self,
        scale: float | Tensor | None = None,
        closure: Callable[[], Any] | None = None,
        step: int | None = None,
    ) -> Report | None:
        """`clip_()`, and `optimizer.step()` of each optimizer: leave out your own calls.

        While accelerate accumulates gradients it does nothing and returns None, on every rank.
        Fused optimizers get the coefficient and the loss scale as one number, and nothing else
        writes the gradients. Under a scaler accelerate's step calls `scaler.step` and
        `scaler.update`. `optimizer.step_was_skipped` says whether a step was left out.

        Args, Raises, Collective: as `clip_`. A closure is evaluated and clipped as `Clipper.step`
            has it.
        """
        self._check_attached()
        if not self._accelerator.sync_gradients:
            return None
        if closure is not None:
            scaler = self._accelerator.scaler
            self._report = self._clipper.step(self._optimizers, scaler, scale, closure, step)
            return self._report
        decision = self._decide(scale, step)
        inner = wrappers.unwrapped(self._optimizers)
        with torch.no_grad():
            factors = folding.factors(inner, decision)
            decision.apply_without(folding.stepped_by(inner, factors))
        self._report = decision.report
        for each in self._steps:
            each.follow(decision, factors)
        for each in self._optimizers:
            each.step()
        return self._report

    def state_dict(self) -> dict[str, Any]:
        """What the policy remembers, the same on every rank; `save_state` saves it already."""
        return self._clipper.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, on any number of ranks; `load_state` does so.

        Raises:
            ValueError: a state of another policy or of other parameters. Nothing is loaded then.
        """
        self._clipper.load_state_dict(saved)

    def detach(self) -> None:
        """Ends it: the accelerator and the optimizers are as they were."""
        self._is_attached = False
        _living.discard(self)
        self._end()
        remove_dead()

    def detach_if_freed(self) -> None:
        """Detaches where `accelerator.free_memory()` was called since it was made."""
        if self._accelerator._optimizers is not self._prepared_with:
            self.detach()

    def _check_attached(self) -> None:
        if not self._is_attached:
            raise RuntimeError(
                "cannot clip: this clipper was detached, by `detach()` or because others were "
                "prepared after `accelerator.free_memory()`, and the gradients would stay as they "
                "are. Call `distclip.adapters.accelerate.prepare` again."
            )

    def _decide(self, scale: float | Tensor | None, step: int | None) -> Decision:
        scaler = self._accelerator.scaler
        if grad_scaler.is_used(scaler):
            if any(each.is_due for each in self._steps):
                raise RuntimeError(
                    "cannot clip again: the last call has unscaled the gradients, and until "
                    "`optimizer.step()` the GradScaler takes them for unscaled, also those of a "
                    "new backward. Call `optimizer.step()` after each `clip_()`: it skips after an "
                    "overflow."
                )
            inner = wrappers.unwrapped(self._optimizers)
            if _holds_a_part(self._clipper, inner):
                # The scaler has one state for all that an optimizer steps.
                grad_scaler.unscale_unless_alike(scaler, inner, None)
        try:
            return self._clipper.decide(self._optimizers, scaler, scale, step)
        except NonFiniteGradientError:
            for each in self._steps:
                each.follow(None)
            raise


def detach_freed() -> None:
    """Detaches the clippers whose accelerator has been freed since."""
    for clipper in list(_living):
        clipper.detach_if_freed()


def _end(
    accelerator: Any,
    clipper: Callable[[], Clipper | None],
    claimed: Sequence[Optimizer],
    steps: Sequence[DecidedStep],
    hooks: Sequence[Any],
) -> None:
    for each in steps:
        each.remove()
    remove_later(hooks)
    _release_all(claimed)
    own_clipping.allow(accelerator, clipper())


def _release_all(claimed: Sequence[Optimizer]) -> None:
    for each in claimed:
        release(each)


def _holds_a_part(clipper: Clipper, inner: Sequence[Optimizer]) -> bool:
    """Whether the optimizers step everything that the clipper holds, and train more."""
    held = {id(param.param) for param in clipper.plan.params if param.param.requires_grad}
    stepped = {id(p) for p in wrappers.params_of(inner) if p.requires_grad or p.grad is not None}
    return held < stepped
