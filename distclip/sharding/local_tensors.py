"""The dense values of parameters and gradients on this rank, and what they show of their layout."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import attrgetter
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate


def layout_cache_key(params: Sequence[Tensor]) -> tuple[Hashable, object] | None:
    """A key, alike for parameters that show the same layout, dtypes and devices, and what must live as long as it.

    None where they do not show their layout: those of FSDP1, or of a class of their own.
    """
    kinds = set(map(type, params))
    if not kinds <= {Tensor, nn.Parameter, DTensor} or any(getattr(p, "_fsdp_flattened", False) for p in params):
        return None
    dtypes, on_cpu = frozenset(map(attrgetter("dtype"), params)), all(map(attrgetter("is_cpu"), params))
    facts = len(params), dtypes, on_cpu or params[0].device
    # By identity: meshes that compare equal may have two roots, and to compare them takes longer than to clip.
    specs = [getattr(p, "_spec", None) for p in params] if DTensor in kinds else []
    return (facts, tuple(map(id, specs))), specs


def local_gradient(param: Tensor) -> Tensor | None:
    """The dense values of a parameter's gradient on this rank; what changes them changes the gradient.

    A `Partial` gradient, or one laid out unlike its parameter, takes its parameter's layout first and keeps it
    (`redistribute`: one collective for each such gradient); an uncoalesced sparse one is coalesced.
    """
    if (grad := param.grad) is None:
        return None
    resolve_partial = _resolve_partial(grad, like=param)
    if resolve_partial is not grad:
        param.grad = resolve_partial
    return _dense(resolve_partial)


def local_gradients(params: Sequence[Tensor]) -> list[Tensor | None]:
    """`local_gradient` of each; a plain one costs no call, and one of FSDP2 a short one: there may be thousands."""
    plain, dense, final = Tensor, torch.strided, set[int]()
    return [
        grad
        if (grad := p.grad) is None or (type(grad) is plain and grad.layout is dense)
        else _as_its_parameter(p, grad, final)
        for p in params
    ]


def _as_its_parameter(param: Any, grad: Any, final: set[int]) -> Tensor | None:
    """Args: final: the ids of layouts without `Partial`, as far as they are known; many parameters share one."""
    spec = getattr(grad, "_spec", None)
    # FSDP2 gives both one spec, so that there is nothing to compare.
    if spec is not None and spec is getattr(param, "_spec", None) and type(local := grad._local_tensor) is Tensor:
        if id(spec) in final:
            return local
        if not any(placement.is_partial() for placement in spec.placements):
            final.add(id(spec))
            return local
    return local_gradient(param)


def final_gradient(param: Tensor) -> Tensor | None:
    """`local_gradient`, but None where a collective or a sum has yet to make its values. Communicates nothing."""
    grad = param.grad
    if grad is None or grad.layout is torch.sparse_coo:
        return None
    waits = isinstance(grad, DTensor) and isinstance(param, DTensor) and grad.placements != _wanted(param)
    return None if waits else _dense(grad)


def resolve_partial(tensor: Tensor) -> Tensor:
    """The tensor itself; reduced where it is `Partial`, coalesced where it is sparse."""
    return _resolve_partial(tensor, like=tensor)


def groups_cutting(tensor: Tensor, dims: Sequence[int]) -> list[dist.ProcessGroup]:
    """The process groups, one a mesh axis, along which ranks hold different parts of `dims`."""
    if not isinstance(tensor, DTensor) or tensor.device_mesh.get_coordinate() is None:
        return []
    kinds = enumerate(tensor.placements)
    cut = [axis for axis, p in kinds if not (p.is_replicate() or p.is_partial()) and cast(Any, p).dim in dims]
    return [tensor.device_mesh.get_group(axis) for axis in cut]


def local_values(tensor: Tensor) -> Tensor:
    """The dense values of a tensor on this rank, `Partial` ones reduced."""
    return _dense(resolve_partial(tensor))


def _resolve_partial(tensor: Tensor, like: Tensor) -> Tensor:
    if isinstance(tensor, DTensor) and isinstance(like, DTensor):
        wanted = _wanted(like)
        return tensor if tensor.placements == wanted else tensor.redistribute(placements=wanted)
    return tensor.coalesce() if tensor.layout is torch.sparse_coo else tensor


def _wanted(like: DTensor) -> tuple[Placement, ...]:
    return tuple(Replicate() if p.is_partial() else p for p in like.placements)


def _dense(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        tensor = cast(Any, tensor)._local_tensor  # to_local() would record an autograd node
        if type(tensor) is not Tensor and hasattr(tensor, "wait"):
            tensor = cast(Any, tensor).wait()  # a tensor-parallel collective is still on its way
    return tensor.values() if tensor.layout is torch.sparse_coo else tensor
