"""A check at setup: do the ranks agree on what they train, and are their copies alike?

Every rank makes statements: a name, a digest, and the kin, by which ranks find those that must say the same. The
sums of the digests are gathered, a fixed number of integers a rank whatever the size of the model. Only where sums
differ do the ranks look for the name, by halving the range of hashed names.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.errors import LayoutError
from distclip.sharding.layout import LocalParam
from distclip.sharding.mesh import rank_list as numbers, world_group

if TYPE_CHECKING:
    from distclip.norms.plan import Plan

_BITS = 62  # of a digest: sums of them are taken modulo 2**62 and fit int64
_SLOTS = 16  # sums a rank sends; copies over different axes share one only where there are more kinds of them
_CHUNK = 1 << 20
_calls: defaultdict[str, int] = defaultdict(int)  # of verify, by process group: all its ranks call equally often


@dataclass(frozen=True, slots=True)
class _Statement:
    name: str
    slot: int
    kin: int
    text: str

    @property
    def place(self) -> int:
        return _digest(self.name)

    @property
    def digest(self) -> int:
        return _digest(self.name, self.text)


@dataclass(frozen=True)
class _Circle:
    """The ranks that verify together."""

    group: dist.ProcessGroup
    device: torch.device

    @property
    def ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.group)

    def numbers(self, mine: Sequence[int]) -> dict[int, list[int]]:
        """The integers of every rank, by global rank."""
        sent = torch.tensor(mine, dtype=torch.int64, device=self.device)
        everyone = sent.new_empty(len(self.ranks), len(mine))
        dist.all_gather(list(everyone.unbind()), sent, group=self.group)
        rows = everyone.cpu()
        return {rank: [int(n) for n in row] for rank, row in zip(self.ranks, rows, strict=True)}

    def objects(self, mine: Any) -> dict[int, Any]:
        return gathered(mine, self.group)


def gathered(mine: Any, group: dist.ProcessGroup) -> dict[int, Any]:
    """A small object of every rank, by global rank."""
    ranks = dist.get_process_group_ranks(group)
    everyone: list[Any] = [None] * len(ranks)
    dist.all_gather_object(everyone, mine, group=group)
    return dict(zip(ranks, everyone, strict=True))


def verify(plan: Plan) -> None:
    """See `Plan.verify`."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    circle = _Circle(plan.reduce_mesh.group if plan.reduce_mesh is not None else world_group(), plan.device)
    _meet(circle)
    common = [_policies(plan), _mesh(plan)]
    slots = _statements(plan)
    kins = [_digest(*sorted({str(said.kin) for said in slot})) if slot else 0 for slot in slots]
    rows = circle.numbers([*map(_digest, common), *kins, *map(_sum, slots)])
    for column, text in enumerate(common):
        if len({row[column] for row in rows.values()}) > 1:
            raise _different_setups(circle.objects(text[:300]))
    for slot, mine in enumerate(slots):
        kin, total = len(common) + slot, len(common) + _SLOTS + slot
        families: defaultdict[int, list[int]] = defaultdict(list)
        for rank, row in rows.items():
            families[row[kin]].append(rank)
        for family, ranks in sorted(families.items()):
            if family and len({rows[rank][total] for rank in ranks}) > 1:
                raise _different_statements(circle, slot, mine if kins[slot] == family else [], ranks)


def _statements(plan: Plan) -> list[list[_Statement]]:
    """What this rank says, by slot: which parameters it holds (slot 0), and the values of those with copies."""
    team = plan.reduce_mesh
    place = [f"{axis}={team.coordinate[axis]}" for axis in sorted(team.distinct)] if team is not None else []
    slots: list[list[_Statement]] = [[] for _ in range(_SLOTS)]
    for held in plan.params:
        text = f"{held.layout} ({held.param.dtype})"
        slots[0].append(_Statement(held.name, 0, _digest("place", *place), text))
        values = held.weights
        if values.numel() and not values.is_meta:
            slot = 1 + _digest(str(held.layout)) % (_SLOTS - 1)
            text = f"values with the fingerprint {_fingerprint(values):x}"
            slots[slot].append(_Statement(held.name, slot, _kin(held), text))
    return slots


def _kin(held: LocalParam) -> int:
    """The same on all ranks that hold copies, and on no other."""
    shard = (f"{axis}={held.coordinate[axis]}" for axis in sorted(held.layout.sharded))
    return _digest(held.mesh, *shard)


def _different_setups(told: dict[int, str]) -> LayoutError:
    return LayoutError(
        f"cannot clip together: the ranks were given different things: {_listed(told)}. Each would scale by its own "
        f"rule, or wait in a collective of its own. Make the Clipper alike on every rank: the same policies, the same "
        f"order of groups, the same mesh."
    )


def _different_statements(circle: _Circle, slot: int, mine: Sequence[_Statement], family: Sequence[int]) -> LayoutError:
    low, high = 0, 2**_BITS
    while high - low > 1:
        middle = (low + high) // 2
        rows = circle.numbers([_sum([said for said in mine if low <= said.place < middle])])
        differ = len({rows[rank][0] for rank in family}) > 1
        low, high = (low, middle) if differ else (middle, high)
    here = next(((said.name[:200], said.text) for said in mine if said.place == low), None)
    found = {rank: said for rank, said in circle.objects(here).items() if rank in family}
    name = next(said[0] for said in found.values() if said is not None)
    told = {rank: "it is missing" if said is None else said[1] for rank, said in found.items()}
    if slot == 0:
        return LayoutError(
            f"cannot clip {name!r} together: the ranks hold it differently: {_listed(told)}. Sums that do not belong "
            f"together would be added. Build and wrap the model alike on these ranks, or say by `mesh=`, `distinct=` "
            f"or `layouts=` that they hold different parameters."
        )
    return LayoutError(
        f"cannot clip {name!r} together: it is laid out as copies, but they differ: {_listed(told)}. One rank counts "
        f"for all copies, so that the elements of the others would be missed. Broadcast the parameter, or say by "
        f"`distinct=` or `layouts=` that these ranks hold different elements."
    )


def _listed(told: dict[int, str]) -> str:
    ranks: defaultdict[str, list[int]] = defaultdict(list)
    for rank, text in told.items():
        ranks[text].append(rank)
    return "; ".join(f"ranks {who}: {text}" for text, who in ranks.items())


def _meet(circle: _Circle) -> None:
    """Waits until every rank has called, or names those that have not within the group's timeout."""
    store = circle.group.get_group_store()
    _calls[circle.group.group_name] += 1
    meeting = f"distclip/verify/{_calls[circle.group.group_name]}"
    store.set(f"{meeting}/{dist.get_rank()}", "here")
    if store.add(f"{meeting}/count", 1) == len(circle.ranks):
        store.set(f"{meeting}/all", "here")
    try:
        store.wait([f"{meeting}/all"], _timeout(circle))
    except RuntimeError:
        missing = [rank for rank in circle.ranks if not store.check([f"{meeting}/{rank}"])]
        raise LayoutError(
            f"cannot verify the plan: the ranks {missing} have not called `verify()` within {_timeout(circle)}, the "
            f"timeout of the process group, and the check needs every rank. Call it on all ranks, after the same steps."
        ) from None


def _timeout(circle: _Circle) -> timedelta:
    return cast(Any, circle.group)._get_backend(circle.device).options._timeout


def _policies(plan: Plan) -> str:
    return ", ".join(f"{group.name}: {group.policy}" for group in plan.groups)


def _mesh(plan: Plan) -> str:
    if plan.reduce_mesh is None:
        return "nothing sharded"
    team, ranks = plan.reduce_mesh, numbers(plan.reduce_mesh.ranks)
    if not team.from_user:  # ranks apart on a distinct axis may find meshes that differ in other axes
        lines = {axis: team.ranks_along(axis) for axis in sorted(team.distinct)}
        apart = {axis: (len(line), line[-1] - line[0]) for axis, line in lines.items()}
        return f"{len(ranks)} ranks from {ranks[0]} (digest {_digest(str(sorted(ranks))):x}), distinct axes {apart}"
    axes = " x ".join(f"{axis}={team.size(axis)}" for axis in team.axes)
    return f"mesh {axes} (ranks in order {_digest(str(ranks)):x}), distinct {sorted(team.distinct)}"


def _sum(statements: Sequence[_Statement]) -> int:
    return sum(said.digest for said in statements) % 2**_BITS


def _digest(*texts: str) -> int:
    joined = "\0".join(texts).encode()
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big") % (2**_BITS - 1) + 1


def _fingerprint(values: Tensor) -> int:
    """A digest of the bits: each word times an odd number of its place, summed modulo 2**64."""
    words = values.contiguous().reshape(-1).view(_WORDS[min(values.element_size(), 8)])
    total = 0
    for start in range(0, len(words), _CHUNK):
        chunk = words[start : start + _CHUNK].long()
        places = torch.arange(start, start + len(chunk), device=chunk.device)
        total += int((chunk * (places * _ODD + 1)).sum())
    return total % 2**64


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = 0x1E3779B97F4A7C14  # even, so that places * _ODD + 1 is odd, and its bits are well mixed
