"""What `prepare` returns under DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from distclip.adapters import deepspeed
from distclip.adapters.accelerate.handle import AcceleratedClipper
from distclip.report import Report


class EngineClipper(AcceleratedClipper):
    """Under DeepSpeed, whose engine steps in `accelerator.backward`."""

    def __init__(self, accelerator: Any, handle: deepspeed.Handle) -> None:
        super().__init__(accelerator, handle, [])

    def _begin(self) -> Callable[[], Any]:
        # The engine holds the handle, and clips whether somebody keeps the clipper or not.
        hooks = self._register_state(lambda: self)

        def end() -> None:
            for hook in hooks:
                hook.remove()
            hooks.clear()
            self._clipper.detach()

        return end

    def detach(self) -> None:
        if self._is_attached:
            super().detach()

    @property
    def report(self) -> Report | None:
        return self._clipper.report

    def clip_(self, scale: float | Tensor | None = None, step: int | None = None) -> Report | None:
        self._check_attached()
        if scale is not None or step is not None:
            raise ValueError(
                "cannot scale or count this step under DeepSpeed: `accelerator.backward` has "
                "clipped and stepped already. Multiply the loss by `scale` before backward, and "
                "leave out `step`."
            )
        return self.report if self._accelerator.sync_gradients else None

    def step(
        self,
        scale: float | Tensor | None = None,
        closure: Callable[[], Any] | None = None,
        step: int | None = None,
    ) -> Report | None:
        if closure is not None:
            raise ValueError(
                "cannot evaluate a closure under DeepSpeed: `accelerator.backward` has stepped "
                "already. Leave out `closure`."
            )
        return self.clip_(scale, step)
