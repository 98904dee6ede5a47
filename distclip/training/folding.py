"""Which optimizers multiply their gradients by the factor of a parameter group themselves."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from distclip.decision import Decision
from distclip.nonfinite import OnNonFinite
from distclip.norms.plan import Plan
from distclip.policies import Scope
from distclip.training import optimizers
from distclip.training.wrappers import params_of


def factors(
    stepped: Sequence[Optimizer], decision: Decision, others: Sequence[Optimizer] = ()
) -> dict[int, Tensor | None]:
    """By the id of each optimizer that is to multiply its gradients itself: by what.

    None stands for gradients that stay as they are. An optimizer takes one factor: of several
    groups of parameters those that differ are multiplied before its step.

    Args:
        others: step in the same round, and do so for themselves.
    """
    found: dict[int, Tensor | None] = {}
    plan = decision.plan
    if _why_none(plan, decision.in_grad, decision.mode):
        return found
    owners = _num_owners([*stepped, *others])
    for optimizer in stepped:
        group = _group_of(optimizer, plan, owners, lambda p: p.grad is not None)
        if isinstance(group, int) and optimizers.takes_factor([optimizer], decision):
            found[id(optimizer)] = decision.factor_of(group)
    return found


def stepped_by(stepped: Sequence[Optimizer], factors: Mapping[int, Tensor | None]) -> set[int]:
    """The ids of the parameters whose gradients optimizers multiply."""
    return {id(p) for each in stepped if id(each) in factors for p in params_of([each])}


class Steps:
    """Says in `print(plan)` which optimizers multiply by themselves. Keeps none of them alive."""

    def __init__(self, stepped: Sequence[Optimizer], in_grad: bool, mode: OnNonFinite) -> None:
        self._optimizers = [weakref.ref(each) for each in stepped]
        self._why_none = partial(_why_none, in_grad=in_grad, mode=mode)

    def is_of(self, stepped: Sequence[Optimizer]) -> bool:
        return [ref() for ref in self._optimizers] == list(stepped)

    def lines(self, plan: Plan) -> Iterator[str]:
        alive = [each for ref in self._optimizers if (each := ref()) is not None]
        owners = _num_owners(alive)
        for optimizer in alive:
            why = self._why_none(plan)
            group = why or _group_of(optimizer, plan, owners, lambda p: p.requires_grad)
            name = type(optimizer).__qualname__
            if isinstance(group, str):
                yield f"{name}: gradients are multiplied before its step ({group})"
                continue
            when = "" if plan.device.type == "cpu" else ", where there is a loss scale or scale="
            of = plan.groups[group].name
            yield f"{name}: its kernel multiplies by the factor of {of!r}{when}"


def _why_none(plan: Plan, in_grad: bool, mode: OnNonFinite) -> str:
    """Why no optimizer multiplies; "" where it may."""
    if not in_grad:
        return "they are not in `.grad`"
    if mode == "zero":
        return 'on_nonfinite="zero" sets them to zero'
    # Fused optimizers take a float32 factor.
    return "" if plan.norm_dtype is torch.float32 else "all are float64, a factor is float32"


def _group_of(
    optimizer: Optimizer, plan: Plan, owners: Mapping[int, int], counts: Callable[[Tensor], bool]
) -> int | str:
    """The index of the one group whose factor an optimizer multiplies by, or why there is none."""
    if not optimizers.multiplies(optimizer):
        return "only torch's own optimizers with fused=True do it themselves"
    params = [param for param in params_of([optimizer]) if counts(param)]
    groups = {plan.group_of.get(id(param), -1) for param in params}
    faults = {
        "it steps parameters that the Clipper does not hold": -1 in groups,
        "another optimizer steps some of the same": any(owners[id(p)] > 1 for p in params),
        "it steps several groups, and takes one factor": len(groups) > 1,
        "none of its parameters is trained": not groups,
    }
    if why := next((text for text, holds in faults.items() if holds), ""):
        return why
    (group,) = groups
    scope = plan.groups[group].scope
    return group if scope is Scope.MODEL else f"limits per {scope.value} are several factors"


def _num_owners(stepped: Sequence[Optimizer]) -> dict[int, int]:
    owners: dict[int, int] = {}
    for optimizer in stepped:
        for param in params_of([optimizer]):
            owners[id(param)] = owners.get(id(param), 0) + 1
    return owners
