"""The accelerator's own clipping methods, which would clip the same gradients again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast
from weakref import WeakSet

from torch import Tensor

from distclip.clipper import Clipper

_METHODS = ("clip_grad_norm_", "clip_grad_value_")


def refuse(accelerator: Any, clipper: Clipper) -> None:
    """Makes the accelerator's methods raise for what `clipper` holds, while it is alive."""
    for name in _METHODS:
        own = cast("object", vars(accelerator).get(name))
        if not isinstance(own, _Refusal):
            own = _Refusal(name, getattr(accelerator, name), was_set=own is not None)
            vars(accelerator)[name] = own
        own.clippers.add(clipper)


def allow(accelerator: Any, clipper: Clipper | None) -> None:
    """Ends it; the methods are as they were once no clipper is left."""
    for name in _METHODS:
        own = cast("object", vars(accelerator).get(name))
        if isinstance(own, _Refusal):
            if clipper is not None:
                own.clippers.discard(clipper)
            if not own.clippers:
                del vars(accelerator)[name]
                if own.was_set:
                    vars(accelerator)[name] = own.method


class _Refusal:
    """Stands in the place of one method of one accelerator, for all clippers made with it."""

    def __init__(self, name: str, method: Callable[..., Any], was_set: bool) -> None:
        self.name, self.method = name, method
        self.was_set = was_set  # by somebody else, on this accelerator
        self.clippers: WeakSet[Clipper] = WeakSet()

    def __call__(self, parameters: Tensor | Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
        listed = cast("list[Tensor]", [parameters])
        if not isinstance(parameters, Tensor):
            parameters = listed = list(parameters)
        held = {id(param.param) for clipper in self.clippers for param in clipper.plan.params}
        if any(id(tensor) in held for tensor in listed):
            raise ValueError(
                f"cannot clip by `accelerator.{self.name}`: distclip.adapters.accelerate clips the "
                f"gradients of these parameters, and they would be clipped twice. Leave out this "
                f"call (the norm is `clipper.report.total_norm`), or end the other by "
                f"`clipper.detach()`."
            )
        return self.method(parameters, *args, **kwargs)
