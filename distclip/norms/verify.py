"""A check at setup: do the ranks agree on what they train, and are their copies alike?

The ranks that must hold the same are a replica group. Each rank sends one digest for each of its
replica groups. Where the digests of a group differ, the ranks exchange what went into them, and
every rank finds the same first difference.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.errors import LayoutError
from distclip.sharding.arrivals import missing_ranks
from distclip.sharding.layout import LocalParam
from distclip.sharding.mesh import ReduceMesh
from distclip.sharding.rank_group import RankGroup


class Subject(IntEnum):
    """What is compared, in the order in which differences are reported."""

    SETUP = 0
    LAYOUT = 1
    VALUES = 2


class ReplicaGroup(NamedTuple):
    """The ranks that must agree on a subject: those with the same coordinate."""

    subject: Subject
    coordinate: str


Fingerprints = dict[str, list[str]]  # by name; two modules may have a "weight" each


def verify(
    params: Sequence[LocalParam],
    reduce_mesh: ReduceMesh | None,
    policies: Sequence[str],
    device: torch.device,
) -> None:
    """Raises the same LayoutError on all ranks where they differ; see `Plan.verify`.

    Args:
        policies: each parameter group's name and policy.
        device: where the collectives run, without a mesh.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    ranks = RankGroup.world(device) if reduce_mesh is None else reduce_mesh.rank_group
    if missing := missing_ranks(ranks, "verify"):
        raise LayoutError(
            f"cannot verify the plan: the ranks {missing} have not called `verify()` within the "
            f"timeout of the process group, and the check needs every rank. Call it on all ranks, "
            f"after the same steps."
        )
    mine = _fingerprints(params, reduce_mesh, policies)
    digests = {replicas: _digest(sorted(found.items())) for replicas, found in mine.items()}
    gathered = ranks.all_gather_objects(digests, doing="verify()")
    first = _first_difference(gathered.values())
    if first is not None:
        found = ranks.all_gather_objects(mine.get(first), doing="verify()")
        raise _error(first.subject, found)


def _fingerprints(
    params: Sequence[LocalParam], mesh: ReduceMesh | None, policies: Sequence[str]
) -> dict[ReplicaGroup, Fingerprints]:
    found: defaultdict[ReplicaGroup, Fingerprints] = defaultdict(dict)
    setup = {"policies": [", ".join(policies)], "mesh": [_mesh_text(mesh)]}
    found[ReplicaGroup(Subject.SETUP, "")] = setup
    stage = "" if mesh is None else str([(a, mesh.coordinate[a]) for a in sorted(mesh.distinct)])
    for held in params:
        layouts = found[ReplicaGroup(Subject.LAYOUT, stage)]
        layouts.setdefault(held.name, []).append(f"{held.layout} ({held.param.dtype})")
        values = held.weights
        if values.numel() and not values.is_meta:
            shard = [(axis, held.coordinate[axis]) for axis in sorted(held.layout.sharded)]
            copies = found[ReplicaGroup(Subject.VALUES, f"{shard} on {held.mesh}")]
            text = f"values with the fingerprint {_checksum(values):x}"
            copies.setdefault(held.name, []).append(text)
    return found


def _first_difference(digests: Iterable[dict[ReplicaGroup, str]]) -> ReplicaGroup | None:
    distinct = {pair for of_rank in digests for pair in of_rank.items()}
    num_digests = Counter(replicas for replicas, _ in distinct)
    return min((replicas for replicas, num in num_digests.items() if num > 1), default=None)


def _mesh_text(mesh: ReduceMesh | None) -> str:
    if mesh is None:
        return "nothing sharded"
    ranks = cast("list[int]", mesh.ranks.flatten().tolist())
    if mesh.from_user:
        axes = " x ".join(f"{axis}={mesh.size(axis)}" for axis in mesh.axes)
        return f"mesh {axes} (ranks in order {_digest(ranks)}), distinct {sorted(mesh.distinct)}"
    # Ranks with another coordinate on a distinct axis may find meshes that differ in other axes.
    along = {axis: mesh.ranks_along(axis) for axis in sorted(mesh.distinct)}
    strides = {axis: (len(line), line[-1] - line[0]) for axis, line in along.items()}
    digest = _digest(sorted(ranks))
    return f"{len(ranks)} ranks from {ranks[0]} (digest {digest}), distinct axes {strides}"


_ERRORS = {
    Subject.SETUP: (
        "cannot clip together: the ranks were given different things: {found}. Each would scale by "
        "its own rule, or wait in a collective of its own. Make the Clipper alike on every rank: "
        "the same policies, the same order of groups, the same mesh."
    ),
    Subject.LAYOUT: (
        "cannot clip {name!r} together: the ranks hold it differently: {found}. Sums that do not "
        "belong together would be added. Build and wrap the model alike on these ranks, or say by "
        "`mesh=`, `distinct=` or `layouts=` that they hold different parameters."
    ),
    Subject.VALUES: (
        "cannot clip {name!r} together: it is laid out as copies, but they differ: {found}. One "
        "rank counts for all copies, and the elements of the others would be missed. Broadcast the "
        "parameter, or say by `distinct=` or `layouts=` that these ranks hold different "
        "elements, or by `mesh=` which ranks train together."
    ),
}


def _error(subject: Subject, gathered: dict[int, Fingerprints | None]) -> LayoutError:
    reports = {rank: report for rank, report in gathered.items() if report is not None}
    names = dict.fromkeys(name for report in reports.values() for name in report)
    name = next(name for name in names if len(set(_texts(name, reports))) > 1)
    ranks: defaultdict[str, list[int]] = defaultdict(list)
    for rank, text in zip(reports, _texts(name, reports), strict=True):
        ranks[text].append(rank)
    found = "; ".join(f"ranks {who}: {text[:300]}" for text, who in ranks.items())
    return LayoutError(_ERRORS[subject].format(name=name, found=found))


def _texts(name: str, reports: dict[int, Fingerprints]) -> list[str]:
    return [", ".join(report.get(name, ["it is missing"])) for report in reports.values()]


def _digest(content: object) -> str:
    return hashlib.blake2b(repr(content).encode(), digest_size=8).hexdigest()


# No words of 64 bits: of two flipped signs, the differences would cancel modulo 2**64.
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_CHUNK = 1 << 20  # words, of which the products take 8 MB


def _checksum(values: Tensor) -> int:
    """Changes with any bit of `values`: an odd multiple of each word, summed modulo 2**64."""
    words = values.contiguous().reshape(-1).view(_WORDS[min(values.element_size(), 4)])
    index = torch.arange(min(len(words), _CHUNK), device=words.device)
    factors = index * 0x1E3779B97F4A7C14 + 1
    total = 0
    for chunk in torch.split(words, _CHUNK):
        total = (total * 31 + int((chunk * factors[: len(chunk)]).sum())) % 2**64
    return total
