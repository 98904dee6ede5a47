"""What users hand over as parameters or gradients, in one form."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable
from typing import Any, TypeAlias, cast

from torch import Tensor, nn

Parameters: TypeAlias = nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


def named_tensors(given: Parameters) -> list[tuple[str, Tensor]]:
    """Each tensor once, with its name in the module or its place in the iterable. A generator is read once.

    Raises:
        TypeError: something that is no tensor.
        ValueError: a tensor of integers or bools, which has no gradient to clip.
    """
    if isinstance(given, nn.Module):
        # Frozen integer weights (quantised layers) are no mistake there.
        return [(n, p) for n, p in given.named_parameters() if _can_have_gradient(p)]
    listed = [given] if isinstance(given, Tensor) else list(cast(Iterable[Any], given))
    if not listed and isinstance(given, types.GeneratorType):
        warnings.warn("`parameters` is an empty generator, so that no gradient is clipped.", stacklevel=4)
    named: dict[int, tuple[str, Tensor]] = {}
    for place, item in enumerate(listed):
        name, tensor = cast(tuple[str, Any], item) if isinstance(item, tuple) else (f"#{place}", item)
        _check(name, tensor)
        named.setdefault(id(tensor), (name, tensor))
    return list(named.values())


def _can_have_gradient(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _check(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"cannot clip {name!r}: it is a {type(tensor).__name__}, but only tensors have gradients. "
            f"Pass a tensor, an iterable of tensors, or an nn.Module."
        )
    if not _can_have_gradient(tensor):
        raise ValueError(
            f"cannot clip {name!r}: its dtype is {tensor.dtype}, and a scaled gradient does not fit into whole "
            f"numbers. Pass floating-point or complex tensors only."
        )
