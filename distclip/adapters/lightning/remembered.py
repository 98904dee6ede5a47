"""What policies remember between the fits of a model."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from typing import Any, TypeAlias

States: TypeAlias = "list[Any]"  # of the Clipper of each optimizer


class Remembered:
    """The states of the models that a callback has clipped for; keeps no model alive.

    Args:
        given: states for the next model that is fitted.
    """

    def __init__(self, given: States | None) -> None:
        self._given = given
        self._model: weakref.ref[Any] | None = None
        self._saved: MutableMapping[Any, States] = weakref.WeakKeyDictionary()

    def follow(self, model: Any, fits: bool) -> None:
        """`get` and `set` are about this model from now on."""
        self._model = weakref.ref(model)
        if fits and self._given is not None:
            self._saved[model], self._given = self._given, None

    def get(self) -> States | None:
        model = None if self._model is None else self._model()
        return self._given if model is None else self._saved.get(model, self._given)

    def set(self, states: States) -> None:
        model = None if self._model is None else self._model()
        if model is None:
            self._given = states
        else:
            self._saved[model] = states


def remembers_nothing(state: Any) -> bool:
    """Whether a Clipper's state is that of policies without one, such as `ClipNorm`."""
    try:
        groups: Any = state["groups"].values()
        return not any(any(policies.values()) for policies in groups)
    except (AttributeError, KeyError, TypeError):
        return False  # the Clipper says what is wrong with it
