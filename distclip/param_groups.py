"""Parameter groups as users pass them, and the parameters that they have now."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

from torch import Tensor, nn

from distclip.arguments import check_group_keys
from distclip.parameters import (
    Parameters,
    can_have_gradient,
    list_items,
    list_tensors,
    warn_of_empty_generator,
)
from distclip.policies import GroupSpec, Policy
from distclip.sharding.fsdp2 import reshard, sharded_params
from distclip.sharding.read import named_parameters

ParamGroups: TypeAlias = Iterable[dict[str, Any]]

# The names that `list_tensors` gives, and those of parameters that are added.
_NUMBER = re.compile(r"(^|\.)#\d+$|^added\.\d+$")
_TO_CALLER = 7  # frames from `list_sources` to who makes a Clipper, whose decorators are frames too


@dataclass(frozen=True)
class GroupSource:
    """A parameter group as the user gives it, to be read as often as needed.

    Attributes:
        params: a module, or tensors with their names.
        added: tensors that came during training.
    """

    name: str
    params: nn.Module | list[tuple[str, Tensor]]
    policy: Policy[Any]
    added: Sequence[tuple[str, Tensor]] = ()


@dataclass(frozen=True)
class NamedParameters:
    """Everything that a user passes: parameters in the order of groups, and their modules.

    Attributes:
        skipped: what cannot have a gradient as it is now.
    """

    named: list[tuple[str, Tensor]]
    groups: list[GroupSpec]
    modules: list[nn.Module]
    skipped: list[Tensor]


def read_parameters(given: Parameters | ParamGroups, policy: Policy[Any]) -> NamedParameters:
    """Parameters with one policy, or groups `{"params", "policy", "name"}`.

    Groups without a policy use `policy`.

    Raises:
        ValueError: a parameter or a name is in two groups; a group without "params", or with a key
            that means nothing; what `named_tensors` raises.
    """
    return read_sources(list_sources(given, policy))


def list_sources(given: Parameters | ParamGroups, policy: Policy[Any]) -> list[GroupSource]:
    """The groups of what `read_parameters` takes; iterables are read here, and only once."""
    if not isinstance(given, nn.Module | Tensor | types.GeneratorType):
        listed = list_items(given)
        if listed and all(isinstance(group, dict) for group in listed):
            sources: list[GroupSource] = []
            for index, group in enumerate(listed):
                sources.append(source := _group_source(index, group, policy))
                if source.params == []:
                    warn_of_empty_generator(group["params"], _TO_CALLER)
            return sources
        given = cast("Iterable[Tensor]", listed)
    source = GroupSource("all", _source(cast(Parameters, given)), policy)
    if source.params == []:
        warn_of_empty_generator(cast(object, given), _TO_CALLER)
    return [source]


def _group_source(index: int, group: dict[str, Any], policy: Policy[Any]) -> GroupSource:
    name = str(group.get("name", f"group{index}"))
    check_group_keys(name, group)
    params = _source(group["params"])
    if not isinstance(params, nn.Module):
        params = [(f"{name}.{n}" if n.startswith("#") else n, tensor) for n, tensor in params]
    return GroupSource(name, params, group.get("policy", policy))


def _source(given: Parameters) -> nn.Module | list[tuple[str, Tensor]]:
    return given if isinstance(given, nn.Module) else list_tensors(given)


def read_sources(
    sources: Sequence[GroupSource], modules: Sequence[nn.Module] = ()
) -> NamedParameters:
    """The parameters that groups have now.

    Args:
        modules: what parameters that were given without a name are from.

    Raises:
        ValueError: a parameter or a name is in two groups.
    """
    read = NamedParameters([], [], [*modules], [])
    name_of = _names_in(modules)
    seen: set[int] = set()
    for group in sources:
        params = group.params
        if isinstance(params, nn.Module):
            reshard(params)
            every = list(named_parameters(params))
            inside = {id(tensor) for _, tensor in every}
            added = [(name, tensor) for name, tensor in group.added if id(tensor) not in inside]
            every += [(name_of(name, tensor), tensor) for name, tensor in added]
            read.modules.append(params)
        else:
            listed = [*params, *group.added]
            sharded = sharded_params([tensor for _, tensor in listed])
            each = zip(listed, sharded, strict=True)
            every = [(name_of(name, tensor), tensor) for (name, _), tensor in each]
        members = [(name, tensor) for name, tensor in every if can_have_gradient(tensor)]
        read.skipped.extend(tensor for _, tensor in every if not can_have_gradient(tensor))
        twice = [n for n, tensor in members if id(tensor) in seen]
        if twice or group.name in (other.name for other in read.groups):
            raise ValueError(
                f"cannot make the parameter group {group.name!r}: "
                f"{f'{twice[0]!r} is' if twice else 'its name is that'} of an earlier group, and "
                f"it is unclear which limit holds. Put each parameter into one group, and give "
                f"each group a name of its own."
            )
        seen |= {id(tensor) for _, tensor in members}
        first = len(read.named)
        read.named.extend(members)
        read.groups.append(GroupSpec(group.name, slice(first, len(read.named)), group.policy))
    return read


def _names_in(modules: Sequence[nn.Module]) -> Callable[[str, Tensor], str]:
    """A function to the name of a tensor in the modules, where it has only a number so far."""
    names: dict[int, str] = {}
    for index, module in enumerate(modules):
        reshard(module)
        prefix = f"{index}." if len(modules) > 1 else ""
        for name, tensor in named_parameters(module):
            names.setdefault(id(tensor), prefix + name)
    return lambda name, tensor: names.get(id(tensor), name) if _NUMBER.search(name) else name


def with_params(sources: Sequence[GroupSource], added: Sequence[Tensor]) -> list[GroupSource]:
    """The groups, of which the only one holds `added` as well.

    Raises:
        ValueError: there are several groups.
    """
    if len(sources) > 1:
        raise ValueError(
            f"cannot clip {len(added)} parameters, one of shape {list(added[0].shape)}: the "
            f"optimizer got them after the Clipper was made, and it is unclear which of the groups "
            f"{[group.name for group in sources]} they belong to. Make a new Clipper with them, "
            f"and load the state of this one if its policies keep any."
        )
    (group,) = sources
    named = [(f"added.{i}", tensor) for i, tensor in enumerate(added, len(group.added))]
    return [replace(group, added=[*group.added, *named])]
