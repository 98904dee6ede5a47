"""What users pass as parameters or gradients, in one form."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, SupportsFloat, TypeAlias, cast

import torch
from torch import Tensor, nn

from distclip.errors import LayoutError
from distclip.policies import GroupSpec, Policy
from distclip.sharding.layout import LocalParam
from distclip.sharding.local_tensors import (
    has_overlap,
    local_memory,
    local_values,
    resolve_partial,
    share_address,
)
from distclip.sharding.read import named_parameters

Parameters: TypeAlias = nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
ParamGroups: TypeAlias = Iterable[dict[str, Any]]
GradientFunction: TypeAlias = Callable[[Tensor], "Tensor | None"]


@dataclass(frozen=True)
class NamedParameters:
    """Everything that a user passes: parameters in the order of groups, and their modules."""

    named: list[tuple[str, Tensor]]
    groups: list[GroupSpec]
    modules: list[nn.Module]


def read_parameters(given: Parameters | ParamGroups, policy: Policy[Any]) -> NamedParameters:
    """Parameters with one policy, or groups `{"params", "policy", "name"}`.

    Groups without a policy use `policy`.

    Raises:
        ValueError: a parameter or a name is in two groups; what `named_tensors` raises.
    """
    if not isinstance(given, nn.Module | Tensor | types.GeneratorType):
        listed = list(cast("Iterable[Any]", given))
        if listed and all(isinstance(group, dict) for group in listed):
            return _read_groups(listed, policy)
        given = cast("Iterable[Tensor]", listed)
    named = named_tensors(cast(Parameters, given))
    modules = [given] if isinstance(given, nn.Module) else []
    return NamedParameters(named, [GroupSpec("all", slice(0, len(named)), policy)], modules)


def _read_groups(groups: list[dict[str, Any]], policy: Policy[Any]) -> NamedParameters:
    read = NamedParameters([], [], [])
    seen: set[int] = set()
    for index, group in enumerate(groups):
        name = str(group.get("name", f"group{index}"))
        members = named_tensors(group["params"], stacklevel=5)
        twice = [n for n, tensor in members if id(tensor) in seen]
        if twice or name in (other.name for other in read.groups):
            raise ValueError(
                f"cannot make the parameter group {name!r}: "
                f"{f'{twice[0]!r} is' if twice else 'its name is that'} of an earlier group, and "
                f"it is unclear which limit holds. Put each parameter into one group, and give "
                f"each group a name of its own."
            )
        seen |= {id(tensor) for _, tensor in members}
        first = len(read.named)
        is_module = isinstance(group["params"], nn.Module)
        prefix = "" if is_module else f"{name}."
        read.named.extend((f"{prefix}{n}" if n.startswith("#") else n, t) for n, t in members)
        own_policy = group.get("policy", policy)
        read.groups.append(GroupSpec(name, slice(first, len(read.named)), own_policy))
        read.modules.extend([group["params"]] if is_module else [])
    return read


def named_tensors(given: Parameters, stacklevel: int = 4) -> list[tuple[str, Tensor]]:
    """Each tensor once, with its name in the module or its index in the iterable.

    A generator is read once.

    Args:
        stacklevel: from here to the line that a warning points at; as it is, to who calls the
            caller of `read_parameters`.

    Raises:
        TypeError: something that is no tensor.
        ValueError: a tensor of integers or bools, which has no gradient to clip.
    """
    if isinstance(given, nn.Module):
        # Frozen integer weights (quantised layers) are no mistake there.
        return [(n, p) for n, p in named_parameters(given) if _can_have_gradient(p)]
    listed = [given] if isinstance(given, Tensor) else list(cast(Iterable[Any], given))
    if not listed:
        warn_of_empty_generator(given, stacklevel)
    named: dict[int, tuple[str, Tensor]] = {}
    for index, item in enumerate(listed):
        name, tensor = (
            cast(tuple[str, Any], item) if isinstance(item, tuple) else (f"#{index}", item)
        )
        _check(name, tensor)
        named.setdefault(id(tensor), (name, tensor))
    return list(named.values())


def warn_of_empty_generator(given: object, stacklevel: int) -> None:
    """Warns, in torch's words, where an iterable without elements is a generator: it may be spent.

    Args:
        stacklevel: as `warnings.warn` would have it in the caller.
    """
    if isinstance(given, types.GeneratorType):
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.",
            stacklevel=stacklevel + 1,
        )


def unique_tensors(given: Parameters) -> list[Tensor] | None:
    """The tensors of a module or a list, quickly.

    None unless each can have a gradient, and is there once.
    """
    if isinstance(given, nn.Module):
        given = [p for p in given.parameters() if _can_have_gradient(p)]
    tensors = [given] if isinstance(given, Tensor) else list(cast("Iterable[Any]", given))
    if not tensors or not all(issubclass(kind, Tensor) for kind in set(map(type, tensors))):
        return None
    dtypes = set(map(attrgetter("dtype"), tensors))
    right = all(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)
    return tensors if right and len(set(map(id, tensors))) == len(tensors) else None


def gradients_from(gradient: GradientFunction, params: Sequence[LocalParam]) -> list[Tensor | None]:
    """The dense values on this rank of gradients that lie where `gradient` says.

    Raises:
        TypeError: `gradient` returns something that is no tensor.
        ValueError: elements share memory, or two gradients begin at one address.
        LayoutError: a gradient that has to be reduced or coalesced first. The result would be a
            new tensor, and what is written there would be lost.
    """
    found: list[Tensor | None] = []
    for param in params:
        grad = cast(Any, gradient(param.param))
        if grad is None:
            found.append(None)
            continue
        if not isinstance(grad, Tensor):
            raise TypeError(
                f"cannot clip {param.name!r}: `gradient=` returned a {type(grad).__name__}, which "
                f"is no gradient. Return a tensor, or None where the parameter has no gradient."
            )
        if resolve_partial(grad) is not grad:
            raise LayoutError(
                f"cannot clip {param.name!r}: the gradient that `gradient=` returned is a partial "
                f"sum or an uncoalesced sparse tensor. Reducing it makes a new tensor, and what is "
                f"written there would be lost. Return the reduced gradient."
            )
        if has_overlap(memory := local_memory(grad)):
            raise ValueError(
                f"cannot clip {param.name!r}: elements of the gradient that `gradient=` returned "
                f"share memory (shape {list(memory.shape)}, strides {list(memory.stride())}), and "
                f"one cannot be written without the others. Return `gradient.contiguous()`, kept "
                f"where the optimizer reads it."
            )
        found.append(memory)
    if share_address([memory for memory in found if memory is not None]):
        raise ValueError(
            "cannot clip: `gradient=` returned memory that is the gradient of several parameters, "
            "and it would be multiplied once for each. Return a gradient of its own for each."
        )
    return found


def as_scalar(scale: float | Tensor, device: torch.device) -> Tensor:
    """A finite number, or a tensor with one element, as a float64 scalar on `device`; no wait.

    Raises:
        TypeError, ValueError: anything else.
    """
    if isinstance(scale, Tensor):
        if scale.numel() != 1 or scale.dtype is torch.bool or scale.is_complex():
            raise ValueError(
                f"cannot scale by a tensor of shape {list(scale.shape)} and {scale.dtype}: all "
                f"gradients are multiplied by one number. Pass a real tensor with one element."
            )
        return local_values(scale.detach()).to(device, torch.float64).reshape(())
    if isinstance(scale, bool) or not isinstance(cast(Any, scale), SupportsFloat):
        raise TypeError(
            f"cannot scale by {scale!r}: it is a {type(scale).__name__}. Pass a number such as "
            f"1 / num_tokens, or a tensor with one element."
        )
    if not math.isfinite(number := float(scale)):
        raise ValueError(
            f"cannot scale by {number}: no gradient would be finite. Pass a finite number."
        )
    return torch.full((), number, dtype=torch.float64, device=device)


def check_model_unchanged(module: nn.Module, params: Iterable[Tensor]) -> None:
    """Raises LayoutError where a parameter of the module with a gradient is none of `params`."""
    known = {id(param) for param in params}
    for name, param in module.named_parameters():
        if param.grad is not None and id(param) not in known:
            raise LayoutError(
                f"cannot clip {name!r}: the model got this parameter after the Clipper was made, "
                f"and none of the parameters that the Clipper knows has a gradient: nothing would "
                f"be clipped. Make the Clipper after the model has been wrapped (fully_shard, "
                f"FSDP, parallelize_module)."
            )


def check_dense(params: Iterable[LocalParam]) -> None:
    """Raises ValueError where a gradient is sparse."""
    for param in params:
        grad = param.param.grad
        if grad is not None and grad.layout is torch.sparse_coo:
            raise ValueError(
                f"cannot clip the units of {param.name!r}: its gradient is sparse, and the rows "
                f"that it stores are not those of the parameter. Each would get the limit of "
                f"another row. Make the layer without `sparse=True`, or give it a policy of "
                f"another scope, such as ClipTensorNorm, in a parameter group of its own."
            )


def _can_have_gradient(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _check(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"cannot clip {name!r}: it is a {type(tensor).__name__}, but only tensors have "
            f"gradients. Pass a tensor, an iterable of tensors, or an nn.Module."
        )
    if not _can_have_gradient(tensor):
        raise ValueError(
            f"cannot clip {name!r}: its dtype is {tensor.dtype}, and a scaled gradient does not "
            f"fit into whole numbers. Pass floating-point or complex tensors only."
        )
