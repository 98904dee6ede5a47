"""The dense values of parameters and gradients on this rank, and what they show of their layout."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from distclip import torch_private
from distclip.sharding.ddp import any_localized
from distclip.sharding.dtensor import is_sharding
from distclip.sharding.fsdp1 import any_flattened
from distclip.torch_private import (
    dtensor_spec,
    local_tensor,
    local_tensor_of_shared_spec,
    spec_of_localized,
)


class LayoutCacheKey(NamedTuple):
    """What parameters show of their layout without being read.

    Attributes:
        key: equal for parameters with the same layout, dtypes and devices, while all `specs` live.
        specs: the objects whose ids are in `key`, one for each DTensor; weak references to them
            tell when `key` has lost its meaning.
    """

    key: Hashable
    specs: list[Any]

    @property
    def mesh(self) -> DeviceMesh | None:
        """The mesh of the first DTensor."""
        return self.specs[0].mesh if self.specs else None


def layout_cache_key(params: Sequence[Tensor]) -> LayoutCacheKey | None:
    """A key for what `read_layouts` would return for `params`, in a small part of its time.

    None where the parameters do not show their layout: those of FSDP1, or of an unknown class.
    """
    kinds = set(map(type, params))
    if not kinds <= {Tensor, nn.Parameter, DTensor}:
        return None
    if kinds != {DTensor} and any_flattened(params):
        return None
    dtypes = frozenset(map(attrgetter("dtype"), params))
    device = "cpu" if all(map(attrgetter("is_cpu"), params)) else params[0].device
    # By id: specs that compare equal may have different root meshes, and comparing them takes
    # longer than clipping.
    spec_of_each: list[Any] = []
    if kinds == {DTensor}:
        spec_of_each = list(map(dtensor_spec, params))
    elif DTensor in kinds or any_localized(params):
        spec_of_each = [
            dtensor_spec(p) if type(p) is DTensor else spec_of_localized(p) for p in params
        ]
    key = len(params), dtypes, device, tuple(map(id, spec_of_each))
    return LayoutCacheKey(key, [spec for spec in spec_of_each if spec is not None])


def layout_identity(tensor: Tensor) -> object:
    """What lives as long as the layout of a tensor: gradients come and go, and share a spec."""
    is_gradient = isinstance(tensor, DTensor) and not tensor.requires_grad
    return dtensor_spec(tensor) if is_gradient else tensor


def local_gradient(param: Tensor) -> Tensor | None:
    """The memory of a parameter's gradient on this rank, as `local_memory` has it.

    A `Partial` gradient, or one laid out unlike its parameter, is returned as the DTensor that it
    is: `reduce_gradients_` gives it values. An uncoalesced sparse gradient is coalesced.
    """
    if (grad := param.grad) is None or _is_moved(grad, like=param):
        return grad
    resolved = grad
    if grad.layout is torch.sparse_coo and not grad.is_coalesced():
        resolved = grad.coalesce()
    if resolved is not grad:
        param.grad = resolved
    return local_memory(resolved)


def any_unreduced(gradients: Sequence[Tensor | None]) -> bool:
    """Whether a gradient has no values yet: a DTensor among what `local_gradients` returned."""
    return DTensor in set(map(type, gradients))


def unreduced_text(gradients: Sequence[Tensor | None]) -> str:
    """Which gradients have no values yet, and how they lie; "" where all have them."""
    if not any_unreduced(gradients):
        return ""
    each = ((i, grad) for i, grad in enumerate(gradients) if isinstance(grad, DTensor))
    return ", ".join(f"{i}: {grad.placements} {grad.dtype}" for i, grad in each)


def reducible(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients that have values, and None for the others."""
    return [None if type(grad) is DTensor else grad for grad in gradients]


def local_gradients(params: Sequence[Tensor]) -> list[Tensor | None]:
    """`local_gradient` of each; 2,000 of FSDP2 take about 1.4 ms, and plain ones 0.7 ms.

    Memory that is the gradient of several parameters would be multiplied once for each: all but
    the first get a copy. Only gradients that begin at one address are found, not those that overlap
    otherwise.
    """
    found = _quick_gradients(params)
    here = present(found)
    if not share_address(here) and _shows_memory(here):
        return found
    _separate_(params)
    return [local_gradient(param) for param in params]


def _quick_gradients(params: Sequence[Tensor]) -> list[Tensor | None]:
    """`local_gradient` of each, but for the bits of contiguous ones."""
    # Thousands of plain gradients: anything in a loop of Python would take most of the time.
    grads = list(map(attrgetter("grad"), params))
    if set(map(type, grads)) == {Tensor} and all(map(Tensor.is_contiguous, grads)):
        return grads
    plain, dtensor = Tensor, DTensor
    resolved_specs: set[int] = set()
    return [
        grad
        if (grad := p.grad) is None or (type(grad) is plain and grad.is_contiguous())
        else local
        if type(grad) is type(p) is dtensor
        and (local := local_tensor_of_shared_spec(p, grad, resolved_specs)) is not None
        and local.is_contiguous()
        else local_gradient(p)
        for p in params
    ]


def final_gradient(param: Tensor) -> Tensor | None:
    """`local_gradient`, but None where a collective or a sum has yet to make its values.

    Collective: none.
    """
    grad = param.grad
    if grad is None or grad.layout is torch.sparse_coo:
        return None
    if _is_moved(grad, like=param) or has_overlap(memory := local_memory(grad)):
        return None
    return memory


def local_values(tensor: Tensor) -> Tensor:
    """The dense values of a tensor on this rank, `Partial` ones reduced."""
    return _dense(resolve_partial(tensor))


def is_dtensor(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def unreduced_values(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """`local_values` of each, but a `Partial` tensor as it is."""
    return [
        tensor
        if isinstance(tensor, DTensor) and any(p.is_partial() for p in tensor.placements)
        else local_values(tensor)
        for tensor in tensors
    ]


def local_memory(tensor: Tensor) -> Tensor:
    """The dense values of a tensor on this rank as they lie in memory.

    torch negates and conjugates by a bit of the tensor, which kernels that read addresses cannot
    see, and which some operators refuse. Norms do not change without the bits, and products with
    real numbers and clamps to [-b, b] are those that the tensor shows through its bits.
    """
    dense = _dense(tensor)
    if dense.is_neg():
        dense = torch_private.neg_view(dense)
    return dense.conj() if dense.is_conj() else dense


def has_overlap(dense: Tensor) -> bool:
    """Whether elements may share memory: where a dim does not step over all that is within."""
    if dense.layout is not torch.strided or dense.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(dense.stride(), dense.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def present(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Those that are not None."""
    return [grad for grad in gradients if grad is not None]


def first_overlap(gradients: Sequence[Tensor | None]) -> int | None:
    """The index of the first gradient of which elements may share memory."""
    if all(map(Tensor.is_contiguous, present(gradients))):
        return None
    for i, grad in enumerate(gradients):
        if grad is not None and not grad.is_contiguous() and has_overlap(grad):
            return i
    return None


def share_address(tensors: Sequence[Tensor]) -> bool:
    """Whether two of these dense tensors begin at one address."""
    addresses = _addresses(tensors)
    return len(set(addresses)) < len(addresses)


def resolve_partial(tensor: Tensor) -> Tensor:
    """The tensor itself; reduced where it is `Partial`, coalesced where it is sparse."""
    return _resolve(tensor, like=tensor)


def groups_sharding(tensor: Tensor, dims: Sequence[int]) -> list[dist.ProcessGroup]:
    """For each mesh axis that shards one of `dims`, the process group of the ranks along it."""
    if not isinstance(tensor, DTensor) or tensor.device_mesh.get_coordinate() is None:
        return []
    placements = enumerate(cast("tuple[Any, ...]", tensor.placements))
    axes = [axis for axis, p in placements if is_sharding(p) and p.dim in dims]
    return [tensor.device_mesh.get_group(axis) for axis in axes]


def _shows_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor is negated or conjugated lazily."""
    is_complex = any(dtype.is_complex for dtype in set(map(attrgetter("dtype"), tensors)))
    return not (
        any(map(Tensor.is_neg, tensors)) or (is_complex and any(map(Tensor.is_conj, tensors)))
    )


def _separate_(params: Sequence[Tensor]) -> None:
    """Gives every parameter a gradient of its own."""
    owners: dict[int, Tensor] = {}
    for param in params:
        if (grad := param.grad) is None:
            continue
        for address in _addresses([_dense(grad)]):
            if owners.setdefault(address, param) is not param:
                param.grad = grad.clone()


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Those of tensors with elements. Fake tensors and others of a class of their own have none."""
    if set(map(type, tensors)) != {Tensor}:
        tensors = [tensor for tensor in tensors if type(tensor) is Tensor]
    addresses = list(map(Tensor.data_ptr, tensors))
    return list(filter(None, addresses)) if 0 in addresses else addresses


def _is_moved(tensor: Tensor, like: Tensor) -> bool:
    """Whether a DTensor has yet to take the placements of another."""
    if isinstance(tensor, DTensor) and isinstance(like, DTensor):
        return tensor.placements != placements_without_partial(like)
    return False


def _resolve(tensor: Tensor, like: Tensor) -> Tensor:
    if isinstance(tensor, DTensor) and isinstance(like, DTensor):
        if not _is_moved(tensor, like):
            return tensor
        return tensor.redistribute(placements=placements_without_partial(like))
    return tensor.coalesce() if tensor.layout is torch.sparse_coo else tensor


def placements_without_partial(like: DTensor) -> tuple[Placement, ...]:
    """The placements of a tensor after its partial sums have been reduced."""
    return tuple(Replicate() if p.is_partial() else p for p in like.placements)


def _dense(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        tensor = local_tensor(tensor)
        if type(tensor) is not Tensor and hasattr(tensor, "wait"):
            tensor = cast(Any, tensor).wait()  # a tensor-parallel collective is still on its way
    return tensor.values() if tensor.layout is torch.sparse_coo else tensor
