"""What DistClip and Fabric's function refuse."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.optim import Optimizer

from distclip import nonfinite
from distclip.clipper import Clipper

# Set by the adapter itself: where the gradients are, and what the parameters are from.
_OWN = ("model_or_parameters", "policy", "gradient", "modules")
_OPTIONS = {k: v for k, v in inspect.signature(Clipper).parameters.items() if k not in _OWN}
_ON_NONFINITE = ("on_nonfinite", "max_consecutive_skips")


def check_options(options: dict[str, Any]) -> None:
    if unknown := sorted(options.keys() - _OPTIONS.keys()):
        raise TypeError(
            f"cannot clip with {unknown[0]}=: it is none of Clipper's options here, which are "
            f"{', '.join(sorted(_OPTIONS))}."
        )
    mode, skips = (options.get(name, _OPTIONS[name].default) for name in _ON_NONFINITE)
    nonfinite.check_mode(mode, skips)


def check_clips_alone(trainer: Any, pl_module: Any) -> None:
    """Raises ValueError where the Trainer or the model clips in automatic optimization."""
    value = trainer.gradient_clip_val
    if value is not None and value > 0:
        raise ValueError(
            f"cannot clip with DistClip and Trainer(gradient_clip_val={value}): the gradients "
            f"would be clipped twice, and the norm of the second would be that of clipped ones. "
            f"Leave out one of the two."
        )
    hook = pl_module.configure_gradient_clipping
    source = str(getattr(hook, "__module__", ""))
    if not source.startswith(("lightning.", "pytorch_lightning.")):
        raise ValueError(
            f"cannot clip with DistClip: {type(pl_module).__qualname__} has its own "
            f"`configure_gradient_clipping`, and the gradients would be clipped twice. Remove the "
            f"method, or DistClip."
        )


def refuse_to_clip(plugin: Any) -> None:
    """Lets Lightning's own clipping raise, which a model may call as `self.clip_gradients`."""

    def clip_gradients(optimizer: Any, clip_val: float = 0.0, *_: Any, **__: Any) -> None:
        if clip_val > 0:
            raise ValueError(
                f"cannot clip with `self.clip_gradients(..., gradient_clip_val={clip_val})`: "
                f"DistClip clips inside `optimizer.step()`, and the gradients would be clipped "
                f"twice. Remove the call, or DistClip."
            )

    vars(plugin)["clip_gradients"] = clip_gradients


def check_set_up(fabric: Any, module: Any, optimizer: Any) -> list[nn.Module]:
    """The module, or several, as the strategy has wrapped them."""
    if not hasattr(getattr(fabric, "strategy", None), "precision"):
        raise TypeError(
            f"cannot clip with a {type(fabric).__qualname__}: it is no Fabric, which knows how "
            f"gradients are scaled and sharded. Pass the Fabric that has set up the module; with "
            f"a Trainer use `DistClip`."
        )
    given: list[Any] = [*module] if isinstance(module, list | tuple) else [module]
    # Fabric's own wrapper keeps the strategy's one under a private name, and `.module` leads past.
    wrapped = [getattr(each, "_forward_module", None) for each in given]
    is_raw = isinstance(optimizer, Optimizer) and not hasattr(optimizer, "optimizer")
    for each, inside in zip(given, wrapped, strict=True):
        if inside is None and is_raw:
            raise ValueError(
                f"cannot clip the gradients of this {type(each).__qualname__}: Fabric has set up "
                f"neither it nor its optimizer, and ranks might train apart. Pass what "
                f"`fabric.setup(module, optimizer)` returned."
            )
    both = zip(given, wrapped, strict=True)
    modules = [each if inside is None else inside for each, inside in both]
    if any(map(is_engine, modules)):
        raise ValueError(
            "cannot clip here under DeepSpeed: its gradients lie in partitions, and are clipped in "
            "its own step. Call `distclip.adapters.deepspeed.attach(fabric.strategy.model, "
            "policy)` once after `fabric.setup`, and leave out `clip_gradients`."
        )
    return modules


def is_engine(model: Any) -> bool:
    return hasattr(model, "seq_data_parallel_group")
