"""A check when a plan is made: are the tensors alike that would count as copies of each other?

An axis of the mesh that nothing speaks of, neither a tensor's own layout nor the user, is assumed
to hold copies. Local experts that nobody declared would be counted once for all ranks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from distclip.errors import LayoutError
from distclip.sharding.layout import LocalParam
from distclip.sharding.local_tensors import final_gradient, layout_identity
from distclip.sharding.mesh import ReduceMesh
from distclip.torch_private import has_values, local_tensor

_SAMPLE = 1 << 16  # elements of a tensor that are looked at
# Copies may have drifted by rounding, and the gradients of some are noise: a difference counts
# from this part of a tensor's own norm on, and from that part of the largest norm.
_OF_OWN, _OF_LARGEST = 1e-2, 1e-3


class Copy(NamedTuple):
    """What should be alike on some ranks: those with the same `where`, along `axes`."""

    name: str
    kind: str
    where: str
    axes: tuple[str, ...]


class Digest(NamedTuple):
    """Of the values on one rank.

    Attributes:
        at: the rank's coordinate on the axes.
        numbers: the norm, and projections of the values on fixed vectors.
    """

    at: tuple[int, ...]
    numbers: list[float]


Digests = dict[Copy, Digest]


def check_copies(params: Sequence[LocalParam], mesh: ReduceMesh, during_a_call: bool) -> None:
    """Compares tensors over the axes that nothing speaks of.

    Args:
        during_a_call: a function was called: gradients are compared too, and each tensor once. Its
            ranks may pass other tensors, and call again with tensors that some of them know:
            they join only if something is new here, and never along pipelines.

    Raises:
        LayoutError: on all ranks of the mesh, where copies differ.

    Collective: an all-gather of objects over the mesh, where a tensor has such an axis, or some
        rank may have one of which this rank does not know.
    """
    readable = [param for param in params if _is_readable(param.param)]
    if params and not readable:  # an estimate of memory: no rank has values
        return
    assumed = [param for param in readable if param.assumed]
    if during_a_call:
        if mesh.holds_distinct or not (assumed := [p for p in assumed if _is_new(p, mesh)]):
            return
    elif not compares_copies(readable, mesh):
        return
    gathered = mesh.rank_group.all_gather_objects(
        _digests(assumed, during_a_call), doing="reading the layouts: comparing copies"
    )
    if (found := _first_difference(gathered)) is not None:
        raise LayoutError(found)
    for param in assumed if during_a_call else ():
        identity = layout_identity(param.param)
        _compared[identity] = {*_compared_of(identity), _what(param, mesh)}


def compares_copies(params: Sequence[LocalParam], mesh: ReduceMesh) -> bool:
    """Whether a plan for a `Clipper` compares copies: the same on every rank.

    Ranks that were given different meshes by mistake must not wait for each other.
    """
    assumed = any(param.assumed for param in params)
    return assumed or mesh.from_user or (mesh.shares_copies and mesh.holds_distinct)


def has_new_copies(
    params: Sequence[LocalParam], tensors: Sequence[Tensor], mesh: ReduceMesh
) -> bool:
    """Whether a function has yet to compare parameters that are laid out as `params`."""
    first = next((i for i, param in enumerate(params) if param.assumed), None)
    if first is None or not tensors[first].requires_grad:
        return False
    return _is_new(replace(params[first], param=tensors[first]), mesh)


# What functions have compared, by the identity of living parameters, or of the layouts of DTensors.
_compared = WeakIdKeyDictionary()


def _is_readable(tensor: Tensor) -> bool:
    has_numbers = has_values(local_tensor(tensor) if isinstance(tensor, DTensor) else tensor)
    return has_numbers and not is_lazy(tensor) and tensor.dtype.itemsize > 1


def _is_new(param: LocalParam, mesh: ReduceMesh) -> bool:
    return _what(param, mesh) not in _compared_of(layout_identity(param.param))


def _compared_of(identity: object) -> set[object]:
    return cast("set[object]", _compared.get(identity, set()))


def _what(param: LocalParam, mesh: ReduceMesh) -> tuple[object, ...]:
    return param.mesh, param.assumed, mesh.rank_group.identity


def _digests(params: Sequence[LocalParam], gradients: bool) -> Digests:
    where: list[tuple[Copy, tuple[int, ...]]] = []
    numbers: list[Tensor] = []
    for copy, at, values in _values(params, gradients):
        if values.numel():
            where.append((copy, at))
            numbers.append(_projections(values).cpu())
    rows = cast("list[list[float]]", torch.stack(numbers).tolist() if numbers else [])
    return {copy: Digest(at, row) for (copy, at), row in zip(where, rows, strict=True)}


def _values(
    params: Sequence[LocalParam], gradients: bool
) -> Iterator[tuple[Copy, tuple[int, ...], Tensor]]:
    times: Counter[tuple[str, str]] = Counter()
    for param in params:
        axes = tuple(sorted(param.assumed))
        at = tuple(param.coordinate[axis] for axis in axes)
        where = str(sorted((a, i) for a, i in param.coordinate.items() if a not in axes))
        times[param.name, where] += 1
        where = f"{where} {times[param.name, where]}"  # two modules may have a "weight" each
        yield Copy(param.name, "values", where, axes), at, param.weights
        grad = final_gradient(param.param) if gradients and param.param.is_leaf else None
        if grad is not None:
            yield Copy(param.name, "gradients", where, axes), at, grad


def _projections(values: Tensor) -> Tensor:
    flat = values.detach().reshape(-1)
    flat = flat[:: -(-flat.numel() // _SAMPLE)]
    flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    flat = flat.double()
    angle = torch.arange(1, len(flat) + 1, dtype=torch.float64, device=flat.device) ** 2
    return torch.stack([flat.norm(), flat @ angle.sin(), flat @ angle.cos()])


def _first_difference(gathered: Mapping[int, Digests]) -> str | None:
    """What the error says of the first tensor that differs."""
    by_copy: defaultdict[Copy, dict[int, Digest]] = defaultdict(dict)
    largest: defaultdict[str, float] = defaultdict(float)
    for rank, digests in gathered.items():
        for copy, digest in digests.items():
            # Zeros may have to be loaded or broadcast yet; NaN and infinity are another error's.
            if 0 < digest.numbers[0] < torch.inf:
                by_copy[copy][rank] = digest
                largest[copy.kind] = max(largest[copy.kind], digest.numbers[0])
    for copy, by_rank in sorted(by_copy.items()):
        floor = _OF_LARGEST * largest[copy.kind]
        if _differ(by_rank.values(), floor):
            return _message(copy, _axes_that_differ(copy, by_rank.values(), floor), by_rank)
    return None


def _differ(digests: Iterable[Digest], floor: float) -> bool:
    rows = [digest.numbers for digest in digests]
    spread = max(max(column) - min(column) for column in zip(*rows, strict=True))
    return spread > max(_OF_OWN * max(row[0] for row in rows), floor)


def _axes_that_differ(copy: Copy, digests: Iterable[Digest], floor: float) -> list[str]:
    """The axes along which a rank differs from the next, all other coordinates being equal."""
    found: list[str] = []
    for i, axis in enumerate(copy.axes):
        lines: defaultdict[tuple[int, ...], list[Digest]] = defaultdict(list)
        for digest in digests:
            lines[digest.at[:i] + digest.at[i + 1 :]].append(digest)
        if any(_differ(line, floor) for line in lines.values()):
            found.append(axis)
    return found or list(copy.axes)


def _message(copy: Copy, axes: list[str], by_rank: Mapping[int, Digest]) -> str:
    listed = [f"rank {rank}: norm {digest.numbers[0]:.6g}" for rank, digest in by_rank.items()]
    found = "; ".join(listed if len(listed) <= 4 else [*listed[:3], "..."])
    names = ", ".join(map(repr, axes))
    return (
        f"cannot clip {copy.name!r}: nothing says how the ranks along the mesh axes {axes} share "
        f"it, and its {copy.kind} differ between them ({found}). As copies they would be counted "
        f"once. If these ranks hold different elements (experts, shards made by hand), pass "
        f"`layouts=` with `distclip.Layout(sharded={{{names}}})` for it, or `distinct=({names},)` "
        f"where all do that nothing else places on these axes. If these ranks train apart, pass "
        f"`mesh=` with the slice of the mesh whose ranks train together. If they are copies, make "
        f"them equal first: load or broadcast the parameters, reduce the gradients."
    )
