"""What ranks raise together: an error of one of them, or that they do not make the same call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn, TypeVar

import torch.distributed as dist

from distclip.errors import CollectiveError, LayoutError
from distclip.norms.plan import Plan
from distclip.sharding.failures import by_text
from distclip.sharding.rank_group import RankGroup

T = TypeVar("T")


def raise_fault(fault: Exception | None, plan: Plan) -> NoReturn:
    """Raises the error that one or more ranks have found, on all ranks together.

    Args:
        fault: what this rank has found.

    Collective: on CPUs an all-gather of the texts, of which every rank raises the first.
    """
    found = None if fault is None else (_kind_of(fault), str(fault))
    if plan.device.type == "cpu":
        by_rank = gather_objects(found, rank_group(plan)).values()
        found = next((each for each in by_rank if each is not None), found)
    if found is None:
        found = (
            LayoutError,
            "cannot clip together: another rank has found an error, and raised it there.",
        )
    kind, text = found
    raise kind(text)


def _kind_of(fault: Exception) -> type[Exception]:
    kinds = (LayoutError, TypeError, ValueError)
    return next(kind for kind in kinds if isinstance(fault, kind))


def disagreement(plan: Plan, call: str) -> LayoutError:
    assert plan.reduce_mesh is not None
    found = ""
    if plan.device.type == "cpu":
        names = plan.names if plan.parameters_text and plan.parameters_text in call else []
        try:
            said = plan.reduce_mesh.rank_group.all_gather_objects(
                (call, names), doing=f"{call}; comparing the calls"
            )
        except (CollectiveError, LayoutError):  # messages of other sizes have ended it
            said = {}
        found = by_text({rank: text for rank, (text, _) in said.items()})
        found += _odd_parameter({rank: held for rank, (_, held) in said.items() if held})
    return LayoutError(
        f"cannot clip together: the ranks of this all-reduce do not make the same call "
        f"({found or 'their tags differ'}), and sums of different things would be added. Give the "
        f"Clipper the same policies, groups and `on_nonfinite` on every rank, and call it equally "
        f"often and in the same order, with the same `step=`."
    )


def _odd_parameter(names: Mapping[int, Sequence[str]]) -> str:
    """The first parameter that some ranks lack, or hold at another place; "" if there is none."""
    for place in range(max(map(len, names.values()), default=0)):
        at = {rank: held[place] if place < len(held) else None for rank, held in names.items()}
        if len({*at.values()}) > 1:
            for name in filter(None, at.values()):
                if lacking := [rank for rank, held in names.items() if name not in held]:
                    return f"; the ranks {lacking} do not have {name!r}"
            texts = [f"rank {rank}: {name!r}" for rank, name in at.items()]
            return f"; parameter {place} is {', '.join(texts[:8])}"
    return ""


def rank_group(plan: Plan) -> RankGroup | None:
    """The ranks that a plan's sums are reduced over; None for this rank alone."""
    return None if plan.reduce_mesh is None else plan.reduce_mesh.rank_group


def gather_objects(mine: T, group: RankGroup | None) -> dict[int, T]:
    """`mine` of every rank, by global rank. For what is rare, such as a failure on all ranks.

    Collective: an all-gather of objects over `group`; none where it is None.
    """
    if group is None:
        return {dist.get_rank() if dist.is_initialized() else 0: mine}
    return group.all_gather_objects(mine)
