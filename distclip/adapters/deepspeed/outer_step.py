"""Clipping inside the step of DeepSpeed's optimizers, which prepare gradients for an inner one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from distclip.adapters.deepspeed.partitions import (
    Partition,
    inner_optimizers,
    loss_scale,
    wait_for_offload,
)
from distclip.decision import Decision
from distclip.report import Report
from distclip.training.optimizers import HiddenGradients


class Decide(Protocol):
    """`Clipper.decide`."""

    def __call__(self, *, scale: float | None) -> Decision: ...


class OuterStepHook:
    """Clips in every step of one of DeepSpeed's optimizers.

    The gradients are measured as the outer step begins, where all of them are known. The
    coefficient is applied as each inner step begins: only there are they in float32 and unscaled,
    and ZeRO-3 has one sub-group of them at a time.

    Attributes:
        weights: of each partition, the float32 weights of its slices. The clipper knows the
            gradients by them.
        report: of the latest step; None before the first.
    """

    report: Report | None = None

    def __init__(self, optimizer: Any, partitions: Sequence[Partition]) -> None:
        self.weights = [partition.weights() for partition in partitions]
        self._optimizer, self._partitions = optimizer, partitions
        self._addresses = [partition.stepped.data_ptr() for partition in partitions]
        self._gradients: dict[Tensor, Tensor | None] = {}  # by the weights, during `decide`
        self._decision: Decision | None = None  # during the outer step
        self._loss_scale = loss_scale(optimizer)  # that the decision is for
        self._hidden = HiddenGradients()

    def gradient(self, weights: Tensor) -> Tensor | None:
        """Where the gradient of `weights` lies as the outer step begins; for `Clipper`."""
        return self._gradients.get(weights)

    def register(self, decide: Decide) -> None:
        self._decide, self._is_registered = decide, True
        self._own_clip_grad: float = self._optimizer.clip_grad
        self._hooks: list[Any] = []
        for inner in inner_optimizers(self._optimizer):
            self._hooks.append(inner.register_step_pre_hook(cast(Any, self._before_inner)))
            self._hooks.append(inner.register_step_post_hook(cast(Any, self._after_inner)))
        self._step: Callable[..., Any] = self._optimizer.step
        self._optimizer.step = self._run

    def remove(self) -> None:
        """Ends it. The optimizer clips by its own rule again."""
        for hook in self._hooks:
            hook.remove()
        if vars(self._optimizer).get("step") == self._run:
            del self._optimizer.step
            if self._step != self._optimizer.step:  # somebody had replaced it before
                self._optimizer.step = self._step
        self._is_registered = False
        self._optimizer.clip_grad = self._own_clip_grad

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_registered:  # a wrapper of somebody else may go on calling this one
            self._measure()
        try:
            return self._step(*args, **kwargs)
        finally:
            self._decision = None
            self._hidden.restore()

    @torch.no_grad()
    def _measure(self) -> None:
        self._optimizer.clip_grad = 0.0  # load_checkpoint restores it
        wait_for_offload(self._optimizer)
        self._loss_scale = loss_scale(self._optimizer)
        for i, (partition, views) in enumerate(zip(self._partitions, self.weights, strict=True)):
            if self._addresses[i] != (address := partition.stepped.data_ptr()):
                self._addresses[i] = address  # offloading states has moved the weights
                for weights, current in zip(views, partition.weights(), strict=True):
                    weights.data = current
            self._gradients.update(zip(views, partition.gradients(), strict=True))
        try:
            scale = None if self._loss_scale == 1.0 else 1 / self._loss_scale
            self._decision = self._decide(scale=scale)
        finally:
            self._gradients.clear()
        self.report = self._decision.report

    @torch.no_grad()
    def _before_inner(self, inner: Optimizer, *_: Any) -> None:
        if self._decision is None:
            return
        params = {p for group in inner.param_groups for p in group["params"]}
        gradients: dict[Tensor, Tensor | None] = {}
        for partition, views in zip(self._partitions, self.weights, strict=True):
            if partition.stepped in params:
                gradients.update(zip(views, partition.stepped_gradients(), strict=True))
        # The engine has unscaled the gradients by the loss scale that it has *now*.
        growth = loss_scale(self._optimizer) / self._loss_scale
        scale = None if growth == 1.0 else growth
        self._decision.apply_(gradient=gradients.get, scale=scale)
        skip = self._decision.skip(False)
        if skip is not None and bool(skip):
            self._hidden.hide(params)

    def _after_inner(self, *_: Any) -> None:
        self._hidden.restore()
