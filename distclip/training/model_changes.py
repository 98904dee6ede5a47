"""Whether a model has other parameters than it had: a new head, adapters, weight norm, wrappers.

`named_parameters()` would take longer than clipping. What modules and parameters a model consists
of is in two dictionaries of each module, and comparing the objects in them takes some microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any, cast

from torch import Tensor

from distclip.param_groups import NamedParameters
from distclip.parameters import can_have_gradient
from distclip.sharding.fsdp1 import any_flattened
from distclip.torch_private import children_of, parameters_of

_values: Callable[[dict[str, Any]], Iterable[Any]] = cast(Any, dict).values


class ModelChanges:
    """What modules were made of at one time, to be compared with what they are made of now."""

    def __init__(self, read: NamedParameters) -> None:
        inner = [inner for module in read.modules for inner in module.modules()]
        self._children = list(map(children_of, inner))
        self._parameters = list(map(parameters_of, inner))
        self._were = self._objects()
        self._params: list[Tensor] = [tensor for _, tensor in read.named]
        self._skipped = read.skipped
        self._flattened = any_flattened(self._params)

    def any(self) -> bool:
        """Whether the modules have other parameters now, or parameters that were skipped train."""
        now = self._objects()
        same = len(now) == len(self._were) and all(map(is_, now, self._were))
        if not same or any(map(can_have_gradient, self._skipped)):
            return True
        return self.needs_new_plan()

    def needs_new_plan(self) -> bool:
        """Whether FSDP1 has flattened the parameters, which stay the same objects."""
        return not self._flattened and any_flattened(self._params)

    def _objects(self) -> Sequence[Any]:
        return [*chain.from_iterable(map(_values, chain(self._children, self._parameters)))]


def check_present(read: NamedParameters, before: Sequence[tuple[str, Tensor]]) -> None:
    """Raises ValueError where modules have lost every parameter that they had."""
    if before and not read.named:
        raise ValueError(
            f"cannot clip: the modules that the Clipper was made for had {len(before)} parameters, "
            f"such as {before[0][0]!r}, and have none now, because something has moved them into a "
            f"wrapper. Make the Clipper after the model has been wrapped (FSDP, fully_shard), and "
            f"pass the wrapped model."
        )
