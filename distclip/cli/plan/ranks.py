"""The plans of simulated ranks, as numbers and strings: who holds and who counts which tensor."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from torch.distributed.device_mesh import init_device_mesh

from distclip.cli.console import UserError, progress
from distclip.cli.plan.messages import Messages, planned_messages, with_all_slots
from distclip.cli.plan.records import PlannedRank, PlannedTensor, Request
from distclip.cli.plan.users_code import users_code
from distclip.cli.plan.users_model import make_clipper
from distclip.norms.plan import Plan
from distclip.sharding.layout import LocalParam
from distclip.sharding.mesh import ReduceMesh
from distclip.sharding.shard import FlatBlockShard, FlatShard, Shard
from distclip.torch_private import simulated_rank


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
    if not any(stage.tensors for stage in stages):
        raise UserError(f"--model {request.target}: its model has no parameters to clip")
    policies = {group.name: group.description for group in mine.plan.groups}
    messages = planned_messages(with_all_slots([each.plan for each in found.values()]))
    return PlannedRanks(mine.rank, stages, policies, messages)


def _plan(request: Request, rank: int) -> _Plan:
    with simulated_rank(rank, request.world_size):
        with users_code(f"cannot make the mesh {dict(request.mesh)}"):
            mesh = init_device_mesh(
                "cpu", tuple(request.mesh.values()), mesh_dim_names=tuple(request.mesh)
            )
        plan = make_clipper(request, mesh).plan
        _check_coordinate(request, rank, plan)
        found = _Plan(plan.without_params(), _planned_rank(request, rank, plan))
        del plan, mesh
    gc.collect()  # sharded models lie in cycles, and those of all stages would add up
    return found


def _check_coordinate(request: Request, rank: int, plan: Plan) -> None:
    """Checks that the plan's mesh is the user's; a function may make another one."""
    if (mesh := plan.mesh) is None:
        return
    expected = request.coordinate(rank)
    for axis in mesh.axes if mesh.axes != ("world",) else ():
        index, size = mesh.coordinate[axis], mesh.size(axis)
        if (index, size) != (expected.get(axis), request.mesh.get(axis)):
            raise UserError(
                f"--model {request.target}: its model lies on another mesh, {_text(mesh)}, in "
                f"which rank {rank} is number {index} of {size} along {axis!r}. Give --mesh the "
                f"same axes in the same order"
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
