"""Where the gradients of one `train()` are clipped: in its optimizer, or in DeepSpeed's engine."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from distclip.adapters import deepspeed
from distclip.adapters.accelerate import own_clipping
from distclip.adapters.frameworks import claim, release
from distclip.clipper import Clipper
from distclip.nonfinite import OnNonFinite
from distclip.policies import Policy
from distclip.report import Report
from distclip.training.wrappers import unwrapped

OWNER = "distclip.adapters.transformers"
_INSTEAD = "in your trainer (the norm is the `.report.total_norm` of the DistClip)"


class Clipping(Protocol):
    """The Trainer asks for the norm before the optimizer's step, and logs it after the step."""

    def before_step(self) -> None: ...

    def after_step(self) -> Report:
        """The report of the step."""
        ...

    def norm_to_log(self, *args: Any, **kwargs: Any) -> Tensor:
        """In the place of the Trainer's own norm, with its arguments."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, saved: dict[str, Any]) -> None: ...

    def end(self) -> None: ...


class InOptimizer:
    """Clips inside the steps of what accelerate has prepared; under a scaler before them.

    A scaler decides about a step before the optimizer's hooks run, and accelerate puts a step of
    its own in the place of the optimizer's. Ranks that decide alone would wait for each other.
    """

    def __init__(self, clipper: Clipper, optimizer: Optimizer, accelerator: Any) -> None:
        self._clipper, self._optimizer, self._accelerator = clipper, optimizer, accelerator
        scaler = accelerator.scaler
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._report: Report | None = None  # of the step that runs now
        self._norm: Tensor | None = None
        self._claimed: list[Optimizer] = []
        self._attached: Any = None
        try:
            for each in unwrapped([optimizer]):
                claim(each, OWNER)
                self._claimed.append(each)
            own_clipping.refuse(accelerator, clipper, OWNER, _INSTEAD)
            if self._scaler is None:
                self._attached = clipper.attach(optimizer)
        except BaseException:
            self.end()
            raise

    def before_step(self) -> None:
        self._report = None
        if self._attached is None:
            self._report = self._clipper.clip_(self._optimizer, scaler=self._scaler)
        else:
            self._attached.report = None

    def after_step(self) -> Report:
        report = self._report if self._attached is None else self._attached.report
        if report is None:
            raise RuntimeError(
                f"cannot clip in the step of this {type(self._optimizer).__qualname__}: it did "
                f"not call the step of the optimizer inside, which may have stepped during "
                f"backward. Choose an `optim` that steps after backward."
            )
        if self._norm is not None:
            self._norm.copy_(report.total_norm)
            self._norm = None
        return report

    def norm_to_log(self, *args: Any, **kwargs: Any) -> Tensor:
        """NaN until the step has filled it."""
        plan = self._clipper.plan
        self._norm = torch.full((), math.nan, dtype=plan.norm_dtype, device=plan.device)
        return self._norm

    def state_dict(self) -> dict[str, Any]:
        return self._clipper.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._clipper.load_state_dict(saved)

    def end(self) -> None:
        if self._attached is not None:
            self._attached.remove()
        for each in self._claimed:
            release(each)
        self._claimed = []
        own_clipping.allow(self._accelerator, self._clipper)


class InEngine:
    """Clips in the steps of a DeepSpeed engine, which accelerate takes during backward."""

    def __init__(
        self, engine: Any, policy: Policy[Any], on_nonfinite: OnNonFinite, tensor_norms: int
    ) -> None:
        every = tensor_norms or False
        self._handle = deepspeed.attach(engine, policy, on_nonfinite, tensor_norms=every)
        self.end = self._handle.detach
        self.state_dict = self._handle.state_dict
        self.load_state_dict = self._handle.load_state_dict

    def before_step(self) -> None:
        """The step has been taken."""

    def after_step(self) -> Report:
        assert self._handle.report is not None
        return self._handle.report

    def norm_to_log(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.after_step().total_norm
