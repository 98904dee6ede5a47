"""The plan: which tensors this rank counts, in which group, and on which device."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from distclip import kernels
from distclip.errors import LayoutError
from distclip.norms.agreement import message_size
from distclip.norms.device import reduce_device
from distclip.norms.late_reads import LateReads
from distclip.norms.power_sums import Power, norm_dtype
from distclip.norms.units import Units, make_units, prepare_units
from distclip.norms.verify import verify
from distclip.policies import ClipTensorNorm, GroupSpec, Scope, vetoes
from distclip.sharding.arrivals import missing_ranks
from distclip.sharding.copies import has_new_copies
from distclip.sharding.layout import LocalParam
from distclip.sharding.mesh import ReduceMesh
from distclip.sharding.one_shot import OneShot, SymmetricMemory
from distclip.sharding.partial_gradients import may_lack_gradient
from distclip.sharding.rank_group import RankGroup
from distclip.sharding.read import ShardedParams

LOSS_SIZE = 2  # numbers in the message: the sum of the losses, and how many ranks gave one


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a policy: `plan.params[members]`.

    Of the policy it holds what decides how norms are measured and reduced, and no hyper-parameter:
    a limit that changes every step needs no new plan.

    Attributes:
        description: the policy as text, for people and for `verify`.
        counted: which of the parameters this rank adds to sums, [number of members], bool; None
            where it is all.
        num_elements: over all ranks; a float64 scalar. NaN where only a collective could tell.
        units: where the policy's scope is smaller than the group.
        num_slots, first_slot: how many units are reduced over all coordinates of the distinct
            axes, and the first that belongs to this rank's coordinate.
        tensor_names: of a group of `Plan.tensor_groups`, the tensor of each slot.
        norm_dtype: as `Plan.norm_dtype`.
    """

    name: str
    members: slice
    scope: Scope
    norm_type: float
    needs_weights: bool
    description: str
    counted: Tensor | None = field(compare=False)
    num_elements: Tensor = field(compare=False)
    units: Units | None = None
    num_slots: int = 0
    first_slot: int = 0
    norm_dtype: torch.dtype = torch.float32
    tensor_names: Sequence[str] = ()

    @property
    def power(self) -> Power:
        return Power(self.norm_type, self.norm_dtype)

    @property
    def slots_size(self) -> int:
        """How many numbers are reduced for units."""
        return self.power.num_partials * self.num_slots

    @property
    def payload_size(self) -> int:
        """How many numbers are reduced: for the total, the sharded units, and their weights."""
        num_norms = 1 + self.num_slots * (2 if self.needs_weights else 1)
        return self.power.num_partials * num_norms


class Steps(Protocol):
    """What optimizers do with the factors of a plan; `training.folding.Steps`."""

    def lines(self, plan: Plan) -> Iterable[str]: ...


@dataclass
class Calls:
    """What is known from earlier calls with a plan, on accelerators.

    Attributes:
        number: how many collectives of a step there were.
        late: numbers that are read some steps later.
        reduces: some rank had a gradient that must be reduced first, in one step or more.
        is_settled: no rank has had one, and in the last step none lacked one.
        steps: says what the optimizers do, which took the last step or are attached.
    """

    number: int = 0
    late: LateReads = field(default_factory=LateReads)
    reduces: bool = False
    is_settled: bool = False
    steps: Steps | None = None


@dataclass(frozen=True)
class Plan:
    """Every parameter that this rank holds, in groups, and the ranks to reduce over.

    Attributes:
        reduce_mesh: None where no rank holds elements that another lacks: nothing is reduced then.
        device: where the partial sums are combined and reduced.
        norm_dtype: in which norms are reported and judged: float32, or float64 where every
            parameter is float64 and no rank may hold others that are not.
        mesh: the ranks that train together, where a mesh says it, even if nothing is reduced.
        rule: what must be the same on all ranks beside the policies, as text.
        copied_dtensors: the indices of parameters of which another rank may have a gradient that
            must be reduced before it is measured, while this one has none.
        tensor_groups: for each of `groups` one with Scope.TENSOR, which is only measured, in steps
            that want the norm of every tensor; empty where no step does. Each tensor of the model
            has a slot in it.
        judges_loss: a policy may leave out steps, by the mean of the ranks' losses as well.
        ranks: those that train together, where something says it; see `average_loss`.
        one_shot: how the sums travel through symmetric memory, where they do.
        not_one_shot: why they do not, although that was asked for.
    """

    params: Sequence[LocalParam]
    reduce_mesh: ReduceMesh | None
    groups: Sequence[ParamGroup]
    device: torch.device
    norm_dtype: torch.dtype = torch.float32
    mesh: ReduceMesh | None = None
    rule: str = ""
    copied_dtensors: Sequence[int] = ()
    tensor_groups: Sequence[ParamGroup] = ()
    judges_loss: bool = False
    ranks: RankGroup | None = field(default=None, compare=False, repr=False)
    one_shot: OneShot | None = field(default=None, compare=False, repr=False)
    not_one_shot: str = ""
    calls: Calls = field(default_factory=Calls, compare=False, repr=False)

    @cached_property
    def message_size(self) -> int:
        """How many numbers each rank sends in the all-reduce.

        The same in every step: where ranks do not agree which step wants the norms of tensors,
        their tags then differ, and not the lengths of their messages, which nobody would notice.
        """
        sizes = [group.payload_size for group in self.groups]
        sizes += [group.slots_size for group in self.tensor_groups]
        return message_size([*sizes, LOSS_SIZE * self.judges_loss])

    @cached_property
    def names(self) -> list[str]:
        """Of all parameters."""
        return [param.name for param in self.params]

    @cached_property
    def group_of(self) -> dict[int, int]:
        """The index of each parameter's group, by the parameter's id."""
        each = enumerate(self.groups)
        return {id(p.param): k for k, group in each for p in self.params[group.members]}

    @property
    def parameters_text(self) -> str:
        """The names of all parameters, in short; "" where ranks hold different ones."""
        mesh = self.reduce_mesh
        if mesh is not None and mesh.holds_distinct:
            return ""
        names = ",".join(self.names)
        return f"{len(self.params)} parameters, names {zlib.crc32(names.encode()):x}"

    def verify(self) -> None:
        """Compares the plans of all ranks, and the bits of parameters that are laid out as copies.

        Meant for the start of a run, because it reads every parameter once.

        Raises:
            LayoutError: on every rank, with the same message: a parameter that a rank lacks or
                lays out otherwise, copies that differ, other policies, another order of groups,
                another `on_nonfinite`, `max_consecutive_skips` or `tensor_norms`, another mesh. A
                rank that does not call within the timeout of the process group is named on the
                ranks that did.

        Collective: all ranks of the mesh (without one: of the world) must call, and no others.
        """
        policies = [f"{group.name}: {group.description}" for group in self.groups]
        verify(self.params, self.mesh, [*policies, self.rule], self.device)

    def connect(self) -> None:
        """Makes NCCL's communicators, or the first step would, where memory is at its peak.

        Raises:
            LayoutError: some rank does not call.

        Collective: on accelerators all ranks of the reduce mesh.
        """
        if self.reduce_mesh is None or not self.reduce_mesh.rank_group.connects_late:
            return
        ranks = self.reduce_mesh.rank_group
        if missing := missing_ranks(ranks, "connect"):
            raise LayoutError(
                f"cannot make a Clipper: the ranks {missing} of its mesh have not made theirs "
                f"within the timeout of the process group, and the steps would wait for them. Make "
                f"it on all ranks of the mesh, with the same `mesh=`, and on no others."
            )
        ranks.connect()

    def has_new_copies(self, tensors: Sequence[Tensor]) -> bool:
        """Whether `tensors`, which are laid out as `params`, have yet to be compared as copies."""
        return self.mesh is not None and has_new_copies(self.params, tensors, self.mesh)

    def without_params(self) -> Plan:
        """The plan for any parameters that are laid out alike; it keeps no tensor alive."""
        nothing = torch.empty(0, device="meta")
        params = [replace(param, name="", param=nothing) for param in self.params]
        return replace(self, params=params)

    def __str__(self) -> str:
        header = [
            "group",
            "policy",
            "layout",
            "tensors",
            "elements",
            "counted here",
            "bytes measured",
        ]
        rows = [header]
        for group in self.groups:
            by_layout: dict[str, list[LocalParam]] = {}
            for param in self.params[group.members]:
                by_layout.setdefault(str(param.layout), []).append(param)
            for layout, params in by_layout.items():
                rows.append([group.name, group.description, layout, *_sizes(params)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.append(self._collective())
        if self.calls.steps is not None:
            lines.extend(self.calls.steps.lines(self))
        return "\n".join(lines)

    def _collective(self) -> str:
        if self.reduce_mesh is None:
            return "no collective: no rank holds elements that another lacks"
        size = self.message_size
        axes = " x ".join(f"{axis}={self.reduce_mesh.size(axis)}" for axis in self.reduce_mesh.axes)
        num_lines = len(self.reduce_mesh.rank_group.lines)
        how = f", in {num_lines} steps, one along each axis" if num_lines > 1 else ""
        if self.one_shot is not None:
            how = ", through symmetric memory"
        elif self.not_one_shot:
            how += f", not through symmetric memory ({self.not_one_shot})"
        numbers = f"{size} float64 ({8 * size} bytes)"
        return f"one all-reduce of {numbers} over {axes}, on {self.device}{how}"


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
        num_elements=torch.full((), size, dtype=torch.float64, device=device),
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


def _sizes(params: Sequence[LocalParam]) -> list[str]:
    """Numbers of tensors, of elements here, of those that this rank counts, and of bytes."""
    weights = [param.weights for param in params]
    elements = sum(w.numel() for w in weights)
    counted = sum(w.numel() for p, w in zip(params, weights, strict=True) if p.counted)
    num_bytes = sum(w.numel() * w.element_size() for w in weights)
    return [str(len(params)), f"{elements:,}", f"{counted:,}", f"{num_bytes:,}"]
