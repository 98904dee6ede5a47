"""`step()` of one AcceleratedOptimizer, after a clipper has decided on its gradients."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, cast

from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from distclip.decision import Decision
from distclip.training import grad_scaler, optimizers, wrappers


class DecidedStep:
    """Carries a decision into the next `optimizer.step()`; without one, a step is as it was.

    accelerate's step calls `scaler.step` and `scaler.update` itself: for a second optimizer the
    scaler has then forgotten that its gradients are unscaled, and would unscale them again and
    change the scale a second time. And it takes a step for done wherever the inner `step` was
    called, although a fused one may have been skipped on the device: learning-rate schedulers would
    go on.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self._decision: Decision | None = None
        self._factors: Mapping[int, Tensor | None] = {}
        self.is_due = False  # a call of the clipper that no step has followed
        self._before = vars(optimizer).get("step")
        self._wrapper = _bound(optimizer, self._run)
        vars(optimizer)["step"] = self._wrapper

    def follow(
        self, decision: Decision | None, factors: Mapping[int, Tensor | None] | None = None
    ) -> None:
        """Lets the next step do what was decided.

        Args:
            decision: None where it raised, but has unscaled the gradients for the scaler.
            factors: see `training.folding.factors`; the gradients of others are clipped already.
        """
        self._decision, self._factors, self.is_due = decision, factors or {}, True

    def remove(self) -> None:
        self._decision = None
        self._forget_skip()
        if vars(self.optimizer).get("step") is self._wrapper:
            del vars(self.optimizer)["step"]
            if self._before is not None:
                vars(self.optimizer)["step"] = self._before

    def _run(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        decision, self._decision, self.is_due = self._decision, None, False
        if decision is None:
            if self.optimizer.gradient_state.sync_gradients:
                self._forget_skip()
            return step(*args, **kwargs)
        inner = wrappers.unwrapped([self.optimizer])
        scaler: GradScaler | None = self.optimizer.scaler
        scaler = scaler if grad_scaler.is_on(scaler) else None
        skip = decision.skip(scaler is not None)
        result = None
        with ExitStack() as around:
            if scaler is not None:
                if any(grad_scaler.stage_of(scaler, each) is OptState.READY for each in inner):
                    grad_scaler.record(scaler, [self.optimizer], decision.found_inf)
                    around.enter_context(grad_scaler.keeping_scale(scaler))
                skip = grad_scaler.found_inf(scaler, inner)
            if not self._is_left_out(inner, scaler, skip):
                factors, skips = self._factors, skip is not None and all(map(_can_skip, inner))
                for each in inner:
                    if skips or id(each) in factors:
                        factor = factors.get(id(each))
                        around.enter_context(optimizers.folded(each, factor, skip))
                result = step(*args, **kwargs)
        if skip is not None:
            # Private: nothing public sets what `optimizer.step_was_skipped` returns, which
            # schedulers read. On an accelerator it is a tensor: nothing waits until it is read.
            self.optimizer._is_overflow = bool(skip) if skip.is_cpu else skip.bool()
        return result

    def _forget_skip(self) -> None:
        """accelerate writes whether a step was skipped only under a scaler."""
        if self.optimizer.scaler is None:
            self.optimizer._is_overflow = False

    def _is_left_out(
        self, inner: list[Optimizer], scaler: GradScaler | None, skip: Tensor | None
    ) -> bool:
        """Leaves the step out where it neither skips itself nor is skipped by the scaler."""
        on_device = all(map(_can_skip, inner))
        if scaler is not None:
            on_device = not any(map(optimizers.skips_wrongly, inner))
        if skip is None or on_device or not bool(skip):
            return False
        if scaler is not None:
            grad_scaler.mark_stepped(scaler, inner)
            scaler.update()
        return True


_can_skip = optimizers.multiplies


def _bound(optimizer: Any, run: Callable[..., Any]) -> Any:
    """A bound method, as torch's schedulers and pickle expect; copies get the class's own step."""
    before = optimizer.step

    @functools.wraps(before)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not optimizer:
            return cast(Any, type(self)).step(self, *args, **kwargs)
        return run(before, args, kwargs)

    return types.MethodType(step, optimizer)
