"""Optimizers that one clipper is attached to: one norm for a step of all of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from distclip import torch_private
from distclip.decision import Decision
from distclip.norms.plan import Plan
from distclip.norms.reduce import maximum_of_ranks
from distclip.sharding.local_tensors import final_gradient
from distclip.training import samples
from distclip.training.wrappers import params_of


class Change(IntEnum):
    """What happened to gradients since a decision; the later ones take precedence."""

    NONE = 0
    SEEN = 1  # another backward, an operation, another tensor
    UNCOUNTED = 2  # a write that torch does not count, as that of `unscale_`


class Attached(Protocol):
    """What steps in rounds; `StepHook`."""

    optimizer: Optimizer


class Rounds:
    """The steps that share a decision: at most one of each optimizer.

    The first step of a round decides on the gradients of all. Each step then clips those of its own
    optimizer, if they are as they were; otherwise it begins a new round, and so does an optimizer
    that steps again. Optimizers of other clippers, as in a GAN, are not concerned.
    """

    def __init__(self, plan: Callable[[], Plan]) -> None:
        self._plan = plan
        self._attached: list[weakref.ref[Attached]] = []
        self._decision: Decision | None = None
        self._waiting: dict[int, _Snapshot] = {}  # by the id of what has yet to step

    @property
    def plan(self) -> Plan:
        """As it is now."""
        return self._plan()

    def join(self, attached: Attached) -> None:
        """Raises ValueError for an optimizer that is in already."""
        if any(each.optimizer is attached.optimizer for each in self.members()):
            raise ValueError(
                f"cannot attach to this {type(attached.optimizer).__qualname__} again: the Clipper "
                f"clips in its steps already, and would clip twice and count each step twice. "
                f"Remove the first, `attached.remove()`."
            )
        self._attached.append(weakref.ref(attached))

    def leave(self, attached: Attached) -> None:
        self._attached = [ref for ref in self._attached if ref() not in (None, attached)]
        self.end()

    def members(self) -> list[Attached]:
        return [each for ref in self._attached if (each := ref()) is not None]

    def begin(self, first: Attached, decision: Decision) -> None:
        """A round that `first` has decided on."""
        others = [each for each in self.members() if each is not first]
        self._waiting = {id(each): _Snapshot(each.optimizer) for each in others}
        self._decision = decision if others else None

    def stepped(self) -> None:
        """After a step of one, whose own writes may count for all gradients of a buffer."""
        for snapshot in self._waiting.values():
            snapshot.renew()

    def end(self) -> None:
        self._decision, self._waiting = None, {}

    def join_round(self, attached: Attached) -> tuple[Decision | None, Change]:
        """The decision of the round, where it has one for this optimizer; and what has changed.

        Collective: an all-reduce of one number, where the optimizer has yet to step; an accelerator
            is waited for.
        """
        if (snapshot := self._waiting.pop(id(attached), None)) is None:
            self.end()  # it steps again, or was attached during the round
            return None, Change.NONE
        decision = self._decision
        change = Change(maximum_of_ranks(snapshot.change(), self.plan))
        if change is not Change.NONE or not self._waiting:
            self.end()
        return (decision if change is Change.NONE else None), change


class _Gradient(NamedTuple):
    param: Tensor
    grad: Tensor | None
    version: int
    bits: Tensor | None


class _Snapshot:
    """The gradients of one optimizer at one moment."""

    @torch.no_grad()
    def __init__(self, optimizer: Optimizer) -> None:
        self._gradients: list[_Gradient] = []
        for param in params_of([optimizer]):
            values = final_gradient(param)
            bits = None if (view := _bits(values)) is None else view.clone()
            self._gradients.append(_Gradient(param, param.grad, _version(values), bits))

    def renew(self) -> None:
        """Takes operations for its own that were counted since; no other write."""
        self._gradients = [
            each._replace(version=_version(values))
            if (values := final_gradient(each.param)) is not None and each.param.grad is each.grad
            else each
            for each in self._gradients
        ]

    @torch.no_grad()
    def change(self) -> Change:
        now = [(each, final_gradient(each.param)) for each in self._gradients]
        if any(g.param.grad is not g.grad or _version(values) != g.version for g, values in now):
            return Change.SEEN
        is_same = all(_is_same(g.bits, _bits(values)) for g, values in now)
        return Change.NONE if is_same else Change.UNCOUNTED


def _is_same(then: Tensor | None, now: Tensor | None) -> bool:
    if then is None or now is None:
        return then is now
    return torch.equal(then, now)


def _version(values: Tensor | None) -> int:
    return -1 if values is None else torch_private.version(values)


def _bits(values: Tensor | None) -> Tensor | None:
    return None if values is None else samples.sample(values)
