"""Kept plans, for functions without an object: making a plan takes longer than clipping."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, cast

from torch.utils.weak import WeakIdKeyDictionary

from distclip.norms.plan import Plan

_MAX_PLANS = (
    16  # per mesh; a trainer with a generator, a discriminator and some norm types has fewer
)


class _Entry(NamedTuple):
    plan: Plan
    # Keys hold the ids of layouts: an id may be another object's once the layout is gone.
    layouts: list[weakref.ref[Any]]

    @property
    def is_valid(self) -> bool:
        return all(ref() is not None for ref in self.layouts)


class PlanCache:
    """The plans made last. No plan or key keeps a mesh, a layout or a parameter alive."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Plan | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or not entry.is_valid:
                return None
            self._entries.move_to_end(key)
            return entry.plan

    def put(self, key: Hashable, plan: Plan, layouts: Sequence[object]) -> None:
        refs = [weakref.ref(layout) for layout in {id(each): each for each in layouts}.values()]
        entry = _Entry(plan.without_params(), refs)
        with self._lock:
            self._entries[key] = entry
            self._entries.move_to_end(key)
            while len(self._entries) > _MAX_PLANS:
                self._entries.popitem(last=False)


_without_mesh = PlanCache()  # these plans reduce nothing: they hold no process group
# By the identity of a living mesh. An attribute of the mesh would be pickled with every DTensor.
_by_mesh = WeakIdKeyDictionary()
_lock = threading.Lock()


def plans_of(mesh: object | None) -> PlanCache:
    """The plans that belong to a mesh, and go with it: a plan holds ranks and a group, no mesh."""
    if mesh is None:
        return _without_mesh
    with _lock:
        return cast(PlanCache, _by_mesh.setdefault(mesh, PlanCache()))
