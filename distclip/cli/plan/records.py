"""What is asked of a plan, and what it says of one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from distclip.cli.plan.users_code import Function
from distclip.policies import ClipNorm, Policy

DEFAULT_POLICY = ClipNorm(1.0)


@dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
        target: how the user names `function`.
        mesh: the axes and their sizes; the last axis counts fastest.
        policy, tensor_norms: as `Clipper` has them; the function may make one of its own.
    """

    target: str
    function: Function
    mesh: Mapping[str, int]
    policy: Policy[Any]
    tensor_norms: bool

    @property
    def world_size(self) -> int:
        return prod(self.mesh.values())

    def coordinate(self, rank: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for axis in reversed([*self.mesh]):
            rank, found[axis] = divmod(rank, self.mesh[axis])
        return {axis: found[axis] for axis in self.mesh}

    def rank_at(self, coordinate: Mapping[str, int]) -> int:
        rank = 0
        for axis, size in self.mesh.items():
            rank = rank * size + coordinate[axis]
        return rank


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the model on one rank.

    Attributes:
        elements: of the whole tensor; `held` of them are on this rank.
        sharded_over: the axes whose ranks hold different elements of it.
        copied_over: the axes whose ranks hold the same elements.
        counted: whether this rank adds its elements to the total.
        declared: a `Layout(counted=...)` says so. Else the rank at index 0 of each axis in
            `copied_over` counts, or each rank for itself where nothing is reduced.
    """

    name: str
    group: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    held: int
    counted: bool
    sharded_over: tuple[str, ...]
    copied_over: tuple[str, ...]
    declared: bool


@dataclass(frozen=True)
class PlannedRank:
    """What one rank holds, counts and reads.

    Attributes:
        stage: its coordinate on the axes whose ranks hold different parameters.
        gradient_bytes, weight_bytes: what one step reads to measure them.
    """

    rank: int
    coordinate: dict[str, int]
    stage: dict[str, int]
    gradient_bytes: int
    weight_bytes: int
    tensors: list[PlannedTensor] = field(repr=False)

    @property
    def elements(self) -> int:
        """Of the whole tensors that this rank has a part of."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def held(self) -> int:
        return sum(tensor.held for tensor in self.tensors)

    @property
    def counted(self) -> int:
        return sum(tensor.held for tensor in self.tensors if tensor.counted)

    def to_dict(self) -> dict[str, Any]:
        numbers = {"elements": self.elements, "held": self.held, "counted": self.counted}
        return {**asdict(self), **numbers}
