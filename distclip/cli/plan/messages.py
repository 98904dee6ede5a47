"""What ranks send each other, from the plans of one rank for each pipeline stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from distclip.cli.console import UserError
from distclip.norms.make_plan import gathers_slots
from distclip.norms.plan import ParamGroup, Plan
from distclip.sharding.copies import compares_copies


@dataclass(frozen=True)
class Messages:
    """What the ranks send each other.

    Attributes:
        numbers: float64 in the all-reduce of each step, 0 where there is none.
        axes: those that it reduces over, with their sizes.
        all_gathers: how many follow the all-reduce, along the other axes of a part of the world.
        at_construction: the collectives that make a Clipper, each with what it is for.
    """

    numbers: int
    axes: dict[str, int]
    all_gathers: int
    at_construction: list[str]

    @property
    def ranks(self) -> int:
        return prod(self.axes.values())


def with_all_slots(plans: Sequence[Plan]) -> Plan:
    """The first plan, with the slots of all stages, of which a simulated rank knows its own."""
    try:
        every = list(zip(*(plan.groups for plan in plans), strict=True))
        of_tensors = list(zip(*(plan.tensor_groups for plan in plans), strict=True))
    except ValueError:
        numbers = sorted({len(plan.groups) for plan in plans})
        raise UserError(
            f"the pipeline stages have {' or '.join(map(str, numbers))} parameter groups, and "
            f"their ranks would send messages of different sizes. Make the same groups on each"
        ) from None
    groups = [_joined(each) for each in every]
    tensor_groups = [
        replace(each[0], num_slots=sum(len(group.units.row_names) for group in each if group.units))
        for each in of_tensors
    ]
    return replace(plans[0], groups=groups, tensor_groups=tensor_groups)


def _joined(groups: Sequence[ParamGroup]) -> ParamGroup:
    return replace(groups[0], num_slots=sum(group.num_slots for group in groups))


def planned_messages(plan: Plan) -> Messages:
    at_construction = list(_at_construction(plan))
    if plan.reduce_mesh is None:
        return Messages(0, {}, 0, at_construction)
    mesh = plan.reduce_mesh
    return Messages(
        plan.message_size,
        {axis: mesh.size(axis) for axis in mesh.axes},
        len(mesh.rank_group.lines) - 1,
        at_construction,
    )


def _at_construction(plan: Plan) -> Iterator[str]:
    """What `Clipper` starts, in this order."""
    mesh = plan.reduce_mesh
    if plan.mesh is not None and compares_copies(plan.params, plan.mesh):
        yield "all-gather of objects: whether copies are alike"
    if mesh is None:
        return
    if gathers_slots(plan.groups, mesh):
        yield "all-gather of objects: how many norms each stage has"
    yield "all-reduce of 1 float64, on accelerators: makes NCCL's communicators"
    if plan.tensor_groups:
        without = replace(plan, tensor_groups=()).message_size
        yield f"all-reduce of {without} float64: whether all ranks want tensor norms"
        if mesh.distinct:
            yield "all-gather of objects: the names of the tensors of each stage"
