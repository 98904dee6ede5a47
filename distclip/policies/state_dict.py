"""The states of policies as a dictionary that does not depend on the ranks: tensors by name."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from distclip.arguments import kind_of, shown
from distclip.policies.base import valid_state

VERSION = 1

_REPR = reprlib.Repr()  # a file may hold anything, of any length and depth
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxdict = 8
_REPR.maxstring = _REPR.maxother = 200


class GroupState(NamedTuple):
    """The state of one parameter group's policy.

    Attributes:
        name: of the parameter group.
        policy_name: the name of the policy's class.
        tensor_names: with Scope.TENSOR, the tensors that the entries of vectors in the state belong
            to, in order; else None.
        state: a NamedTuple of tensors, or of such NamedTuples.
        policy: whose `valid_state` a loaded state is asked for; None for none.
    """

    name: str
    policy_name: str
    tensor_names: list[str] | None
    state: Any
    policy: Any = None


def to_dict(groups: Sequence[GroupState]) -> dict[str, Any]:
    """`{"version", "groups": {group: {policy: {field: tensor, or {tensor name: tensor}}}}}`."""
    saved = {g.name: {g.policy_name: _save(g.state, g.tensor_names)} for g in groups}
    return {"version": VERSION, "groups": saved}


def from_dict(groups: Sequence[GroupState], saved: Any) -> list[Any]:
    """The states in `saved`, one for each of `groups`, whose states are those before any step.

    Where tensors were there may be numbers, lists and arrays, as after JSON. A number has to fit
    into its field exactly. NaN and infinity are allowed in the fields that begin with some, and
    else what `valid_state` of the policy allows.

    Raises:
        ValueError: the version, the groups, the policies or the parameters of `saved` are others,
            or a number of it cannot be one of the state.
        TypeError: `saved` is no dictionary.
    """
    if not isinstance(saved, Mapping):
        raise TypeError(
            f"cannot load the state of a Clipper: {shown(saved)} is {kind_of(saved)}, in which no "
            f"policy can be looked up. Nothing was loaded. Pass what `clipper.state_dict()` "
            f"returned when it was saved."
        )
    saved = cast("Mapping[str, Any]", saved)
    if not _is_version(saved.get("version")):
        raise _mismatch("its version", saved.get("version"), VERSION)
    saved_groups = _mapping(saved.get("groups", {}), "its groups")
    loaded: list[Any] = []
    for name, policy_name, tensor_names, state, policy in groups:
        found = _mapping(saved_groups.get(name, {}), f"group {name!r}")
        # Some checkpoints leave out empty dictionaries, such as that of a stateless policy.
        if set(found) - {policy_name} or (state and policy_name not in found):
            raise _mismatch(f"the policy of group {name!r}", sorted(found, key=str), policy_name)
        path = f"{name}.{policy_name}"
        new = _load(state, tensor_names, found.get(policy_name, {}), path)
        _check(new, state, valid_state(policy, new), tensor_names, path)
        loaded.append(new)
    names = [group.name for group in groups]
    if unknown := sorted(set(saved_groups) - set(names), key=str):
        raise _mismatch("its parameter groups", unknown, names)
    return loaded


def has_vectors(state: Any) -> bool:
    """Whether a state has more than one number in some field."""
    return any(each.ndim if isinstance(each, Tensor) else has_vectors(each) for each in state)


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


def _load(state: Any, tensor_names: list[str] | None, saved: Any, path: str) -> Any:
    new: list[Any] = []
    saved = _mapping(saved, path)
    for key, leaf in zip(state._fields, state, strict=True):
        if set(saved) != set(state._fields):
            found = sorted(saved, key=str)
            raise _mismatch(f"what it holds of {path}", found, sorted(state._fields))
        if not isinstance(leaf, Tensor):
            new.append(_load(leaf, tensor_names, saved[key], f"{path}.{key}"))
        elif tensor_names is not None and leaf.ndim:
            new.append(_load_vector(leaf, tensor_names, saved[key], f"{path}.{key}"))
        else:
            new.append(_tensor(saved[key], leaf, f"{path}.{key}"))
    return type(state)(*new)


def _load_vector(leaf: Tensor, names: list[str], saved: Any, path: str) -> Tensor:
    saved = _mapping(saved, path)
    if missing := sorted(set(names) - set(saved)):
        raise _mismatch(
            f"the parameters of {path}", f"no {missing[0]!r}", f"{len(names)} parameters"
        )
    rows = zip(names, leaf, strict=True)
    each = [_tensor(saved[name], row, f"{path}[{name!r}]") for name, row in rows]
    return torch.stack(each) if each else leaf


def _tensor(saved: Any, like: Tensor, path: str) -> Tensor:
    """A copy of `saved` with the dtype and the device of `like`; the same numbers exactly."""
    found = _as_tensor(saved)
    if found is None:
        raise _no_number(path, saved)
    if found.shape != like.shape:
        raise _mismatch(f"the shape of {path}", tuple(found.shape), tuple(like.shape))
    new = found.to(like, copy=True)
    same = (new.to(found) == found) | (found.isnan() & new.isnan())
    if not bool(same.all()):
        raise _no_number(path, saved)
    return new


def _as_tensor(saved: Any) -> Tensor | None:
    """Real numbers as a tensor, from a tensor, an array, or numbers in lists; None for others."""
    try:
        found = saved if isinstance(saved, Tensor) else torch.as_tensor(saved, device="cpu")
        if not isinstance(saved, Tensor) and found.is_floating_point():
            found = torch.as_tensor(saved, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    is_real = not found.is_complex() and found.dtype is not torch.bool
    return found if is_real and not found.is_meta and found.layout is torch.strided else None


def _check(new: Any, initial: Any, valid: Any, tensor_names: list[str] | None, path: str) -> None:
    """Raises ValueError where a number cannot be one of the state."""
    each = zip(
        new._fields, new, initial, [None] * len(new) if valid is None else valid, strict=True
    )
    for key, leaf, first, may_be in each:
        if not isinstance(leaf, Tensor):
            _check(leaf, first, may_be, tensor_names, f"{path}.{key}")
            continue
        wrong = (leaf.isnan() & ~first.isnan().any()) | (leaf.isinf() & ~first.isinf().any())
        if may_be is not None:
            wrong = wrong | ~may_be
        if bool(wrong.any()):
            index = cast("list[int]", wrong.nonzero()[0].tolist())
            named = [tensor_names[index[0]], *index[1:]] if tensor_names and index else index
            number = leaf[tuple(index)].item()
            raise _no_number("".join([f"{path}.{key}", *(f"[{i!r}]" for i in named)]), number)


def _is_version(found: Any) -> bool:
    number = _as_tensor(found)
    return number is not None and not number.ndim and number.item() == VERSION


def _mapping(found: Any, path: str) -> Mapping[str, Any]:
    if isinstance(found, Mapping):
        return cast("Mapping[str, Any]", found)
    raise _mismatch(path, found, "a dictionary")


def _no_number(path: str, found: object) -> ValueError:
    return ValueError(
        f"cannot load the state of a Clipper: {path} is {shown(found)} in the saved state, which "
        f"no step can have left there, and the limits that follow from it would scale the "
        f"gradients wrongly. Nothing was loaded. Load an earlier checkpoint, or start without the "
        f"state."
    )


def _mismatch(what: str, found: object, wanted: object) -> ValueError:
    return ValueError(
        f"cannot load the state of a Clipper: {what} is {_short(found)} in the saved state, but "
        f"{_short(wanted)} here, and its numbers would be taken for others. Nothing was loaded. "
        f"Make the Clipper as it was when the state was saved, or start without the state."
    )


def _short(value: object) -> str:
    return " ".join(_REPR.repr(value).split())
