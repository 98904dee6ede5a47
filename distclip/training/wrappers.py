"""Optimizers behind wrappers: which step, and what a step, a hook or a scaler must be given.

accelerate's, Lightning's and torchtitan's wrappers pass each step on to optimizers that they hold.
Others do work of their own in a step, as schedule-free's and ZeroRedundancyOptimizer do: these are
optimizers themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, cast

from torch import Tensor
from torch.optim import Optimizer

from distclip.arguments import kind_of, shown
from distclip.norms.plan import Plan

Optimizers: TypeAlias = Optimizer | Iterable[Optimizer]


def list_optimizers(given: Optimizers | None) -> list[Optimizer]:
    """What was given, one by one, wrappers as they are; each once.

    Raises:
        TypeError: something that is no optimizer.
        ValueError: a wrapper in which no optimizer is found.
    """
    if given is None:
        return []
    # Wrappers of optimizers need not be `Optimizer`s, and a container that steps may be iterable.
    is_list = hasattr(given, "__iter__") and not isinstance(given, str | dict)
    listed = cast("list[Optimizer]", [given])
    if is_list and not _is_one(given):
        listed = list(cast("Iterable[Optimizer]", given))
    for optimizer in listed:
        unwrapped([optimizer])
    return list({id(each): each for each in listed}.values())


def unwrapped(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """The optimizers that really step, each once."""
    found = [inner for optimizer in optimizers for inner in _unwrap(optimizer, [])]
    return list({id(each): each for each in found}.values())


def params_of(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """What the optimizers step."""
    groups = (group for each in unwrapped(optimizers) for group in each.param_groups)
    return [param for group in groups for param in group["params"]]


def is_wrapper(optimizer: Any) -> bool:
    """Whether it passes steps on, or is no optimizer that `Optimizer.__init__` has made."""
    is_made = {"param_groups", "defaults"} <= _attributes(optimizer).keys()
    return not (isinstance(optimizer, Optimizer) and is_made) or bool(_passes_on_to(optimizer))


def known_to_scaler(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer and those that it holds for its parameters: `scaler.step` may be given any."""
    known, found = {id(optimizer): optimizer}, [optimizer]
    while found:
        outer = found.pop()
        for inner in [*_held(outer), *_passes_on_to(outer)]:
            if id(inner) not in known and _covers([outer], [inner]):
                known[id(inner)] = inner
                found.append(inner)
    return list(known.values())


def steps_through(optimizer: Optimizer, scaler: Any) -> bool:
    """Whether a wrapper calls `scaler.step` and `scaler.update` itself."""
    values = _attributes(optimizer).values()
    return is_wrapper(optimizer) and any(value is scaler for value in values)


def check_wrapped(optimizer: Optimizer, plan: Plan) -> None:
    """Raises ValueError where a wrapper steps nothing that the clipper holds, but copies of it."""
    if not _passes_on_to(optimizer):
        return
    stepped, planned = {id(p) for p in params_of([optimizer])}, {id(p.param) for p in plan.params}
    if stepped and planned and stepped.isdisjoint(planned):
        raise ValueError(
            f"cannot clip in the step of a {type(optimizer).__qualname__}: the optimizer inside "
            f"steps none of the parameters that the Clipper holds, and the gradients that it steps "
            f"would stay as they are. Make the Clipper from what that optimizer steps; for "
            f"DeepSpeed use `distclip.adapters.deepspeed.attach(engine)`."
        )


def check_accumulated(optimizer: Optimizer) -> None:
    """Raises ValueError while accelerate accumulates gradients, and leaves out its step."""
    state = _attributes(optimizer).get("gradient_state")
    if _passes_on_to(optimizer) and not getattr(state, "sync_gradients", True):
        raise ValueError(
            f"cannot clip for a {type(optimizer).__qualname__} now: accelerate is accumulating "
            f"gradients, and would leave out the step; clipping and unscaling belong after the "
            f"last micro-batch. Call it `if accelerator.sync_gradients:`, or use `clipper.attach`."
        )


def _unwrap(optimizer: Any, outer: list[Any]) -> list[Optimizer]:
    if any(optimizer is each for each in outer):
        return []
    if not _is_one(optimizer):
        raise TypeError(
            f"cannot clip for optimizer={shown(optimizer)}: it is {kind_of(optimizer)}, no "
            f"optimizer, and holds none in `.optimizer` or `.optimizers`. Pass the optimizer that "
            f"steps the parameters itself, or a list of several."
        )
    inner = _passes_on_to(optimizer)
    if inner:
        return [found for each in inner for found in _unwrap(each, [*outer, optimizer])]
    if not _has_own_step(optimizer):
        raise ValueError(
            f"cannot clip for a {type(optimizer).__qualname__}: it is a proxy of an optimizer that "
            f"is in none of its attributes, and what is folded into the proxy would not reach the "
            f"optimizer. Pass the optimizer itself."
        )
    return [cast(Optimizer, optimizer)]


def _passes_on_to(optimizer: Any) -> list[Any]:
    """The optimizers whose steps are the wrapper's step; none where it is one itself."""
    inner = _inner(optimizer)
    # One with groups of its own may step some parameters itself, and leave others to the inner one.
    groups = _attributes(optimizer).get("param_groups") if inner else None
    if groups and {id(p) for g in groups for p in g["params"]} - set(map(id, params_of(inner))):
        return []
    return inner


def _inner(optimizer: Any) -> list[Any]:
    several = getattr(optimizer, "optimizers", None)
    if isinstance(several, list | tuple):
        listed = list(cast("Sequence[Any]", several))
        if listed and all(map(_is_one, listed)):
            return listed
    if _is_one(one := getattr(optimizer, "optimizer", None)) and one is not optimizer:
        return [one]
    return [] if _has_own_step(optimizer) else _held(optimizer)


def _covers(outer: Sequence[Optimizer], inner: Sequence[Optimizer]) -> bool:
    """Whether the outer optimizers step all that the inner ones do."""
    return set(map(id, params_of(outer))).issuperset(map(id, params_of(inner)))


def _has_own_step(optimizer: Any) -> bool:
    """False for a proxy, whose `__getattr__` finds `step` in another object."""
    return hasattr(cast(Any, type(optimizer)), "step")


def _held(optimizer: Any) -> list[Any]:
    """The optimizers in the attributes of a wrapper."""
    values = _attributes(optimizer).values()
    return [value for value in values if _has_groups(value) and value is not optimizer]


def _is_one(given: Any) -> bool:
    """Whether it steps: an optimizer, or what holds some."""
    return hasattr(given, "step") and (_has_groups(given) or bool(_passes_on_to(given)))


def _has_groups(given: Any) -> bool:
    return hasattr(given, "param_groups") and hasattr(given, "step")


def _attributes(optimizer: Any) -> dict[str, Any]:
    """Its own ones; a proxy's `__getattr__` would answer for another object."""
    return getattr(optimizer, "__dict__", {})
