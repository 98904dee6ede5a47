"""The states of policies as a dictionary that does not depend on the ranks: tensors by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

VERSION = 1


class GroupState(NamedTuple):
    """The state of one parameter group's policy.

    Attributes:
        name: of the parameter group.
        policy_name: the name of the policy's class.
        tensor_names: with Scope.TENSOR, the tensors that the entries of vectors in the state belong
            to, in order; else None.
        state: a NamedTuple of tensors, or of such NamedTuples.
    """

    name: str
    policy_name: str
    tensor_names: list[str] | None
    state: Any


def to_dict(groups: Sequence[GroupState]) -> dict[str, Any]:
    """`{"version", "groups": {group: {policy: {field: tensor, or {tensor name: tensor}}}}}`."""
    saved = {g.name: {g.policy_name: _save(g.state, g.tensor_names)} for g in groups}
    return {"version": VERSION, "groups": saved}


def from_dict(groups: Sequence[GroupState], saved: dict[str, Any]) -> list[Any]:
    """The states in `saved`, one for each of `groups`, on the devices of the present states.

    Raises:
        ValueError: the version, the groups, the policies or the parameters of `saved` are others.
    """
    if saved.get("version") != VERSION:
        raise _mismatch("its version", saved.get("version"), VERSION)
    saved_groups = saved.get("groups", {})
    loaded: list[Any] = []
    for name, policy, tensor_names, state in groups:
        found = saved_groups.get(name, {})
        # Some checkpoints leave out empty dictionaries, such as that of a stateless policy.
        if set(found) - {policy} or (_save(state, tensor_names) and policy not in found):
            raise _mismatch(f"the policy of group {name!r}", sorted(found), policy)
        loaded.append(_load(state, tensor_names, found.get(policy, {}), f"{name}.{policy}"))
    names = [group.name for group in groups]
    if unknown := sorted(set(saved_groups) - set(names)):
        raise _mismatch("its parameter groups", unknown, names)
    return loaded


def carried_over(before: Sequence[GroupState], now: Sequence[GroupState]) -> list[Any]:
    """The states of the same groups after a model got other parameters: those of new tensors are as
    before the first step.
    """
    each = zip(before, now, strict=True)
    return [_carry_over(a.state, a.tensor_names, b.state, b.tensor_names) for a, b in each]


def _carry_over(old: Any, old_names: list[str] | None, new: Any, names: list[str] | None) -> Any:
    carried: list[Any] = []
    for was, leaf in zip(old, new, strict=True):
        if not isinstance(leaf, Tensor):
            carried.append(_carry_over(was, old_names, leaf, names))
        elif old_names is None or names is None or not leaf.ndim:
            carried.append(was.to(leaf.device))
        else:
            row_of = {name: i for i, name in enumerate(old_names)}
            rows = [
                was[row_of[n]] if n in row_of else first
                for n, first in zip(names, leaf, strict=True)
            ]
            carried.append(torch.stack(rows) if rows else leaf)
    return type(new)(*carried)


def _save(state: Any, tensor_names: list[str] | None) -> dict[str, Any]:
    saved: dict[str, Any] = {}
    for key, leaf in zip(state._fields, state, strict=True):
        if not isinstance(leaf, Tensor):
            saved[key] = _save(leaf, tensor_names)
        elif tensor_names is not None and leaf.ndim:
            saved[key] = {n: value.clone() for n, value in zip(tensor_names, leaf, strict=True)}
        else:
            saved[key] = leaf.clone()
    return saved


def _load(state: Any, tensor_names: list[str] | None, saved: dict[str, Any], path: str) -> Any:
    new: list[Any] = []
    for key, leaf in zip(state._fields, state, strict=True):
        if key not in saved:
            raise _mismatch(f"what it holds of {path}", sorted(saved), sorted(state._fields))
        if not isinstance(leaf, Tensor):
            new.append(_load(leaf, tensor_names, saved[key], f"{path}.{key}"))
        elif tensor_names is not None and leaf.ndim:
            new.append(_load_vector(leaf, tensor_names, saved[key], f"{path}.{key}"))
        elif saved[key].shape != leaf.shape:
            shapes = tuple(saved[key].shape), tuple(leaf.shape)
            raise _mismatch(f"the shape of {path}.{key}", *shapes)
        else:
            new.append(saved[key].to(leaf, copy=True))
    return type(state)(*new)


def _load_vector(leaf: Tensor, names: list[str], saved: dict[str, Tensor], path: str) -> Tensor:
    if missing := sorted(set(names) - set(saved)):
        raise _mismatch(
            f"the parameters of {path}", f"no {missing[0]!r}", f"{len(names)} parameters"
        )
    return torch.stack([saved[name].to(leaf) for name in names]) if names else leaf


def _mismatch(what: str, found: object, wanted: object) -> ValueError:
    return ValueError(
        f"cannot load the state of a Clipper: {what} is {found!r} in the saved state, but "
        f"{wanted!r} here, and its numbers would be taken for others. Nothing was loaded. Make the "
        f"Clipper as it was when the state was saved, or start without the state."
    )
