"""The names of parameters in the model without wrappers, under which state is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from distclip.torch_private import WRAPPER_ATTRIBUTES

# These call what they wrap `module`, as a model may call a part of its own.
_WRAPPERS_OF_MODULE = (DistributedDataParallel, DataParallel)


def bare_names(module: nn.Module) -> Callable[[str], str]:
    """A function from the name of a parameter in `module` to that in the model without wrappers."""
    inside = cast("Iterator[tuple[str, nn.Module]]", module.named_modules(remove_duplicate=False))
    wrapped = {
        ".".join(_without_inserted([*path.split("."), "module"]))
        for path, inner in inside
        if isinstance(inner, _WRAPPERS_OF_MODULE)
    }

    def bare_name(name: str) -> str:
        words = _without_inserted(name.split("."))
        if wrapped:
            paths = accumulate(words, "{}.{}".format)
            words = [w for w, path in zip(words, paths, strict=True) if path not in wrapped]
        return ".".join(words)

    return bare_name


def _without_inserted(words: list[str]) -> list[str]:
    return [word for word in words if word and word not in WRAPPER_ATTRIBUTES]
