"""Gradients that a collective must reduce before they have values: `Partial` ones, and others that
do not lie as their parameters do.

Some ranks may have none where others have one: an expert that is copied to all ranks and got no
token here. Which collectives are made must not depend on what one rank has, so the ranks of a mesh
first say what they have, then reduce the same tensors in the same order. A gradient that is missing
counts as zeros, and is there afterwards: copies of a parameter get the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from distclip.errors import LayoutError
from distclip.sharding.local_tensors import (
    local_gradients,
    local_values,
    placements_without_partial,
)
from distclip.sharding.rank_group import RankGroup
from distclip.torch_private import local_shape_and_offset


class _Unreduced(NamedTuple):
    """A gradient as a rank has it."""

    placements: tuple[Placement, ...]
    dtype: torch.dtype


def may_lack_gradient(param: Tensor) -> bool:
    """Whether other ranks may have a `Partial` gradient of a parameter and this one has none."""
    if not (isinstance(param, DTensor) and param.requires_grad):
        return False
    sizes = zip(param.placements, param.device_mesh.shape, strict=True)
    return any(size > 1 and (p.is_replicate() or p.is_partial()) for p, size in sizes)


def reduce_gradients_(
    params: Sequence[Tensor], everywhere: bool, alike: bool
) -> list[Tensor | None]:
    """`local_gradients`, after those without values were replaced by reduced ones.

    Args, Raises, Collective: as `reduce_together`.
    """
    gradients = [param.grad for param in params]
    for i, reduced in reduce_together(gradients, params, everywhere, alike).items():
        params[i].grad = reduced
    return local_gradients(params)


def reduced_values(tensors: Sequence[Tensor], everywhere: bool, alike: bool) -> list[Tensor | None]:
    """The dense values of tensors on this rank; `Partial` ones are reduced and stay as they are.

    Args, Raises, Collective: as `reduce_together`.
    """
    reduced = reduce_together(tensors, tensors, everywhere, alike)
    return [local_values(reduced.get(i, tensor)) for i, tensor in enumerate(tensors)]


def reduce_together(
    tensors: Sequence[Tensor | None], params: Sequence[Tensor], everywhere: bool, alike: bool
) -> dict[int, DTensor]:
    """The tensors that have to be reduced, laid out as `params` are; by their index.

    Args:
        tensors: gradients, in the order of `params`; None where there is none.
        alike: all ranks call, and are known to have the same tensors to reduce.
        everywhere: all ranks call. Otherwise those of a mesh take part that have a tensor to reduce
            or lack one.

    Raises:
        LayoutError: on all ranks of a mesh, where they have different tensors, or have laid them
            out differently.

    Collective: over each mesh an all-gather of objects, unless `alike`; one `redistribute` for each
        tensor.
    """
    reduced: dict[int, DTensor] = {}
    if alike:
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if (kind := _unreduced(tensor, param)) is not None:
                reduced[i] = _reduced(tensor, cast(DTensor, param), kind)
        return reduced
    for mesh, members in _by_mesh(params).items():
        mine = {i: found for i in members if (found := _unreduced(tensors[i], params[i]))}
        lacks = any(tensors[i] is None and may_lack_gradient(params[i]) for i in members)
        if not (everywhere or mine or lacks):
            continue
        have = {k: mine.get(i) for k, i in enumerate(members)}
        in_place = [k for k, i in enumerate(members) if tensors[i] is not None and i not in mine]
        ranks = RankGroup.of(mesh, [params[i] for i in members])
        by_rank = ranks.all_gather_objects(
            (have, in_place), doing="comparing which gradients have to be reduced"
        )
        for k, i in enumerate(members):
            found = {rank: have.get(k) for rank, (have, _) in by_rank.items()}
            kinds = set(found.values()) - {None}
            if not kinds:
                continue
            others = [rank for rank, (_, in_place) in by_rank.items() if k in in_place]
            if len(kinds) > 1 or others:
                raise _differ(i, found, others)
            (kind,) = kinds
            reduced[i] = _reduced(tensors[i], cast(DTensor, params[i]), cast(_Unreduced, kind))
    return reduced


def _by_mesh(params: Sequence[Tensor]) -> dict[DeviceMesh, list[int]]:
    """The indices of the DTensors on each mesh that this rank lies on."""
    found: dict[DeviceMesh, list[int]] = {}
    for i, param in enumerate(params):
        if isinstance(param, DTensor) and param.device_mesh.get_coordinate() is not None:
            found.setdefault(param.device_mesh, []).append(i)
    return found


def _unreduced(tensor: Tensor | None, param: Tensor) -> _Unreduced | None:
    if not isinstance(tensor, DTensor) or not isinstance(param, DTensor):
        return None
    placements = tensor.placements
    if placements == placements_without_partial(param):
        return None
    return _Unreduced(placements, tensor.dtype)


def _reduced(tensor: Tensor | None, param: DTensor, kind: _Unreduced) -> DTensor:
    mesh = param.device_mesh
    if tensor is None:
        shape, _ = local_shape_and_offset(param.shape, mesh, kind.placements)
        zeros = torch.zeros(tuple(shape), dtype=kind.dtype, device=param.to_local().device)
        tensor = DTensor.from_local(
            zeros,
            mesh,
            kind.placements,
            run_check=False,
            shape=param.shape,
            stride=param.stride(),
        )
    return cast(DTensor, tensor).redistribute(placements=placements_without_partial(param))


def _differ(i: int, found: dict[int, _Unreduced | None], others: list[int]) -> LayoutError:
    texts = [f"rank {rank}: {kind}" for rank, kind in found.items() if kind is not None]
    texts += [f"rank {rank}: laid out as the parameter" for rank in others]
    return LayoutError(
        f"cannot reduce the gradient of parameter {i}: the ranks of its mesh have laid it out "
        f"differently ({'; '.join(texts[:8])}), and their collectives would add what does not "
        f"belong together. Pass the same parameters in the same order on these ranks, and compute "
        f"their gradients in the same way."
    )
