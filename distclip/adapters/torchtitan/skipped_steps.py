"""Steps that torchtitan's optimizers leave out: the norm was not finite, or a policy vetoed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from distclip.training import optimizers, wrappers


class SkippedSteps:
    """Leaves out the next step of optimizers where a decision says so."""

    def __init__(self) -> None:
        self._found: Tensor | None = None
        self._optimizers: list[Optimizer] = []
        self._waiting: list[Optimizer] = []
        self._hidden = optimizers.HiddenGradients()
        self._hooks: list[Any] = []

    def register(self, stepped: Sequence[Optimizer]) -> None:
        self._optimizers = list(stepped)
        for each in stepped:
            self._hooks += [
                each.register_step_pre_hook(self._before),
                each.register_step_post_hook(self._after),
            ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.forget()

    def expect(self, found: Tensor) -> None:
        """The next step of each optimizer is left out where `found` is 1."""
        self._found, self._waiting = found, list(self._optimizers)

    def forget(self) -> None:
        """Ends it, after a step that did not come or has raised."""
        self._hidden.forget()
        if self._found is not None:
            for each in self._optimizers:
                optimizers.unfold_(each)
        self._found, self._waiting = None, []

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        if self._found is None or not any(optimizer is each for each in self._waiting):
            return
        self._waiting = [each for each in self._waiting if each is not optimizer]
        if optimizers.multiplies(optimizer):
            optimizers.fold_(optimizer, None, self._found)
        elif bool(self._found):
            self._hidden.hide(wrappers.params_of([optimizer]))

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        self._hidden.restore()
        if self._found is not None:
            optimizers.unfold_(optimizer)
