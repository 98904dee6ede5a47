"""What users hand over as parameters or gradients, in one form."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from distclip.errors import LayoutError
from distclip.policies import Policy
from distclip.sharding.read import named_parameters

Parameters: TypeAlias = nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
ParamGroups: TypeAlias = Iterable[dict[str, Any]]


@dataclass(frozen=True)
class Given:
    """Everything that users hand over, in the order of groups: (name, members of `named`, policy)."""

    named: list[tuple[str, Tensor]]
    groups: list[tuple[str, slice, Policy[Any]]]
    modules: list[nn.Module]


def read(given: Parameters | ParamGroups, policy: Policy[Any]) -> Given:
    """Parameters with one policy, or groups `{"params", "policy", "name"}` with one each, by default `policy`.

    Raises:
        ValueError: a parameter or a name stands in two groups; what `named_tensors` raises.
    """
    if not isinstance(given, nn.Module | Tensor | types.GeneratorType):
        listed = list(cast("Iterable[Any]", given))
        if listed and all(isinstance(group, dict) for group in listed):
            return _read_groups(listed, policy)
        given = cast("Iterable[Tensor]", listed)
    named = named_tensors(cast(Parameters, given))
    modules = [given] if isinstance(given, nn.Module) else []
    return Given(named, [("all", slice(0, len(named)), policy)], modules)


def _read_groups(groups: list[dict[str, Any]], policy: Policy[Any]) -> Given:
    found = Given([], [], [])
    taken: dict[int, str] = {}
    for place, group in enumerate(groups):
        name = str(group.get("name", f"group{place}"))
        members = named_tensors(group["params"])
        twice = [n for n, tensor in members if id(tensor) in taken]
        if twice or name in (other for other, _, _ in found.groups):
            raise ValueError(
                f"cannot make the parameter group {name!r}: {f'{twice[0]!r} is' if twice else 'its name is that'} of "
                f"an earlier group, and one limit would follow another. Put each parameter into one group, and give "
                f"each group a name of its own."
            )
        taken |= {id(tensor): name for _, tensor in members}
        first = len(found.named)
        prefix = "" if isinstance(group["params"], nn.Module) else f"{name}."
        found.named.extend((f"{prefix}{n}" if n.startswith("#") else n, tensor) for n, tensor in members)
        found.groups.append((name, slice(first, len(found.named)), group.get("policy", policy)))
        found.modules.extend([group["params"]] if isinstance(group["params"], nn.Module) else [])
    return found


def named_tensors(given: Parameters) -> list[tuple[str, Tensor]]:
    """Each tensor once, with its name in the module or its place in the iterable. A generator is read once.

    Raises:
        TypeError: something that is no tensor.
        ValueError: a tensor of integers or bools, which has no gradient to clip.
    """
    if isinstance(given, nn.Module):
        # Frozen integer weights (quantised layers) are no mistake there.
        return [(n, p) for n, p in named_parameters(given) if _can_have_gradient(p)]
    listed = [given] if isinstance(given, Tensor) else list(cast(Iterable[Any], given))
    if not listed and isinstance(given, types.GeneratorType):
        warnings.warn("`parameters` is an empty generator, so that no gradient is clipped.", stacklevel=4)
    named: dict[int, tuple[str, Tensor]] = {}
    for place, item in enumerate(listed):
        name, tensor = cast(tuple[str, Any], item) if isinstance(item, tuple) else (f"#{place}", item)
        _check(name, tensor)
        named.setdefault(id(tensor), (name, tensor))
    return list(named.values())


def listed(given: Parameters) -> list[Tensor] | None:
    """The tensors of a module or a list, thousands in no time; None where not each is right and there once."""
    if isinstance(given, nn.Module):
        given = [p for p in given.parameters() if _can_have_gradient(p)]
    tensors = [given] if isinstance(given, Tensor) else list(cast("Iterable[Any]", given))
    if not tensors or not all(issubclass(kind, Tensor) for kind in set(map(type, tensors))):
        return None
    dtypes = set(map(attrgetter("dtype"), tensors))
    right = all(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)
    return tensors if right and len(set(map(id, tensors))) == len(tensors) else None


def check_fresh(module: nn.Module, params: Iterable[Tensor]) -> None:
    """Raises LayoutError where a parameter of the module has a gradient, but is none of `params`."""
    known = {id(param) for param in params}
    for name, param in module.named_parameters():
        if param.grad is not None and id(param) not in known:
            raise LayoutError(
                f"cannot clip {name!r}: the model got this parameter after the Clipper was made, and none of "
                f"those that the Clipper knows has a gradient, so that nothing would be clipped. "
                f"Make the Clipper after the model has been wrapped (fully_shard, FSDP, parallelize_module)."
            )


def check_dense(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raises ValueError where a gradient is sparse."""
    for name, param in named:
        if param.grad is not None and param.grad.layout is torch.sparse_coo:
            raise ValueError(
                f"cannot clip the units of {name!r}: its gradient is sparse, and the rows that it stores are not those "
                f"of the parameter, so that each would meet another's limit. Make the layer without `sparse=True`, "
                f"or give it a policy of another scope, such as ClipTensorNorm, in a parameter group of its own."
            )


def _can_have_gradient(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _check(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"cannot clip {name!r}: it is a {type(tensor).__name__}, but only tensors have gradients. "
            f"Pass a tensor, an iterable of tensors, or an nn.Module."
        )
    if not _can_have_gradient(tensor):
        raise ValueError(
            f"cannot clip {name!r}: its dtype is {tensor.dtype}, and a scaled gradient does not fit into whole "
            f"numbers. Pass floating-point or complex tensors only."
        )
