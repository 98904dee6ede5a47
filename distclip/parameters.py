"""What users pass as parameters or gradients, in one form."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from distclip.arguments import as_number, items, kind_of, shown
from distclip.errors import LayoutError
from distclip.sharding.fsdp2 import reshard, sharded_params
from distclip.sharding.layout import LocalParam
from distclip.sharding.local_tensors import (
    has_overlap,
    is_dtensor,
    local_memory,
    local_values,
    resolve_partial,
    share_address,
)
from distclip.sharding.read import named_parameters, parameters_of
from distclip.torch_private import on_device

Parameters: TypeAlias = nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
GradientFunction: TypeAlias = Callable[[Tensor], "Tensor | None"]


def named_tensors(given: Parameters) -> list[tuple[str, Tensor]]:
    """Each tensor once, with its name in the module or its index in the iterable.

    A generator is read once.

    Raises:
        TypeError: something that is no tensor, such as a parameter group.
        ValueError: a tensor of integers or bools, which has no gradient to clip.
    """
    if isinstance(given, nn.Module):
        reshard(given)
        return [(name, p) for name, p in named_parameters(given) if can_have_gradient(p)]
    listed = list_tensors(given)
    sharded = sharded_params([tensor for _, tensor in listed])
    each = zip(listed, sharded, strict=True)
    return [(name, tensor) for (name, _), tensor in each if can_have_gradient(tensor)]


def list_tensors(given: Any) -> list[tuple[str, Tensor]]:
    """Each tensor of an iterable once, with its name or its index; of any kind.

    Raises:
        TypeError, ValueError: as `named_tensors`.
    """
    listed = list_items(given)
    named: dict[int, tuple[str, Tensor]] = {}
    for index, item in enumerate(listed):
        name, tensor = _name_and_tensor(index, item)
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


def list_items(given: Any) -> list[Any]:
    """The items of an iterable of tensors, of pairs or of groups; a tensor is its own.

    Raises:
        TypeError: there are none.
    """
    if isinstance(given, Tensor):
        return [given]
    instead = "a tensor, an iterable of tensors, or an nn.Module"
    if isinstance(given, Mapping):
        instead = "its values, `list(gradients.values())`"
    elif hasattr(given, "scope") and hasattr(given, "limit"):
        instead = "the parameters first: `distclip.Clipper(model, policy)`"
    elif isinstance(given, Optimizer):
        instead = "the model whose parameters it steps"
    elif (listed := items(given)) is not None:
        return listed
    raise TypeError(
        f"cannot clip {shown(given)}: it is {kind_of(given)}, which holds no tensors with "
        f"gradients, or nothing says which. Pass {instead}."
    )


def unique_tensors(given: Parameters) -> list[Tensor] | None:
    """The tensors of a module or a list that can have a gradient, quickly.

    None unless each is there once.
    """
    if isinstance(given, nn.Module):
        reshard(given)
        given = parameters_of(given)
    tensors = [given] if isinstance(given, Tensor) else list(cast("Iterable[Any]", given))
    kinds = set(map(type, tensors))
    if not tensors or not all(issubclass(kind, Tensor) for kind in kinds):
        return None
    tensors = list(sharded_params(tensors))
    dtypes = set(map(attrgetter("dtype"), tensors))
    if not all(dtype.is_floating_point or dtype.is_complex for dtype in dtypes):
        if any(type(tensor) is Tensor and not can_have_gradient(tensor) for tensor in tensors):
            return None  # no parameter: `named_tensors` raises an error
        tensors = [tensor for tensor in tensors if can_have_gradient(tensor)]
    return tensors if tensors and len(set(map(id, tensors))) == len(tensors) else None


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
        return on_device(local_values(scale.detach()).double().reshape(()), device)
    try:
        number = as_number("scale", scale)
    except TypeError:
        raise TypeError(
            f"cannot scale by {shown(scale)}: it is {kind_of(scale)}, and all gradients are "
            f"multiplied by one number. Pass a number such as 1 / num_tokens, or a tensor with one "
            f"element."
        ) from None
    if not math.isfinite(number):
        raise ValueError(
            f"cannot scale by {number}: no gradient would be finite. Pass a finite number."
        )
    return torch.full((), number, dtype=torch.float64, device=device)


def as_loss(loss: float | Tensor, device: torch.device) -> Tensor:
    """A number, or a tensor with one element, as a float64 scalar on `device`; no wait.

    Raises:
        TypeError, ValueError: anything else.
    """
    if isinstance(loss, Tensor):
        if isinstance(loss, DTensor):
            raise TypeError(
                "cannot judge a step by the loss: it is a DTensor, of which a rank may hold a "
                "part. Pass `loss.full_tensor()`."
            )
        if loss.numel() != 1 or loss.dtype is torch.bool or loss.is_complex():
            raise ValueError(
                f"cannot judge a step by a loss of shape {list(loss.shape)} and {loss.dtype}: it "
                f"is one number for each rank. Pass a real tensor with one element, such as its "
                f"mean."
            )
        return on_device(loss.detach().double().reshape(()), device)
    number = as_number("loss", loss, "the loss of this rank, a number or a tensor of one")
    return torch.full((), number, dtype=torch.float64, device=device)


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


def can_have_gradient(tensor: Tensor) -> bool:
    """False for frozen weights of integers or of an unknown kind, as quantisation makes them, and
    for lazy parameters without a shape: nothing of these is looked at.
    """
    if is_lazy(tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    is_known = type(tensor) in (Tensor, nn.Parameter) or is_dtensor(tensor)
    return is_known or tensor.requires_grad or tensor.grad is not None


def _name_and_tensor(index: int, item: Any) -> tuple[str, Any]:
    if not isinstance(item, tuple):
        return f"#{index}", item
    pair = cast("tuple[Any, ...]", item)
    if len(pair) == 2 and isinstance(pair[0], str):
        return pair
    raise TypeError(
        f"cannot clip '#{index}': it is a tuple of {len(pair)} items, but only a name and a "
        f"tensor belong together, and of others it is unclear which have gradients. Pass one flat "
        f"iterable of tensors, or of pairs such as those of `model.named_parameters()`."
    )


def _check(name: str, tensor: Any) -> None:
    if isinstance(tensor, dict):
        raise TypeError(
            f"cannot clip {name!r}: it is a dict, such as a parameter group, but this takes "
            f"tensors, and one limit for all of them. Pass the parameters themselves, "
            f"`[p for group in optimizer.param_groups for p in group['params']]`, or use "
            f"distclip.Clipper, which takes groups (and nothing else beside them)."
        )
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"cannot clip {name!r}: it is {kind_of(tensor)}, but only tensors have gradients. "
            f"Pass a tensor, an iterable of tensors, or an nn.Module."
        )
    # A parameter of integers is frozen, and its gradient None.
    if not (tensor.is_floating_point() or tensor.is_complex() or isinstance(tensor, nn.Parameter)):
        raise ValueError(
            f"cannot clip {name!r}: its dtype is {tensor.dtype}, and a scaled gradient does not "
            f"fit into whole numbers. Pass floating-point or complex tensors only."
        )
