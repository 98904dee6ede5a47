"""The accelerator's own clipping methods, which would clip the same gradients again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor

from distclip.clipper import Clipper

_METHODS = ("clip_grad_norm_", "clip_grad_value_")


def refuse(accelerator: Any, clipper: Clipper, owner: str, instead: str) -> None:
    """Makes the accelerator's methods raise for what `clipper` holds, while it is alive.

    Args:
        owner: who clips.
        instead: what to do in the place of such a call.
    """
    for name in _METHODS:
        own = cast("object", vars(accelerator).get(name))
        if not isinstance(own, _Refusal):
            own = _Refusal(accelerator, name, was_set=own is not None)
            vars(accelerator)[name] = own
        own.clippers[clipper] = owner, instead


def allow(accelerator: Any, clipper: Clipper | None) -> None:
    """Ends it; the methods are as they were once no clipper is left."""
    for name in _METHODS:
        own = cast("object", vars(accelerator).get(name))
        if isinstance(own, _Refusal):
            if clipper is not None:
                own.clippers.pop(clipper, None)
            if not own.clippers:
                del vars(accelerator)[name]
                if own.was_set:
                    vars(accelerator)[name] = own.method


class _Refusal:
    """Stands in the place of one method of one accelerator, for all clippers made with it."""

    def __init__(self, accelerator: Any, name: str, was_set: bool) -> None:
        self.name, self.method = name, cast("Callable[..., Any]", getattr(accelerator, name))
        self.was_set = was_set  # by somebody else, on this accelerator
        self.clippers: WeakKeyDictionary[Clipper, tuple[str, str]] = WeakKeyDictionary()

    def __reduce__(self) -> Any:
        """A pickled accelerator has the method itself."""
        return self.method.__reduce__()

    def __call__(self, parameters: Tensor | Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
        listed = cast("list[Tensor]", [parameters])
        if not isinstance(parameters, Tensor):
            parameters = listed = list(parameters)
        given = set(map(id, listed))
        for clipper, (owner, instead) in list(self.clippers.items()):
            held = (id(param.param) for param in clipper.plan.params)
            if not given.isdisjoint(held) and not _only_measures(*args, **kwargs):
                raise ValueError(
                    f"cannot clip by `accelerator.{self.name}`: {owner} clips the gradients of "
                    f"these parameters, and they would be clipped twice. Leave out this call "
                    f"{instead}."
                )
        return self.method(parameters, *args, **kwargs)


def _only_measures(limit: Any = None, *_: Any, max_norm: Any = None, **__: Any) -> bool:
    """Whether these arguments make `clip_grad_norm_` write nothing."""
    return math.inf in (limit, max_norm)
