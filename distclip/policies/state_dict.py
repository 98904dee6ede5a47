"""What policies remember, as a dictionary that does not depend on the ranks: tensors and numbers under names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distclip.norms.plan import Group, Plan
from distclip.policies import Scope

VERSION = 1


def start(plan: Plan) -> list[Any]:
    """The states of all groups before the first step."""
    return [group.policy.init(_num(group), plan.device) for group in plan.groups]


def to_dict(plan: Plan, states: Sequence[Any]) -> dict[str, Any]:
    groups = {
        group.name: {type(group.policy).__name__: _leaves(state, _names(group))}
        for group, state in zip(plan.groups, states, strict=True)
    }
    return {"version": VERSION, "groups": groups}


def from_dict(plan: Plan, states: Sequence[Any], saved: dict[str, Any]) -> list[Any]:
    """The states that `saved` holds, in the form of `states`.

    Raises:
        ValueError: it is of another version, other groups, another policy or other parameters.
    """
    if saved.get("version") != VERSION:
        raise _unfit("its version", saved.get("version"), VERSION)
    groups = saved.get("groups", {})
    loaded: list[Any] = []
    for group, state in zip(plan.groups, states, strict=True):
        mine = _leaves(state, _names(group))
        theirs = groups.get(group.name, {})
        policy = type(group.policy).__name__
        # A checkpoint may leave out what is empty: a policy without memory fits where there is no other.
        if set(theirs) - {policy} or (mine and policy not in theirs):
            raise _unfit(f"the policy of group {group.name!r}", sorted(theirs), policy)
        loaded.append(_filled(state, _names(group), theirs.get(policy, {}), f"{group.name}.{policy}"))
    if unknown := sorted(set(groups) - {group.name for group in plan.groups}):
        raise _unfit("its parameter groups", unknown, [group.name for group in plan.groups])
    return loaded


def _num(group: Group) -> int:
    return 1 if group.units is None else group.units.num


def _names(group: Group) -> list[str] | None:
    """The keys under which numbers of single tensors are kept."""
    return group.units.row_names if group.units is not None and group.policy.scope is Scope.TENSOR else None


def _leaves(state: Any, names: list[str] | None) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, leaf in zip(state._fields, state, strict=True):
        if not isinstance(leaf, Tensor):
            kept[key] = _leaves(leaf, names)
        elif names is not None and leaf.ndim:
            kept[key] = {name: number.clone() for name, number in zip(names, leaf, strict=True)}
        else:
            kept[key] = leaf.clone()
    return kept


def _filled(state: Any, names: list[str] | None, saved: dict[str, Any], where: str) -> Any:
    new: list[Any] = []
    for key, leaf in zip(state._fields, state, strict=True):
        if key not in saved:
            raise _unfit(f"what it holds of {where}", sorted(saved), sorted(state._fields))
        if not isinstance(leaf, Tensor):
            new.append(_filled(leaf, names, saved[key], f"{where}.{key}"))
        elif names is not None and leaf.ndim:
            if lacking := sorted(set(names) - set(saved[key])):
                raise _unfit(f"the parameters of {where}.{key}", f"no {lacking[0]!r}", f"{len(names)} parameters")
            new.append(torch.stack([saved[key][name].to(leaf) for name in names]) if names else leaf)
        elif saved[key].shape != leaf.shape:
            raise _unfit(f"the shape of {where}.{key}", tuple(saved[key].shape), tuple(leaf.shape))
        else:
            new.append(saved[key].to(leaf, copy=True))
    return type(state)(*new)


def _unfit(what: str, found: object, wanted: object) -> ValueError:
    return ValueError(
        f"cannot load the state of a Clipper: {what} is {found!r} in the saved state, but {wanted!r} here, so that its "
        f"numbers would be taken for others. Nothing was loaded. Make the Clipper as it was when the state was saved, "
        f"or start without it."
    )
