"""`prepare`: a policy on what one `Accelerator` has prepared."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from distclip.adapters import deepspeed
from distclip.adapters.accelerate import checkpoints, own_clipping
from distclip.adapters.accelerate.optimizer_step import DecidedStep
from distclip.adapters.frameworks import Framework, claim, import_framework, release
from distclip.clipper import Clipper
from distclip.decision import Decision
from distclip.nonfinite import OnNonFinite
from distclip.policies import ClipNorm, Policy
from distclip.report import Report
from distclip.sharding.layout import LayoutFunction
from distclip.training import grad_scaler, optimizers, wrappers
from distclip.training.wrappers import Optimizers

ACCELERATE = Framework("accelerate", "1.15.0", "1.15.0", install="'distclip[accelerate]'")
_OWNER = "distclip.adapters.accelerate"
_accelerate = import_framework(ACCELERATE, "accelerate")
_Accelerated = import_framework(ACCELERATE, "accelerate.optimizer").AcceleratedOptimizer

# All clippers that are in use, to find those whose accelerator has been freed.
_living: weakref.WeakSet[AcceleratedClipper] = weakref.WeakSet()


def prepare(
    accelerator: Any,
    model: Any,
    optimizer: Optimizers,
    policy: Policy[Any] = ClipNorm(1.0),  # noqa: B008 - frozen
    *,
    mesh: DeviceMesh | None = None,
    distinct: Sequence[str] = ("pp",),
    layouts: LayoutFunction | None = None,
    gradient: Callable[[Tensor], Tensor | None] | None = None,
    on_nonfinite: OnNonFinite = "propagate",
    max_consecutive_skips: int = 20,
    overlap: bool = False,
    symmetric_memory: bool = False,
) -> AcceleratedClipper:
    """A clipper for what `accelerator.prepare` returned: call this after it, once for each model.

    `clipper.clip_()` stands where `accelerator.clip_grad_norm_` stood, and `clipper.step()` in
    place of that and `optimizer.step()`. Until `clipper.detach()`, the accelerator's own methods
    raise for the parameters that it clips, and `save_state` and `load_state` include what the
    policy remembers.

    Args:
        accelerator: an `accelerate.Accelerator`.
        model: what `accelerator.prepare` returned; or any of its parameters, or parameter groups,
            as `Clipper` takes them, under FSDP too.
        optimizer: what `accelerator.prepare` returned, or a list of all that step these parameters.
        policy, mesh, distinct, layouts, gradient, on_nonfinite, max_consecutive_skips, overlap,
            symmetric_memory: as `Clipper` has them. Under DeepSpeed, `policy` and `on_nonfinite`.

    Raises:
        ValueError: accelerate has not prepared the model or the optimizer; the optimizer steps none
            of the parameters; its gradients are clipped by distclip already; accelerate runs
            Megatron-LM, XLA or LOMO, which keep no gradients that could be clipped here.
        TypeError: `accelerator` is no Accelerator.
        LayoutError, ValueError, TypeError: as `Clipper`, or `adapters.deepspeed.attach`.

    Collective: as `Clipper`; under DeepSpeed as `adapters.deepspeed.attach`.
    """
    _check_accelerator(accelerator)
    for other in list(_living):
        other.detach_if_freed()
    options: dict[str, Any] = {
        "mesh": mesh,
        "distinct": tuple(distinct) if isinstance(distinct, list) else distinct,
        "layouts": layouts,
        "gradient": gradient,
        "max_consecutive_skips": max_consecutive_skips,
        "overlap": overlap,
        "symmetric_memory": symmetric_memory,
    }
    if accelerator.distributed_type == _accelerate.DistributedType.DEEPSPEED:
        _check_engine(accelerator, model, options)
        return EngineClipper(accelerator, deepspeed.attach(model, policy, on_nonfinite))
    given = wrappers.list_optimizers(optimizer)
    _check_optimizers(accelerator, given)
    # `_models` is private: nothing public says what was prepared, and FSDP1 keeps there how its
    # parameters are sharded.
    clipper = Clipper(
        model, policy, on_nonfinite=on_nonfinite, modules=accelerator._models, **options
    )
    _check_prepared(accelerator, clipper)
    for each in given:
        wrappers.check_wrapped(each, clipper.plan)
    return AcceleratedClipper(accelerator, clipper, given)


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
        claimed: list[Optimizer] = []
        try:
            for each in wrappers.unwrapped(self._optimizers):
                claim(each, _OWNER)
                claimed.append(each)
        except ValueError:
            _release_all(claimed)
            raise
        self._steps = [DecidedStep(each) for each in self._optimizers]
        own_clipping.refuse(self._accelerator, self._clipper)
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
            each.follow(decision, multiplies=False)
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
        folds = decision.has_one_factor and optimizers.fold(inner, decision.plan)
        multiplies = folds and optimizers.takes_factor(inner, decision)
        with torch.no_grad():
            decision.take_effect() if multiplies else decision.apply_()
        self._report = decision.report
        for each in self._steps:
            each.follow(decision, multiplies)
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
        return self._clipper.decide(self._optimizers, scaler, scale, step)


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


def _end(
    accelerator: Any,
    clipper: Callable[[], Clipper | None],
    claimed: Sequence[Optimizer],
    steps: Sequence[DecidedStep],
    hooks: Sequence[Any],
) -> None:
    for removable in (*steps, *hooks):
        removable.remove()
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


def _check_accelerator(accelerator: Any) -> None:
    if not isinstance(accelerator, _accelerate.Accelerator):
        raise TypeError(
            f"cannot prepare for accelerator={type(accelerator).__qualname__}: it is no "
            f"accelerate.Accelerator, and only that knows when gradients are synchronised. Pass "
            f"the accelerator first: `prepare(accelerator, model, optimizer, policy)`."
        )
    kind = accelerator.distributed_type
    other = {
        "MEGATRON_LM": "use `distclip.adapters.megatron` on its optimizer",
        "XLA": "clip by the accelerator's own method",
    }.get(str(kind.value))
    if other is not None or accelerator.has_lomo_optimizer:
        name = "a LOMO optimizer" if other is None else str(kind.value)
        raise ValueError(
            f"cannot clip under {name}: accelerate keeps no gradients between backward and step "
            f"there that are summed over ranks and could be measured. Instead, "
            f"{other or 'use an optimizer of torch'}."
        )


def _check_engine(accelerator: Any, model: Any, options: dict[str, Any]) -> None:
    wrapped = accelerator.deepspeed_engine_wrapped
    if wrapped is None or model is not wrapped.engine:
        raise ValueError(
            f"cannot clip this {type(model).__qualname__} under DeepSpeed: only the engine that "
            f"`accelerator.prepare` returned shows where the gradients lie, and it clips them as "
            f"one group. Call `model, optimizer = accelerator.prepare(model, optimizer)` first, "
            f"and pass that model."
        )
    defaults = prepare.__kwdefaults__ or {}
    if given := [name for name, value in options.items() if value != defaults[name]]:
        raise ValueError(
            f"cannot use {', '.join(f'{name}=' for name in given)} under DeepSpeed: its engine "
            f"holds the gradients in partitions of its own, and clips inside its step. Leave out "
            f"what is not `policy` or `on_nonfinite`."
        )


def _check_optimizers(accelerator: Any, given: Sequence[Any]) -> None:
    if not given:
        raise TypeError(
            "cannot prepare without an optimizer: whether gradients are scaled, and which step "
            "follows, is a matter of each. Pass what `accelerator.prepare` returned."
        )
    for each in given:
        if not any(each is known for known in accelerator._optimizers):
            why = "accelerate has not prepared it"
            if isinstance(each, _Accelerated):
                why = "it is of another accelerator, or of before `accelerator.free_memory()`"
            raise ValueError(
                f"cannot clip for this {type(each).__qualname__}: {why}, and "
                f"would not step it when gradients are synchronised. Call `model, optimizer = "
                f"accelerator.prepare(model, optimizer)` first, and pass what that returned."
            )


def _check_prepared(accelerator: Any, clipper: Clipper) -> None:
    known = {id(param) for model in accelerator._models for param in model.parameters()}
    for param in clipper.plan.params:
        if id(param.param) not in known:
            raise ValueError(
                f"cannot clip {param.name!r}: it belongs to no model that accelerate has prepared, "
                f"and its gradients may not be summed over ranks. Call `model, optimizer = "
                f"accelerator.prepare(model, optimizer)` first, and pass that model, or "
                f"parameters taken from it afterwards."
            )
