"""From local to total: the one collective of a step, and the root that follows it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distclip import powers
from distclip.plan import Plan


def all_reduce_(sums: Tensor, plan: Plan) -> None:
    """Joins the columns of all ranks in place; the same bits on every rank afterwards.

    Shapes: sums: [columns of all groups], float64.
    Collective: one all-reduce over the team; none if the plan has no team.
    """
    if plan.team is None:
        return
    maximum = any(math.isinf(group.norm_type) for group in plan.groups)
    dist.all_reduce(sums, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, group=plan.team.group)


def norms(sums: Tensor, plan: Plan) -> list[Tensor]:
    """The norm of each group, from joined sums: float64 scalars."""
    columns = torch.split(sums, [group.num_columns for group in plan.groups])
    return [powers.root(c, group.norm_type) for c, group in zip(columns, plan.groups, strict=True)]


def sum_(sums: Tensor, groups: Sequence[dist.ProcessGroup]) -> None:
    """Adds up `sums` over the ranks of each group in turn, in place.

    Collective: one all-reduce a group.
    """
    for group in groups:
        dist.all_reduce(sums, group=group)


def gathered(mine: Any, plan: Plan) -> dict[int, Any]:
    """`mine` of every rank, by global rank. For what happens rarely: after a failure on all ranks together.

    Collective: an all-gather of objects over the team; none if the plan has no team.
    """
    if plan.team is None:
        return {dist.get_rank() if dist.is_initialized() else 0: mine}
    ranks = dist.get_process_group_ranks(plan.team.group)
    everyone: list[Any] = [None] * len(ranks)
    dist.all_gather_object(everyone, mine, group=plan.team.group)
    return dict(zip(ranks, everyone, strict=True))
