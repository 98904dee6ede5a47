"""An optimizer of a Trainer, whose steps clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distclip.adapters import deepspeed
from distclip.adapters.frameworks import claim, release
from distclip.adapters.lightning.checks import is_engine
from distclip.clipper import Clipper
from distclip.policies import Policy
from distclip.report import Report
from distclip.training.wrappers import is_wrapper, params_of, unwrapped

OWNER = "distclip.adapters.lightning.DistClip"


@dataclass
class ClippedOptimizer:
    """One optimizer whose steps clip.

    Attributes:
        given: as the Trainer has it.
        claimed: what `claim` was given: the optimizer, without a wrapper.
        params: what it stepped when it was found.
        clipper: with a state; a `Clipper`, or the handle of DeepSpeed's adapter.
        handle: with a report.
        logged: the latest report of which the norm was logged.
        hook: of `tell_of_steps`.
    """

    given: Any
    claimed: Any
    params: list[Tensor]
    clipper: Any
    handle: Any = None
    logged: Report | None = None
    hook: Any = None

    @property
    def tells_of_steps(self) -> bool:
        return self.hook is not None

    def tell_of_steps(self, to: Callable[[ClippedOptimizer], None]) -> None:
        """Calls `to` where a step begins, if this is an optimizer with hooks.

        Lightning's own hooks do not see a step of `self.optimizers(use_pl_optimizer=False)`. Call
        it before the hook that clips, which may leave the step out.
        """
        if self.claimed is not None and not is_wrapper(self.claimed):

            def hook(*_: Any) -> None:
                to(self)

            self.hook = self.claimed.register_step_pre_hook(hook)

    def steps(self, optimizer: Any) -> bool:
        return optimizer is self.given or optimizer is self.claimed

    def has_changed(self) -> bool:
        now = params_of([self.given])
        return [*map(id, now)] != [*map(id, self.params)]

    def remove(self) -> None:
        if self.hook is not None:
            self.hook.remove()
        if self.claimed is None:
            self.handle.detach()  # of DeepSpeed's adapter
            return
        if self.handle is not None:
            self.handle.remove()
        release(self.claimed)


def optimizers_of(trainer: Any) -> list[Any]:
    """Without the one that Lightning takes where `configure_optimizers` returns None."""
    return [each for each in trainer.optimizers if each.param_groups]


def clip_in_steps(
    trainer: Any,
    optimizer: Any,
    policy: Policy[Any],
    options: dict[str, Any],
    on_step: Callable[[ClippedOptimizer], None],
) -> ClippedOptimizer:
    model = trainer.model  # as the strategy has wrapped it
    if is_engine(model):
        if unknown := sorted(options.keys() - {"on_nonfinite", "tensor_norms"}):
            raise ValueError(
                f"cannot clip with {unknown[0]}= under DeepSpeed: its gradients lie in partitions "
                f"that the adapter reads. Pass only `on_nonfinite` and `tensor_norms`."
            )
        handle = deepspeed.attach(model, policy, **options)
        return ClippedOptimizer(optimizer, None, [], handle, handle)
    inner = unwrapped([optimizer])[0]
    clipped = ClippedOptimizer(optimizer, inner, params_of([optimizer]), None)
    claim(inner, OWNER)
    try:
        clipper = make_clipper(trainer.strategy, model, optimizer, policy, options)
        clipped.clipper = clipper
        clipped.tell_of_steps(on_step)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        clipped.handle = clipper.attach(optimizer, scaler)
    except BaseException:
        clipped.remove()
        raise
    return clipped


def make_clipper(
    strategy: Any, model: Any, optimizer: Any, policy: Policy[Any], options: dict[str, Any]
) -> Clipper:
    """Of what an optimizer steps, and of its model, as the strategy has wrapped it.

    With ModelParallelStrategy's mesh: each tensor of a model may be on one of its axes only.
    """
    mesh: Any = options.get("mesh", getattr(strategy, "device_mesh", None))
    return Clipper(params_of([optimizer]), policy, modules=model, **{**options, "mesh": mesh})
