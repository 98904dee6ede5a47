"""What policies remember between the fits of a model."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from typing import Any, TypeAlias, cast

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


def load_into(clipper: Any, states: Any, key: str, goes_on: bool) -> None:
    """`clipper.load_state_dict(states)`.

    Args:
        key: where checkpoints have it.
        goes_on: of the same run; the clipper may hold tensors that did not train before.

    Raises:
        ValueError: as `Clipper.load_state_dict`.
    """
    saved = _carried_over(states, clipper.state_dict()) if goes_on else states
    try:
        clipper.load_state_dict(saved)
    except (TypeError, ValueError) as reason:
        raise ValueError(
            f"cannot go on with what DistClip remembers: {reason} In a checkpoint of the Trainer "
            f'it is `checkpoint["callbacks"]["{key}"]`: delete that to begin anew.'
        ) from reason


def _carried_over(state: Any, now: Any) -> Any:
    """A Clipper's state, with what only `now` has: the tensors that it did not know."""
    if not isinstance(state, dict) or not isinstance(now, dict):
        return cast(Any, state)
    old, new = cast("dict[str, Any]", state), cast("dict[str, Any]", now)
    known = {key: _carried_over(value, new.get(key)) for key, value in old.items()}
    return {**new, **known}
