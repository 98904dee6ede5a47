"""Ranks that communicate, over process groups that exist already.

Making a process group may be a collective of the whole world, and ranks outside of a mesh would not
come. Torch makes a group for each axis of a mesh, and none over several axes: where these are a
part of the world, the ranks communicate along one axis after the other.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import prod
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from distclip.sharding.failures import Meeting, keep, know, looks
from distclip.torch_private import local_tensor, with_real_values

T = TypeVar("T")


class Line(NamedTuple):
    """All ranks, or those along one axis of a mesh through this rank.

    Attributes:
        ranks: global ranks, in the order in which results are combined. The order of the axis, and
            not that of the group: on other lines the group has other ranks, sorted by number.
    """

    group: dist.ProcessGroup
    ranks: tuple[int, ...]

    def all_reduce_(self, numbers: Tensor, op: Any, meeting: Meeting) -> None:
        """Raises, as all methods here, CollectiveError or LayoutError, which name the ranks."""
        reduce = cast(Any, dist.all_reduce)
        self._run(lambda a: reduce(numbers, op, self.group, a), numbers, meeting)

    def all_gather(self, numbers: Tensor, meeting: Meeting) -> Tensor:
        """Shapes: numbers: [n]; the result: [ranks, n]."""
        rows, gather = numbers.new_empty(len(self.ranks), len(numbers)), cast(Any, dist.all_gather)
        by_rank = dict(zip(self.ranks, rows.unbind(), strict=True))
        in_order = [by_rank[rank] for rank in dist.get_process_group_ranks(self.group)]
        self._run(lambda a: gather(in_order, numbers, self.group, a), numbers, meeting)
        return rows

    def all_gather_objects(self, mine: T, device: torch.device, meeting: Meeting) -> list[T]:
        """As `dist.all_gather_object`, which waits for lost ranks as long as torch lets it."""
        content = torch.tensor([*pickle.dumps(mine)], dtype=torch.uint8, device=device)
        length = torch.tensor([len(content)], dtype=torch.int64, device=device)
        lengths = cast("list[list[int]]", self.all_gather(length, meeting).tolist())
        padded = content.new_zeros(max(lengths)[0])
        padded[: len(content)] = content
        rows = cast("list[list[int]]", self.all_gather(padded, meeting).tolist())
        each = zip(rows, lengths, strict=True)
        return [pickle.loads(bytes(row[:n])) for row, (n,) in each]  # noqa: S301  (of our own ranks)

    def _run(self, start: Callable[[bool], Any], tensor: Tensor, meeting: Meeting) -> None:
        know(self.group).num_collectives += 1
        try:
            if looks(self.group, tensor):
                meeting.wait(keep(start(True)))
            else:
                start(False)
        except RuntimeError as error:
            raise meeting.error() from error


@dataclass(frozen=True, eq=False)
class RankGroup:
    """All ranks of a mesh. It keeps no DeviceMesh alive.

    Attributes:
        lines: of one process group over all ranks; where there is none, of each axis of the mesh
            that has several ranks, the longest first. Empty for a rank that is alone.
        device: where the collectives run.
        ranks: all of them, in order; those of the lines, if omitted.
    """

    lines: tuple[Line, ...]
    device: torch.device
    ranks: tuple[int, ...] = ()

    @classmethod
    @with_real_values()
    def of(cls, mesh: DeviceMesh, tensors: Iterable[Tensor] = ()) -> RankGroup:
        """The ranks of a mesh that contains this rank.

        Args:
            tensors: what lies on these ranks; the collectives run on the device of the first.
        """
        if mesh.size() == dist.get_world_size():
            return cls.world(torch.device(mesh.device_type), tensors)
        lines = [_line(mesh, axis) for axis in range(mesh.ndim) if mesh.size(axis) > 1]
        lines.sort(key=lambda line: -len(line.ranks))
        device = with_index(torch.device(mesh.device_type), tensors, lines)
        ranks = sorted(cast("list[int]", mesh.mesh.flatten().tolist()))
        return cls(tuple(lines), device, tuple(ranks))

    @classmethod
    def world(cls, device: torch.device, tensors: Iterable[Tensor] = ()) -> RankGroup:
        """All ranks of the default process group."""
        return cls.of_group(cast(dist.ProcessGroup, dist.group.WORLD), device, tensors)

    @classmethod
    def of_group(
        cls, group: dist.ProcessGroup, device: torch.device, tensors: Iterable[Tensor] = ()
    ) -> RankGroup:
        """All ranks of a process group."""
        know(group)
        line = Line(group, tuple(dist.get_process_group_ranks(group)))
        return cls((line,), with_index(device, tensors, [line]))

    @property
    def identity(self) -> tuple[int, ...]:
        """The same for equal ranks, as long as their process groups live."""
        return tuple(id(line.group) for line in self.lines)

    @cached_property
    def is_fake(self) -> bool:
        """Whether the collectives do nothing, as in simulations."""
        return any(dist.get_backend(line.group) == "fake" for line in self.lines)

    @cached_property
    def num_combined(self) -> int:
        """Of how many ranks results are: a fake process group leaves each message as it is."""
        return 1 if self.is_fake else prod(len(line.ranks) for line in self.lines)

    @property
    def connects_late(self) -> bool:
        """Whether the first collective makes communicators, which take memory, as NCCL's do."""
        return self.device.type != "cpu" and has_index(self.device) and not self.is_fake

    def connect(self) -> None:
        """Makes them now. Collective: as `all_reduce_`."""
        numbers = torch.zeros(1, dtype=torch.float64, device=self.device)
        self.all_reduce_(numbers, doing="connecting the ranks of a Clipper")

    def all_reduce_(
        self, numbers: Tensor, op: Any = dist.ReduceOp.SUM, *, doing: str = "an all-reduce"
    ) -> None:
        """The sum or the maximum over the ranks, in place; the same bits on each.

        Args:
            doing: what for, as the other ranks' error has it where the collective fails.

        Raises:
            CollectiveError: on all ranks that still can, as in all methods here; LayoutError if
                none is missing, and they do different things.

        Collective: one all-reduce; one all-gather for each further line. Another all-reduce would
            not do: along other lines it may add in another order.
        """
        meeting = self._meeting(doing)
        if self.lines:
            self.lines[0].all_reduce_(numbers, op, meeting)
        for line in self.lines[1:]:
            rows = line.all_gather(numbers, meeting)
            if not self.is_fake:
                numbers.copy_(combine(rows, op == dist.ReduceOp.MAX))

    def all_gather(self, numbers: Tensor, *, doing: str = "an all-gather") -> Tensor:
        """The numbers of all ranks, in an order that is the same on each.

        Shapes: numbers: [n]; the result: [num_combined, n].

        Collective: an all-gather for each line.
        """
        rows, meeting = numbers, self._meeting(doing)
        for line in self.lines:
            rows = line.all_gather(rows.flatten(), meeting)
        return numbers[None] if self.is_fake else rows.view(-1, len(numbers))

    @with_real_values()
    def all_gather_objects(
        self, mine: T, *, doing: str = "an all-gather of objects"
    ) -> dict[int, T]:
        """A small object of every rank, by global rank, in order.

        Collective: two all-gathers for each line. For setup, and for what happens rarely.
        """
        found = {dist.get_rank(): mine}
        if self.is_fake:  # it would copy the object once for each simulated rank
            return found
        with as_current(self.device):
            for line in self.lines:
                parts = line.all_gather_objects(found, self.device, self._meeting(doing))
                found = {rank: each for part in parts for rank, each in part.items()}
        return dict(sorted(found.items()))

    def _meeting(self, doing: str) -> Meeting:
        return Meeting(self._all_ranks, doing)

    @cached_property
    def _all_ranks(self) -> tuple[int, ...]:
        of_lines = {rank for line in self.lines for rank in line.ranks}
        return self.ranks or tuple(sorted(of_lines))


def combine(rows: Tensor, is_max: bool) -> Tensor:
    """The maximum or the sum of rows: the same bits on any device, which `sum` does not promise.

    Shapes: rows: [m, n]; the result: [n].
    """
    if is_max:
        return rows.amax(0)
    while len(rows) > 1:
        half = len(rows) // 2
        pairs = rows[:half] + rows[half : 2 * half]
        rows = torch.cat([pairs, rows[2 * half :]]) if len(rows) % 2 else pairs
    return rows[0]


def with_index(
    device: torch.device, tensors: Iterable[Tensor] = (), lines: Iterable[Line] = ()
) -> torch.device:
    """A device of that type: of the first of `tensors` which lies on one; else the one to which a
    process group is bound, the only one that NCCL takes then; else the current one.

    An accelerator that is not there, as in simulations, has no index, and neither has MPS.
    """
    if device.type in ("cpu", "meta"):
        return device
    device_module: Any = torch.get_device_module(device.type)
    if not device_module.is_available():
        return torch.device(device.type)
    locals_ = (local_tensor(each) if isinstance(each, DTensor) else each for each in tensors)
    bound = (line.group.bound_device_id for line in lines)
    for each in chain([device], (local.device for local in locals_), bound):
        if each is not None and each.type == device.type and has_index(each):
            return each
    if not hasattr(device_module, "current_device"):
        return device
    return torch.device(device.type, device_module.current_device())


def has_index(device: torch.device) -> bool:
    return cast("int | None", device.index) is not None


def as_current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one, where it has an index and torch can choose it."""
    if not has_index(device) or device.type == "cpu":
        return contextlib.nullcontext()
    device_module: Any = torch.get_device_module(device.type)
    if not hasattr(device_module, "device"):
        return contextlib.nullcontext()
    return cast("AbstractContextManager[Any]", device_module.device(device.index))


def _line(mesh: DeviceMesh, axis: int) -> Line:
    coordinate = cast("list[int]", mesh.get_coordinate())
    index = [slice(None) if i == axis else at for i, at in enumerate(coordinate)]
    along = mesh.mesh[tuple(index)]
    group = mesh.get_group(axis)
    know(group)
    return Line(group, tuple(cast("list[int]", along.tolist())))
