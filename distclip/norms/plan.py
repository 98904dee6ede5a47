"""The plan: which tensors this rank counts, in which group, and on which device."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from distclip.errors import LayoutError
from distclip.norms.agreement import message_size
from distclip.norms.late_reads import LateReads
from distclip.norms.power_sums import Power
from distclip.norms.units import Units
from distclip.norms.verify import verify
from distclip.policies import Scope
from distclip.sharding.arrivals import missing_ranks
from distclip.sharding.copies import has_new_copies
from distclip.sharding.layout import LocalParam
from distclip.sharding.mesh import ReduceMesh
from distclip.sharding.one_shot import OneShot
from distclip.sharding.rank_group import RankGroup

LOSS_SIZE = 2  # numbers in the message: the sum of the losses, and how many ranks gave one


@dataclass(frozen=True, eq=False)
class ParamGroup:
    """Parameters that share a policy: `plan.params[members]`.

    Of the policy it holds what decides how norms are measured and reduced, and no hyper-parameter:
    a limit that changes every step needs no new plan.

    Attributes:
        description: the policy as text, for people and for `verify`.
        counted: which of the parameters this rank adds to sums, [number of members], bool; None
            where it is all.
        num_elements: over all ranks; NaN where only a collective could tell.
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
    counted: Tensor | None
    num_elements: float
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
        sizes: of each group by its name, `num_elements` on the plan's device; float64 scalars.
        steps: says what the optimizers do, which took the last step or are attached.
    """

    number: int = 0
    late: LateReads = field(default_factory=LateReads)
    reduces: bool = False
    is_settled: bool = False
    sizes: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    steps: Steps | None = None


@dataclass(frozen=True, eq=False, repr=False)
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
    ranks: RankGroup | None = None
    one_shot: OneShot | None = None
    not_one_shot: str = ""
    calls: Calls = field(default_factory=Calls)

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


def _sizes(params: Sequence[LocalParam]) -> list[str]:
    """Numbers of tensors, of elements here, of those that this rank counts, and of bytes."""
    weights = [param.weights for param in params]
    elements = sum(w.numel() for w in weights)
    counted = sum(w.numel() for p, w in zip(params, weights, strict=True) if p.counted)
    num_bytes = sum(w.numel() * w.element_size() for w in weights)
    return [str(len(params)), f"{elements:,}", f"{counted:,}", f"{num_bytes:,}"]
