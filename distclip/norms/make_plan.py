"""Makes plans: of all parameters, of some of them, and with the norm of every tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from distclip import kernels
from distclip.norms.device import reduce_device
from distclip.norms.plan import ParamGroup, Plan
from distclip.norms.power_sums import norm_dtype
from distclip.norms.units import make_units, prepare_units
from distclip.policies import ClipTensorNorm, GroupSpec, Scope, vetoes
from distclip.sharding.layout import LocalParam
from distclip.sharding.mesh import ReduceMesh
from distclip.sharding.one_shot import SymmetricMemory
from distclip.sharding.partial_gradients import may_lack_gradient
from distclip.sharding.read import ShardedParams


def make_plan(
    sharded: ShardedParams,
    specs: Sequence[GroupSpec],
    rule: str = "",
    symmetric_memory: SymmetricMemory | None = None,
) -> Plan:
    """The plan for groups of `sharded.params`.

    Args:
        rule: see `Plan`.
        symmetric_memory: where the sums are to travel through it.

    Chooses and compiles the kernels for accelerators as well, or the first step would.

    Raises:
        LayoutError, ValueError: it is unknown which elements form the units of a policy; the device
            has no float64.

    Collective: where ranks along a distinct axis have units of their own, an all-gather of a few
        numbers over the reduce mesh; see `SymmetricMemory.open`.
    """
    params, mesh = sharded.params, sharded.reduce_mesh
    device = reduce_device(params, mesh)
    dtype = _norm_dtype(params, mesh)
    groups = [
        _make_group(spec, params[spec.members], device, dtype, sharded.may_differ) for spec in specs
    ]
    for group in groups:
        on_accelerator = [p for p in params[group.members] if not p.param.is_cpu]
        kernels.prepare([p.weights for p in on_accelerator if not p.param.is_meta], group.norm_type)
        if group.units is not None:
            prepare_units(group.units, params[group.members], group.norm_type)
    if mesh is not None and gathers_slots(groups, mesh):
        groups = _with_slots_of_other_ranks(groups, mesh)
    copied = [i for i, param in enumerate(params) if may_lack_gradient(param.param)]
    judges = any(vetoes(spec.policy) for spec in specs)
    plan = Plan(params, mesh, groups, device, dtype, sharded.mesh, rule, copied)
    if judges:
        plan = replace(plan, judges_loss=True, ranks=sharded.ranks)
    return _with_symmetric_memory(plan, symmetric_memory)


def with_tensor_groups(plan: Plan, symmetric_memory: SymmetricMemory | None = None) -> Plan:
    """The plan with `tensor_groups`.

    Collective: where ranks along a distinct axis hold tensors of their own, an all-gather of the
        names of the model's tensors over the reduce mesh; see `SymmetricMemory.open`.
    """
    made = [_of_tensors(group, plan.params[group.members], plan.device) for group in plan.groups]
    mesh = plan.reduce_mesh
    if mesh is not None and mesh.distinct:
        made = _with_tensors_of_other_ranks(made, mesh)
    return _with_symmetric_memory(replace(plan, tensor_groups=made), symmetric_memory)


def _with_symmetric_memory(plan: Plan, symmetric_memory: SymmetricMemory | None) -> Plan:
    if plan.reduce_mesh is None or symmetric_memory is None:
        return plan
    opened = symmetric_memory.open(plan.reduce_mesh.rank_group, plan.message_size)
    if isinstance(opened, str):
        return replace(plan, not_one_shot=opened)
    return replace(plan, one_shot=opened)


def _of_tensors(
    group: ParamGroup, params: Sequence[LocalParam], device: torch.device
) -> ParamGroup:
    units = make_units(params, ClipTensorNorm(math.inf, group.norm_type), device)
    prepare_units(units, params, group.norm_type)
    return replace(
        group,
        scope=Scope.TENSOR,
        needs_weights=False,
        units=units,
        num_slots=units.num_units,
        first_slot=0,
        tensor_names=units.row_names,
    )


class PlanOfMembers(NamedTuple):
    """The plan for some parameters of one group.

    Attributes:
        rows: of the group's units, those of these parameters; of the group's parameters, these.
    """

    plan: Plan
    rows: Tensor


def plan_of_members(plan: Plan, group: ParamGroup, members: Sequence[int]) -> PlanOfMembers:
    """The plan for some parameters of a group, by their indices in it; for policies per tensor.

    It reduces only where ranks hold parts of their units. Elsewhere its total norm is that of this
    rank's elements.
    """
    params = [plan.params[group.members][i] for i in members]
    if group.units is None:
        units, rows = None, torch.tensor(members, dtype=torch.int64, device=plan.device)
    else:
        units, rows = group.units.of_members(members)
    num_slots = 0 if units is None else units.num_slots
    if not num_slots:
        params = [replace(param, counted=True) for param in params]
    part = replace(
        group,
        members=slice(0, len(params)),
        counted=_counted(params, plan.device),
        units=units,
        num_slots=num_slots,
        first_slot=0,
    )
    mesh = plan.reduce_mesh if num_slots else None
    made = Plan(params, mesh, [part], plan.device, plan.norm_dtype, plan.mesh, plan.rule)
    return PlanOfMembers(made, rows)


def _norm_dtype(params: Sequence[LocalParam], mesh: ReduceMesh | None) -> torch.dtype:
    # The same on every rank, because the payload depends on it. Ranks along a distinct axis hold
    # other parameters, and only a collective could tell their dtypes.
    if mesh is not None and mesh.holds_distinct:
        return torch.float32
    return norm_dtype(param.param.dtype for param in params)


def _make_group(
    spec: GroupSpec,
    params: Sequence[LocalParam],
    device: torch.device,
    dtype: torch.dtype,
    may_differ: bool,
) -> ParamGroup:
    policy = spec.policy
    whole = policy.scope in (Scope.MODEL, Scope.ELEMENT)
    units = None if whole else make_units(params, policy, device)
    size = math.nan if may_differ else sum(s.numel for param in params for s in param.shards)
    return ParamGroup(
        spec.name,
        spec.members,
        policy.scope,
        policy.norm_type,
        policy.needs_weights,
        str(policy),
        counted=_counted(params, device),
        num_elements=size,
        units=units,
        num_slots=0 if units is None else units.num_slots,
        norm_dtype=dtype,
    )


def gathers_slots(groups: Sequence[ParamGroup], mesh: ReduceMesh) -> bool:
    """Whether the ranks tell each other how many slots they have, in an all-gather."""
    return bool(mesh.distinct) and any(group.units is not None for group in groups)


def _counted(params: Sequence[LocalParam], device: torch.device) -> Tensor | None:
    counted = [param.counted for param in params]
    return None if all(counted) else torch.tensor(counted, dtype=torch.bool, device=device)


def _with_slots_of_other_ranks(groups: Sequence[ParamGroup], mesh: ReduceMesh) -> list[ParamGroup]:
    """Ranks along the distinct axes hold different units: each coordinate gets slots of its own."""
    here = tuple(mesh.coordinate[axis] for axis in sorted(mesh.distinct))
    mine = (here, [group.num_slots for group in groups])
    doing = "making a Clipper: comparing how many units the ranks have"
    slots_at = dict(mesh.rank_group.all_gather_objects(mine, doing=doing).values())
    before = [slots for coordinate, slots in slots_at.items() if coordinate < here]
    return [
        replace(
            group,
            num_slots=sum(slots[i] for slots in slots_at.values()),
            first_slot=sum(slots[i] for slots in before),
        )
        for i, group in enumerate(groups)
    ]


class _Tensors(NamedTuple):
    """The names of a rank's tensors, in each group, and its coordinate on the distinct axes."""

    coordinate: tuple[int, ...]
    names: Sequence[Sequence[str]]


def _with_tensors_of_other_ranks(
    groups: Sequence[ParamGroup], mesh: ReduceMesh
) -> list[ParamGroup]:
    """Each coordinate of the distinct axes gets slots for its tensors; one of its ranks names them.

    Tensors of one name that differ along an axis get its index as well: "layers.0.w (pp 1)".
    """
    axes = sorted(mesh.distinct)
    here = tuple(mesh.coordinate[axis] for axis in axes)
    is_first = all(mesh.coordinate[a] == 0 for a in mesh.axes if a not in mesh.distinct)
    mine = _Tensors(here, [group.tensor_names for group in groups]) if is_first else None
    doing = "making a Clipper: comparing the names of tensors"
    found = mesh.rank_group.all_gather_objects(mine, doing=doing).values()
    names_at = dict(sorted(each for each in found if each is not None))
    made: list[ParamGroup] = []
    for i, group in enumerate(groups):
        of_group = {coordinate: names[i] for coordinate, names in names_at.items()}
        before = sum(len(names) for coordinate, names in of_group.items() if coordinate < here)
        names = _with_indices(of_group, axes)
        made.append(replace(group, num_slots=len(names), first_slot=before, tensor_names=names))
    return made


def _with_indices(names_at: dict[tuple[int, ...], Sequence[str]], axes: Sequence[str]) -> list[str]:
    coordinates: dict[str, list[tuple[int, ...]]] = {}
    for coordinate, names in names_at.items():
        for name in names:
            coordinates.setdefault(name, []).append(coordinate)
    unique: list[str] = []
    for coordinate, names in names_at.items():
        for name in names:
            columns = zip(axes, coordinate, zip(*coordinates[name], strict=True), strict=True)
            differ = [f"{axis} {index}" for axis, index, others in columns if len({*others}) > 1]
            unique.append(f"{name} ({', '.join(differ)})" if differ else name)
    return unique
