"""The plans of simulated ranks, as numbers and strings: who holds and who counts which tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from math import prod
from typing import Any, NamedTuple

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distclip.cli.console import UserError, progress
from distclip.cli.plan.messages import Messages, planned_messages, with_all_slots
from distclip.cli.plan.users_model import Function, Made, make_model, users_code
from distclip.clipper import Clipper
from distclip.norms.plan import Plan
from distclip.policies import ClipNorm, Policy
from distclip.sharding.layout import LocalParam
from distclip.sharding.mesh import ReduceMesh
from distclip.sharding.read import named_parameters
from distclip.sharding.shard import FlatBlockShard, FlatShard, Shard
from distclip.torch_private import simulated_rank


@dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
        target: how the user names `function`.
        mesh: the axes and their sizes; the last axis counts fastest.
        policy, tensor_norms: as `Clipper` has them; None where the function makes the Clipper.
    """

    target: str
    function: Function
    mesh: Mapping[str, int]
    policy: Policy[Any] | None
    tensor_norms: bool

    @property
    def world_size(self) -> int:
        return prod(self.mesh.values())

    def coordinate(self, rank: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for axis, size in reversed(self.mesh.items()):
            rank, found[axis] = divmod(rank, size)
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
            `copied_over` counts.
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


@dataclass(frozen=True)
class PlannedRanks:
    """`rank`, and beside it one rank for each other coordinate on the distinct axes."""

    rank: PlannedRank
    stages: list[PlannedRank]
    policies: dict[str, str]
    messages: Messages


class _Plan(NamedTuple):
    """A plan whose process groups have ended, and what it says of its rank."""

    plan: Plan
    rank: PlannedRank


def plan_ranks(request: Request, rank: int) -> PlannedRanks:
    """The plan of `rank`, and of one rank for each other coordinate on the distinct axes.

    Raises:
        UserError: the model cannot be made or planned.
    """
    mine = _plan(request, rank)
    others = _ranks_of_other_stages(request, mine)
    found = {rank: mine}
    if others:
        with progress("pipeline stages", len(others) + 1) as advance:
            advance()
            for other in others:
                found[other] = _plan(request, other)
                advance()
    stages = [found[each].rank for each in sorted(found)]
    policies = {group.name: group.description for group in mine.plan.groups}
    messages = planned_messages(with_all_slots([each.plan for each in found.values()]))
    return PlannedRanks(mine.rank, stages, policies, messages)


def _plan(request: Request, rank: int) -> _Plan:
    with simulated_rank(rank, request.world_size):
        with users_code(f"cannot make the mesh {dict(request.mesh)}"):
            mesh = init_device_mesh(
                "cpu", tuple(request.mesh.values()), mesh_dim_names=tuple(request.mesh)
            )
        made = make_model(request.function, request.target, mesh)
        plan = _clipper(request, made, mesh).plan
        _check_coordinate(request, rank, plan)
        found = _planned_rank(request, rank, plan)
    return _Plan(plan.without_params(), found)


def _clipper(request: Request, made: Made, mesh: DeviceMesh) -> Clipper:
    if isinstance(made, Clipper):
        if request.policy is not None or request.tensor_norms:
            raise UserError(
                f"--model {request.target}: it returned a Clipper, which has a policy and "
                f"`tensor_norms` of its own. Leave out --policy and --tensor-norms"
            )
        return made
    policy = ClipNorm(1.0) if request.policy is None else request.policy
    parts = [made] if isinstance(made, nn.Module) else made
    given = [named for part in parts for named in named_parameters(part)]
    with users_code(f"cannot plan the model of {request.target}"):
        return Clipper(
            made if isinstance(made, nn.Module) else given,
            policy,
            mesh=mesh,
            tensor_norms=request.tensor_norms,
            modules=parts,
        )


def _check_coordinate(request: Request, rank: int, plan: Plan) -> None:
    """Checks that the plan's mesh is the user's; a function may make another one."""
    mesh, expected = plan.mesh, request.coordinate(rank)
    for axis in () if mesh is None else mesh.axes:
        known = request.mesh.get(axis)
        if known is None and axis not in mesh.distinct:
            continue
        if known != mesh.size(axis) or expected[axis] != mesh.coordinate[axis]:
            raise UserError(
                f"--model {request.target}: its model lies on another mesh, {_text(mesh)}, in "
                f"which rank {rank} is number {mesh.coordinate[axis]} of {mesh.size(axis)} along "
                f"{axis!r}. Give --mesh the same axes in the same order"
            )


def _planned_rank(request: Request, rank: int, plan: Plan) -> PlannedRank:
    distinct = frozenset[str]() if plan.mesh is None else plan.mesh.distinct
    coordinate = request.coordinate(rank)
    tensors: list[PlannedTensor] = []
    gradients = weights = 0
    for group in plan.groups:
        for param in plan.params[group.members]:
            tensors += _planned_tensors(group.name, param, distinct)
            gradients += param.weights.nbytes
            weights += param.weights.nbytes if group.needs_weights else 0
    stage = {axis: index for axis, index in coordinate.items() if axis in distinct}
    return PlannedRank(rank, coordinate, stage, gradients, weights, tensors)


def _planned_tensors(
    group: str, param: LocalParam, distinct: frozenset[str]
) -> Iterator[PlannedTensor]:
    local, layout = param.weights, param.layout
    for shard in param.shards:
        held = _num_in_flat_buffer(shard.shard)
        yield PlannedTensor(
            shard.name,
            group,
            shard.global_shape,
            str(local.dtype).removeprefix("torch."),
            elements=shard.numel,
            held=local.numel() if held is None else held,
            counted=param.counted,
            sharded_over=tuple(sorted(layout.sharded - distinct)),
            copied_over=tuple(sorted(layout.replicated)),
            declared=layout.counted is not None,
        )


def _num_in_flat_buffer(shard: Shard) -> int | None:
    """Of the tensors that share a parameter; None for one that is all of it."""
    flat = shard.flat if isinstance(shard, FlatBlockShard) else shard
    return flat.numel if isinstance(flat, FlatShard) else None


def _ranks_of_other_stages(request: Request, mine: _Plan) -> list[int]:
    """The ranks at other coordinates on the distinct axes, and at the same on all others."""
    axes = list(mine.rank.stage)
    indices = product(*(range(request.mesh[axis]) for axis in axes))
    places = (mine.rank.coordinate | dict(zip(axes, index, strict=True)) for index in indices)
    return [rank for rank in map(request.rank_at, places) if rank != mine.rank.rank]


def _text(mesh: ReduceMesh) -> str:
    return ",".join(f"{axis}={mesh.size(axis)}" for axis in mesh.axes)
