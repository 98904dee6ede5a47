"""Tells of each launch of a Triton kernel, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Around = Callable[[str, Callable[..., Any]], Callable[..., Any]]


def wrap_launches(around: Around, set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Every launch becomes `around(name, launch)(*args, **options)`.

    Args:
        around: gets a kernel's name and what launches it.
        set_attribute: `setattr`, or that of pytest's monkeypatch, which undoes it.
    """
    if torch.cuda.is_available():
        from triton.runtime.jit import JITFunction as Launcher

        method = "run"
    else:  # before Triton 3.6 its interpreter has no `run`
        from triton.runtime.interpreter import GridExecutor as Launcher

        method = "__call__"
    original = getattr(Launcher, method)

    def launch(self: Any, *args: Any, **options: Any) -> Any:
        name = self.__name__ if method == "run" else self.fn.__name__

        def run(*args: Any, **options: Any) -> Any:
            return original(self, *args, **options)

        return around(name, run)(*args, **options)

    set_attribute(Launcher, method, launch)
