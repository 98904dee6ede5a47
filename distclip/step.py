"""One clipping step on local gradients: measure -> all-reduce -> limit -> scale.

`decide` does the first three and writes nothing; `Decision.apply_` writes. Torch's functions, all
methods of `Clipper` and the adapters are clients of these two: the order of a step is here only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from distclip import kernels
from distclip.decision import Decision, GroupClip, norm_is_finite
from distclip.errors import LayoutError
from distclip.limits import is_shared, make_nan_, raising_coefficients, read_limits
from distclip.nonfinite import (
    NonFiniteSearch,
    OnNonFinite,
    coefficient_under,
)
from distclip.norms.agreement import Header
from distclip.norms.measure import GroupMeasurement, measure, weights_of
from distclip.norms.plan import ParamGroup, Plan
from distclip.norms.power_sums import norm_of_norms
from distclip.norms.reduce import GroupNorms, total_norms
from distclip.norms.shared_errors import raise_fault, rank_group
from distclip.norms.units import Units
from distclip.policies import NormContext, Policy, Scope, StatelessPolicy, accept, raises
from distclip.report import GroupFigures, Report, TensorFigures
from distclip.scaling import (
    check_real,
    check_writable,
)
from distclip.sharding.local_tensors import reducible, unreduced_text
from distclip.torch_private import has_values, is_capturing


class ReduceGradients(Protocol):
    """Reduces the gradients that have no values yet, and returns all; see `reduce_together`."""

    def __call__(self, everywhere: bool, alike: bool) -> list[Tensor | None]: ...


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
    tensor_norms: bool = False,
    at_least: Tensor | None = None,
    loss: Tensor | None = None,
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
        tensor_norms: whether the report has the norm of every tensor. `plan` has `tensor_groups`
            then, and `measured` the sums.
        at_least: what `NormContext.total_norm` is at least, where these gradients are a part of
            what the policy limits; a float64 scalar.
        loss: this rank's, for policies that may leave out the step; a float64 scalar on the plan's
            device.

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
        measured = measure(known, plan, tensors=tensor_norms)
    if invalid is not None:
        make_nan_(measured[0].payload, plan.groups[0].power, invalid)
    totals = total_norms(measured, plan, header, tensor_norms, loss)
    if totals.reduce_gradients and reduce is not None:
        try:
            gradients = reduce(plan.reduce_mesh is not None, totals.alike)
        except LayoutError as error:
            fault, gradients = fault or error, reducible(gradients)
        measured = measure(gradients, plan, tensors=tensor_norms)
        if invalid is not None:
            make_nan_(measured[0].payload, plan.groups[0].power, invalid)
        fault = fault or _fault(gradients, plan, policies)
        header = Header(call, fault=fault is not None)
        totals = total_norms(measured, plan, header, tensor_norms, loss)
    elif header.unreduced and has_values(totals.norms[0].total):
        raise _unexpected(header.unreduced)
    if totals.fault:
        raise_fault(fault, plan)
    norms, mean = totals.norms, totals.loss
    if scale is not None:
        magnitude = scale.abs()
        norms = [each.scaled(magnitude) for each in norms]
    total = norms[0].total
    if len(norms) > 1:
        totals = torch.stack([each.total for each in norms])
        total = norm_of_norms(totals, plan.groups[0].norm_type)
    each = zip(norms, plan.groups, policies, states, strict=True)
    is_finite = partial(norm_is_finite, total, plan)
    clips = [_ask_policy(*one, plan, is_finite, at_least, mean) for one in each]
    # Where nothing asks for it, an accelerator need not compute it. A graph must contain it.
    captures = is_capturing(plan.device)
    judged = any(clip.valid is not None for clip in clips)
    accepts = [clip.accepts for clip in clips if clip.accepts is not None]
    asked = captures or judged or accepts or any(states) or mode != "propagate"
    finite = norm_is_finite(total, plan) if asked else None
    for group, clip in zip(plan.groups, clips, strict=True):
        if clip.valid is not None and is_shared(group, plan):
            assert finite is not None
            finite = finite & clip.valid
    vetoed = None
    if accepts:
        assert finite is not None
        vetoed = finite & ~(accepts[0] if len(accepts) == 1 else torch.stack(accepts).all())
    return Decision(
        plan,
        gradients,
        [group.tensor_lists for group in measured],
        clips,
        total,
        scale,
        mode,
        _report(plan, measured, norms, clips, total, finite, vetoed, mode, captures),
        in_grad,
        on_apply,
        finite,
        vetoed,
    )


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


def _unexpected(unreduced: str) -> LayoutError:
    """The other ranks raise some steps later, as their norms then are known to be NaN."""
    return LayoutError(
        f"cannot clip: gradients have to be reduced first ({unreduced[:200]}), and there were none "
        f"in the first step, or a CUDA graph is captured. On an accelerator all ranks decide in "
        f"the first step whether to look for such gradients, because looking waits for the "
        f"device. Reduce them before this call (`redistribute`), or make another Clipper."
    )


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
    at_least: Tensor | None,
    loss: Tensor | None,
) -> GroupClip:
    units = group.units
    each = norms.total if norms.units is None else norms.units
    sizes = _size(each, group, plan) if units is None else units.sizes
    total = norms.total if at_least is None else torch.maximum(norms.total, at_least)
    context = NormContext(sizes, norms.weights, total, loss)
    returned, next_state = policy.limit(each, state, context)
    accepts = accept(policy, each, state, context)
    if returned is None:
        return GroupClip(norms.total, None, torch.ones_like(each), next_state, None, accepts)
    limits, valid = read_limits(returned, each, group, plan, policy, is_finite)
    if units is not None:
        limits = torch.where(_limited(units, group, plan), limits, math.inf)
    coefficients_of = raising_coefficients if raises(policy) else kernels.coefficients
    coefficients = coefficients_of(each, limits)
    return GroupClip(norms.total, limits, coefficients, next_state, valid, accepts)


def _limited(units: Units, group: ParamGroup, plan: Plan) -> Tensor:
    """Which units have a limit: not those whose weights were asked for and not measured."""
    if not group.needs_weights:
        return units.limited
    params = plan.params[group.members]
    without = tuple([i for i, param in enumerate(params) if weights_of(param) is None])
    return units.limited_without(without) if without else units.limited


def _size(like: Tensor, group: ParamGroup, plan: Plan) -> Tensor:
    """Kept on the device; a graph gets its own, which only its replays fill."""
    if not has_values(like) or is_capturing(plan.device):
        return torch.full_like(like, group.num_elements)
    if group.name not in plan.calls.sizes:
        plan.calls.sizes[group.name] = torch.full_like(like, group.num_elements)
    return plan.calls.sizes[group.name]


def _report(
    plan: Plan,
    measured: Sequence[GroupMeasurement],
    norms: Sequence[GroupNorms],
    clips: Sequence[GroupClip],
    total: Tensor,
    finite: Tensor | None,
    vetoed: Tensor | None,
    mode: OnNonFinite,
    captures: bool,
) -> Report:
    figures: dict[str, GroupFigures] = {}
    for group, clip in zip(plan.groups, clips, strict=True):
        limit = _smallest(clip.limits, math.inf)
        applied = (
            clip.coefficients
            if finite is None
            else coefficient_under(mode, clip.coefficients, finite, vetoed)
        )
        figures[group.name] = GroupFigures(clip.norm, limit, _smallest(applied, 1.0))
    names, per_tensor = [m.names for m in measured], [m.per_tensor for m in measured]
    report = Report(
        figures,
        total,
        plan.norm_dtype,
        NonFiniteSearch(names, per_tensor, rank_group(plan)),
        _tensor_figures(plan, norms),
        vetoed,
        mode == "skip",
    )
    return report.converted() if captures else report


def _tensor_figures(plan: Plan, norms: Sequence[GroupNorms]) -> list[TensorFigures]:
    figures: list[TensorFigures] = []
    for group, each in zip(plan.tensor_groups, norms, strict=False):
        if each.tensors is not None:
            figures.append(TensorFigures(group.tensor_names, each.tensors, group.norm_type))
    return figures


def _smallest(numbers: Tensor | None, default: float) -> Tensor:
    if numbers is None or numbers.numel() == 0:
        return torch.full((), default, dtype=torch.float64, device="cpu")
    return numbers if numbers.ndim == 0 else numbers.amin()
