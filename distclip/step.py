"""One clipping step on local gradients: measure -> all-reduce -> limit -> scale.

`decide` does the first three and writes nothing; `Decision.apply_` writes. Torch's functions, all
methods of `Clipper` and the adapters are clients of these two: the order of a step is here only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from distclip import kernels
from distclip.arguments import check_function
from distclip.errors import LayoutError
from distclip.limits import is_shared, make_nan_, read_limits
from distclip.nonfinite import (
    NonFiniteSearch,
    OnNonFinite,
    coefficient_under,
    limit_under,
)
from distclip.norms.agreement import Header
from distclip.norms.measure import GroupMeasurement, TensorLists, measure
from distclip.norms.plan import ParamGroup, Plan
from distclip.norms.power_sums import norm_of_norms
from distclip.norms.reduce import GroupNorms, raise_fault, rank_group, total_norms
from distclip.parameters import as_scalar, gradients_from
from distclip.policies import NormContext, Policy, Scope, StatelessPolicy
from distclip.report import GroupFigures, Report
from distclip.scaling import (
    check_real,
    check_writable,
    clamp_,
    scale_,
    scale_units_,
    zero_,
)
from distclip.sharding.local_tensors import reducible, unreduced_text
from distclip.torch_private import has_values, is_capturing, outside_of_graphs


class ReduceGradients(Protocol):
    """Reduces the gradients that have no values yet, and returns all; see `reduce_together`."""

    def __call__(self, everywhere: bool, alike: bool) -> list[Tensor | None]: ...


class GroupClip(NamedTuple):
    """What a policy says about its parameter group.

    Attributes:
        norm: of the whole group, float64.
        limits, coefficients: float64; [] or [num_units]. Limits are None where the policy only
            measures.
        next_state: of the policy, if this step counts.
        valid: whether the limits are some; see `limits.Limits`.
    """

    norm: Tensor
    limits: Tensor | None
    coefficients: Tensor
    next_state: Any
    valid: Tensor | None = None


@dataclass
class Decision:
    """What one step found, and what is to happen to the gradients. `Clipper.decide` makes it.

    Attributes:
        report: the figures of the step; see `Report`.
        total_norm: over all groups, before clipping; float64 scalar.
    """

    plan: Plan = field(repr=False)
    gradients: Sequence[Tensor | None] = field(repr=False)
    tensor_lists: Sequence[TensorLists | None] = field(repr=False)
    clips: Sequence[GroupClip] = field(repr=False)
    total_norm: Tensor
    scale: Tensor | None
    mode: OnNonFinite
    report: Report
    in_grad: bool = True  # the gradients are those in `.grad`
    on_apply: Callable[[Tensor], None] | None = field(default=None, repr=False)
    known_finite: Tensor | None = field(default=None, repr=False)
    _applied: bool = field(default=False, repr=False)

    @outside_of_graphs
    @torch.no_grad()
    def apply_(
        self,
        gradient: Callable[[Tensor], Tensor | None] | None = None,
        scale: float | Tensor | None = None,
    ) -> None:
        """Multiplies the gradients by what was decided, in place. Call it once, before they change.

        Args:
            gradient: where the gradient of a parameter lies now, for trainers that move or copy
                gradients after `decide`; None for parameters to leave out. With it, `apply_` may
                be called for some of the parameters after the others.
            scale: with `gradient`, a factor that these gradients still need.

        Raises:
            RuntimeError: the gradients were scaled before.
            ValueError: `scale` without `gradient`, a complex gradient that would be clamped, or one
                that `gradient` returns and whose elements share memory.
        """
        check_function("gradient", gradient, "`parameter -> its gradient now`, or None")
        if gradient is None:
            if scale is not None:
                raise ValueError(
                    "cannot apply a decision with scale= alone: the gradients that were measured "
                    "get the scale that `decide` was given. Pass `scale` to `decide`, or pass "
                    "`gradient=` as well if other tensors need another factor."
                )
            if self._applied:
                raise RuntimeError(
                    "cannot apply this decision twice: the gradients have been multiplied by its "
                    "coefficient already, and would be scaled down again. Call `decide` for each "
                    "step."
                )
            self._write_(self.gradients, self.tensor_lists, self.scale)
            self.take_effect()
            return
        factor = None if scale is None else as_scalar(scale, self.plan.device)
        gradients = gradients_from(gradient, self.plan.params)
        self._write_(gradients, [None] * len(self.clips), factor)

    def take_effect(self) -> None:
        """Marks the gradients as scaled, for a scaler too: `apply_` or an optimizer did it."""
        self._applied = True
        if self.on_apply is not None:
            self.on_apply(self.found_inf)

    @property
    def finite(self) -> Tensor:
        """Whether the total norm is neither NaN nor infinite; a bool scalar on the device."""
        known = self.known_finite
        return _is_finite(self.total_norm, self.plan) if known is None else known

    @property
    def found_inf(self) -> Tensor:
        """1 where the total norm is not finite, as GradScaler has it; float32."""
        return (~self.finite).float()

    @property
    def is_known_nonfinite(self) -> bool:
        """Whether the total norm is NaN or infinite, which waits for it; not if it has no value."""
        return has_values(self.finite) and not bool(self.finite)

    def skip(self, scaled: bool) -> Tensor | None:
        """1 where the optimizer's step is to be left out; None where it never is.

        Args:
            scaled: a scaler, which skips such steps, is in use.
        """
        return self.found_inf if scaled or self.mode == "skip" else None

    @property
    def has_one_factor(self) -> bool:
        """Whether every `.grad` is multiplied by `factor`: an optimizer can do that itself."""
        is_whole = len(self.clips) == 1 and self.plan.groups[0].scope is Scope.MODEL
        fits = self.plan.norm_dtype is torch.float32  # as the factor that fused optimizers take
        return is_whole and fits and self.in_grad and self.mode != "zero"

    @property
    def factor(self) -> Tensor | None:
        """What all gradients are multiplied by; None where they stay as they are."""
        return self._factor(self.clips[0], self.scale)

    def next_policy_states(self, states: Sequence[Any]) -> list[Any]:
        """The policies' states after the step: the old ones where the norm is not finite."""
        if not any(states):  # none has a field
            return list(states)
        finite, pairs = self.finite, zip(self.clips, states, strict=True)
        return [_where(finite, clip.next_state, state) for clip, state in pairs]

    def _factor(self, clip: GroupClip, scale: Tensor | None) -> Tensor | None:
        if clip.limits is None and scale is None:
            return None
        factor = clip.coefficients if scale is None else clip.coefficients * scale
        return self._under_mode(factor)

    def _under_mode(self, factor: Tensor) -> Tensor:
        if self.mode == "propagate":
            return factor
        return coefficient_under(self.mode, factor, self.finite)

    def _write_(
        self,
        gradients: Sequence[Tensor | None],
        tensor_lists: Sequence[TensorLists | None],
        scale: Tensor | None,
    ) -> None:
        for group, clip in zip(self.plan.groups, self.clips, strict=True):
            if group.scope is Scope.ELEMENT and clip.limits is not None:
                check_real(gradients[group.members])
        for group, clip, known in zip(self.plan.groups, self.clips, tensor_lists, strict=True):
            if group.units is None:
                lists = _tensor_lists(gradients[group.members]) if known is None else known
                self._write_lists_(lists, group, clip, scale)
            elif (factors := self._factor(clip, scale)) is not None:
                scale_units_(group.units, gradients[group.members], factors)
        if self.mode == "zero":
            zero_(_tensor_lists(gradients), ~self.finite)

    def _write_lists_(
        self, lists: TensorLists, group: ParamGroup, clip: GroupClip, scale: Tensor | None
    ) -> None:
        if group.scope is not Scope.ELEMENT:
            if (factor := self._factor(clip, scale)) is not None:
                scale_(lists, factor)
            return
        if scale is not None:
            scale_(lists, self._under_mode(scale))
        if clip.limits is not None:
            is_finite = None if self.mode == "propagate" else self.finite
            clamp_(lists, limit_under(self.mode, clip.limits, is_finite))


def decide(
    gradients: Sequence[Tensor | None],
    plan: Plan,
    policies: Sequence[Policy[Any]],
    states: Sequence[Any],
    *,
    call: str,
    reduce: ReduceGradients | None = None,
    fault: Exception | None = None,
    scale: Tensor | None = None,
    mode: OnNonFinite = "propagate",
    measured: Sequence[GroupMeasurement] | None = None,
    in_grad: bool = True,
    on_apply: Callable[[Tensor], None] | None = None,
    invalid: Tensor | None = None,
) -> Decision:
    """Measures, reduces, and asks the policies for limits. Writes nothing.

    Args:
        gradients: on this rank, in the order of `plan.params`; None where there is none, and a
            DTensor where a collective has yet to make its values.
        policies, states: of each parameter group of the plan.
        call: what must be the same on all ranks, as text.
        reduce: makes these values.
        fault: an error that this rank has found. All ranks raise it, after the all-reduce.
        scale: a factor that the gradients still need; a float64 scalar on the plan's device. Norms
            are those of the gradients times `scale`.
        measured: what `measure` would return, where it is known already.
        in_grad: the gradients are those in `.grad`, which optimizers read.
        on_apply: called with `Decision.found_inf` when the decision takes effect.
        invalid: whether a limit of the last step was none, which the other ranks do not know yet.

    Raises:
        LayoutError: the ranks do not mean the same call; see `total_norms`.

    Collective: one all-reduce; none where nothing is sharded. Where some rank has a gradient
        without values, the collectives of `reduce` and the all-reduce once more.
    """
    fault = fault or _fault(gradients, plan, policies)
    lacks = any(gradients[i] is None for i in plan.copied_dtensors)
    header = Header(call, unreduced_text(gradients), lacks, fault is not None)
    if measured is None or header.unreduced:
        known = reducible(gradients) if header.unreduced else gradients
        measured = measure(known, plan)
    if invalid is not None:
        make_nan_(measured[0].payload, plan.groups[0].power, invalid)
    totals = total_norms(measured, plan, header)
    if totals.reduce_gradients and reduce is not None:
        try:
            gradients = reduce(plan.reduce_mesh is not None, totals.alike)
        except LayoutError as error:
            fault, gradients = fault or error, reducible(gradients)
        measured = measure(gradients, plan)
        if invalid is not None:
            make_nan_(measured[0].payload, plan.groups[0].power, invalid)
        fault = fault or _fault(gradients, plan, policies)
        totals = total_norms(measured, plan, Header(call, fault=fault is not None))
    if totals.fault:
        raise_fault(fault, plan)
    norms = totals.norms
    if scale is not None:
        magnitude = scale.abs()
        norms = [each.scaled(magnitude) for each in norms]
    total = norms[0].total
    if len(norms) > 1:
        totals = torch.stack([each.total for each in norms])
        total = norm_of_norms(totals, plan.groups[0].norm_type)
    each = zip(norms, plan.groups, policies, states, strict=True)
    clips = [_ask_policy(*one, plan, lambda: _is_finite(total, plan)) for one in each]
    # Where nothing asks for it, an accelerator need not compute it. A graph must contain it.
    captures = is_capturing(plan.device)
    finite = None
    if (
        mode != "propagate"
        or any(states)
        or any(clip.valid is not None for clip in clips)
        or captures
    ):
        finite = _is_finite(total, plan)
    for group, clip in zip(plan.groups, clips, strict=True):
        if clip.valid is not None and is_shared(group, plan):
            assert finite is not None
            finite = finite & clip.valid
    return Decision(
        plan,
        gradients,
        [group.tensor_lists for group in measured],
        clips,
        total,
        scale,
        mode,
        _report(plan, measured, clips, total, finite, mode, captures),
        in_grad,
        on_apply,
        finite,
    )


def _is_finite(total: Tensor, plan: Plan) -> Tensor:
    return total.to(plan.norm_dtype) < math.inf  # two operations; `isfinite` is four


def _fault(
    gradients: Sequence[Tensor | None], plan: Plan, policies: Sequence[Policy[Any]]
) -> Exception | None:
    """What must be known before anything is written, and before a policy counts the step."""
    try:
        for group, policy in zip(plan.groups, policies, strict=True):
            members = gradients[group.members]
            if group.scope is Scope.ELEMENT:
                check_real(members)
            if not _only_measures(policy):
                check_writable(members, plan.params[group.members])
    except ValueError as error:
        return error
    return None


def _only_measures(policy: Policy[Any]) -> bool:
    """Whether it never limits, as far as its numbers show."""
    return isinstance(policy, StatelessPolicy) and getattr(policy, "max_norm", 0.0) == math.inf


def _ask_policy(
    norms: GroupNorms,
    group: ParamGroup,
    policy: Policy[Any],
    state: Any,
    plan: Plan,
    is_finite: Callable[[], Tensor],
) -> GroupClip:
    units = group.units
    each = norms.total if norms.units is None else norms.units
    sizes = _one(each, plan) if units is None else units.sizes
    context = NormContext(sizes, norms.weights, norms.total)
    returned, next_state = policy.limit(each, state, context)
    if returned is None:
        return GroupClip(norms.total, None, torch.ones_like(each), next_state)
    limits, valid = read_limits(returned, each, group, plan, policy, is_finite)
    if units is not None:
        limits = torch.where(units.limited, limits, math.inf)
    return GroupClip(norms.total, limits, kernels.coefficients(each, limits), next_state, valid)


def _one(like: Tensor, plan: Plan) -> Tensor:
    """1, kept on the device; a graph gets its own, which only its replays fill."""
    if not has_values(like) or is_capturing(plan.device):
        return torch.ones_like(like)
    if plan.calls.one is None:
        plan.calls.one = torch.ones_like(like)
    return plan.calls.one


def _report(
    plan: Plan,
    measured: Sequence[GroupMeasurement],
    clips: Sequence[GroupClip],
    total: Tensor,
    finite: Tensor | None,
    mode: OnNonFinite,
    captures: bool,
) -> Report:
    figures: dict[str, GroupFigures] = {}
    for group, clip in zip(plan.groups, clips, strict=True):
        limit = _smallest(clip.limits, math.inf)
        applied = (
            clip.coefficients
            if finite is None
            else coefficient_under(mode, clip.coefficients, finite)
        )
        figures[group.name] = GroupFigures(clip.norm, limit, _smallest(applied, 1.0))
    names, per_tensor = [m.names for m in measured], [m.per_tensor for m in measured]
    report = Report(
        figures, total, plan.norm_dtype, NonFiniteSearch(names, per_tensor, rank_group(plan))
    )
    return report.converted() if captures else report


def _tensor_lists(gradients: Sequence[Tensor | None]) -> TensorLists:
    return kernels.tensor_lists([grad for grad in gradients if grad is not None])


def _smallest(numbers: Tensor | None, default: float) -> Tensor:
    if numbers is None or numbers.numel() == 0:
        return torch.full((), default, dtype=torch.float64, device="cpu")
    return numbers if numbers.ndim == 0 else numbers.amin()


def _where(finite: Tensor, new: Any, old: Any) -> Any:
    if isinstance(new, Tensor):
        return torch.where(finite.to(new.device), new, old)
    return type(new)(*(_where(finite, a, b) for a, b in zip(new, old, strict=True)))
