"""Gradients measured during backward, each as soon as it is final."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from distclip.norms import measure
from distclip.norms.plan import Plan
from distclip.sharding.local_tensors import final_gradient, local_gradient
from distclip.training import grad_hooks as hooks


class BackwardNorms:
    """The numbers of every gradient that backward has left, for as long as the gradient stays what was measured.

    A number counts only if `.grad` still is the very tensor and no operation has written to it since; what has
    changed, or was never seen, is measured when the numbers are asked for. So a second micro-batch, a gradient set
    to None or replaced, and a backward that raises need no rule of their own. A write through `.data` leaves no
    trace on a tensor, and is not seen.
    """

    def __init__(self, plan: Plan, modules: Sequence[nn.Module]) -> None:
        self._plan = plan
        self._params = [h.param for h in plan.params]
        self._place = {id(h.param): i for i, h in enumerate(plan.params)}
        self._stores = [measure.NormBuffer(group, plan.params[group.members], plan.device) for group in plan.groups]
        stored = zip(plan.groups, self._stores, strict=True)
        self._store = [(store, place) for group, store in stored for place in range(len(plan.params[group.members]))]
        self._measured: set[int] = set()  # whose numbers are not zero
        self._forget()
        handles = hooks.register_grad_hooks(_Weak(self), self._params, modules)
        weakref.finalize(self, _remove, handles)

    def values(self) -> list[Tensor | None]:
        """As `local_gradients`, in less time where all were seen."""
        if all(map(is_, map(attrgetter("grad"), self._params), self._grads)):
            return self._seen
        kept = zip(self._params, self._grads, self._seen, strict=True)
        return [seen if param.grad is grad else local_gradient(param) for param, grad, seen in kept]

    def local(self, values: Sequence[Tensor | None]) -> measure.LocalNorms:
        """As `measure.local`, without reading again what was measured before. That is then forgotten."""
        versions = [-1 if v is None else v._version for v in values]
        stale = [] if values is self._seen and versions == self._versions else self._stale(values, versions)
        if not self._measured or len(stale) > len(values) // 2:
            self._forget()
            return measure.local(values, self._plan)
        for i in stale:
            self._measure(i, values[i])
        if -1 in versions:  # a gradient of an earlier step that this one does not have
            for i in [i for i, v in enumerate(values) if v is None and i in self._measured]:
                self._measure(i, None)
        self._forget()
        return measure.of_stores(self._stores, self._plan)

    def _stale(self, values: Sequence[Tensor | None], versions: Sequence[int]) -> list[int]:
        known = zip(values, self._seen, versions, self._versions, strict=True)
        return [i for i, (v, seen, version, before) in enumerate(known) if v is not seen or version != before]

    def reduced(self, param: Tensor, values: Tensor | None) -> None:
        if (i := self._place.get(id(param))) is not None:
            self._grads[i] = self._seen[i] = None
            self._measure(i, values if values is not None and values.device == self._plan.device else None)

    def written(self, param: Tensor) -> None:
        if (i := self._place.get(id(param))) in self._measured:
            self._grads[i], self._seen[i] = param.grad, (values := final_gradient(param))
            self._versions[i] = -1 if values is None else values._version

    @torch.no_grad()
    def _measure(self, i: int, values: Tensor | None) -> None:
        store, place = self._store[i]
        store.put(place, values)
        (self._measured.discard if values is None else self._measured.add)(i)

    def _forget(self) -> None:
        """Lets go of the gradients, so that their memory can be used again."""
        self._grads: list[Tensor | None] = [None] * len(self._plan.params)
        self._seen = list(self._grads)  # their dense values
        self._versions = [-1] * len(self._plan.params)


class _Weak:
    """Does not keep alive whom it tells: hooks of parameters outlive a Clipper."""

    def __init__(self, early: BackwardNorms) -> None:
        self._early = weakref.ref(early)

    def reduced(self, param: Tensor, values: Tensor | None) -> None:
        if (early := self._early()) is not None:
            early.reduced(param, values)

    def written(self, param: Tensor) -> None:
        if (early := self._early()) is not None:
            early.written(param)


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
