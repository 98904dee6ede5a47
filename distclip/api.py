"""The functions of `torch.nn.utils`, right on every layout: the same names and order of arguments.

`parameters` is a tensor, an iterable of tensors (a generator is read once) or an `nn.Module`. FSDP1
needs the module, because its parameters do not show how they are sharded. `foreach` is accepted as
torch's argument and ignored: the device chooses the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distclip import kernels, nonfinite, scaling, step
from distclip.arguments import as_axes, as_flag, as_number, check_mesh_type
from distclip.decision import Decision
from distclip.norms.agreement import policy_text
from distclip.norms.kept_plans import plans_of
from distclip.norms.make_plan import make_plan
from distclip.norms.plan import Plan
from distclip.param_groups import read_parameters
from distclip.parameters import (
    Parameters,
    list_items,
    named_tensors,
    unique_tensors,
    warn_of_empty_generator,
)
from distclip.policies import ClipNorm, EmptyState, NormContext, Policy, TorchClipNorm
from distclip.policies.checks import check_not_negative
from distclip.sharding.fsdp1 import check_root
from distclip.sharding.layout import LayoutFunction
from distclip.sharding.local_tensors import (
    any_unreduced,
    layout_cache_key,
    local_gradients,
    local_values,
    unreduced_values,
)
from distclip.sharding.mesh import world_id
from distclip.sharding.partial_gradients import (
    may_lack_gradient,
    reduce_gradients_,
    reduced_values,
)
from distclip.sharding.read import read_layouts
from distclip.torch_private import outside_of_graphs
from distclip.training.backward_checks import never_clipped


@outside_of_graphs
@torch.no_grad()
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    mesh: DeviceMesh | None = None,
    distinct: Sequence[str] = ("pp",),
    layouts: LayoutFunction | None = None,
) -> Tensor:
    """Scales all gradients by max_norm / (total norm + 1e-6) where that is below 1.

    Returns the total norm before.

    The norm is that of the whole model's gradients, each element counted once, as a plain scalar
    that has the same bits on every rank: float32, or float64 where every parameter is float64 (see
    `Report`). A NaN on any rank makes it NaN, and the gradients are scaled all the same, as torch
    does. `max_norm=math.inf` only measures. A parameter given twice counts once.

    A gradient that lies where that of an earlier parameter lies becomes a copy in `.grad`.

    `mesh`, `distinct` and `layouts` are those of `Clipper`. With `layouts` the plan is made anew in
    each call; a `Clipper` keeps it.

    Raises:
        NonFiniteGradientError: with `error_if_nonfinite`, on all ranks together; no gradient is
            changed.
        LayoutError: it is unknown which ranks hold which elements, or copies differ; also for a
            unit of FSDP1 inside another.
        ValueError: `max_norm` is negative or NaN, `norm_type` is not above 0, a tensor holds
            integers, or elements of a gradient share memory, as those of an expanded tensor do.
        TypeError: an argument is of another type, such as the groups of an optimizer.

    Collective: one all-reduce of a few numbers over all ranks; none where nothing is sharded. The
        first time with these parameters, also an all-gather of a few numbers for each that would
        count as a copy along an axis that nothing speaks of.

    Example:
        >>> import torch, distclip
        >>> weight = torch.zeros(3, requires_grad=True)
        >>> weight.grad = torch.tensor([10.0, 20.0, 30.0])
        >>> round(distclip.clip_grad_norm_([weight], max_norm=15.0).item(), 4)
        37.4166
        >>> [round(x, 2) for x in weight.grad.tolist()]
        [4.01, 8.02, 12.03]
    """
    policy = TorchClipNorm(max_norm, norm_type)
    error_if_nonfinite = _check_arguments(error_if_nonfinite, foreach, mesh)
    distinct = as_axes("distinct", distinct)
    given = _to_clip(parameters)
    check_root(given)
    where = _Where(mesh, tuple(distinct), layouts)
    tensors, plan = _kept_plan(given, policy, where)
    gradients = local_gradients(tensors)
    decision = step.decide(
        gradients,
        plan,
        [policy],
        [EmptyState()],
        call=policy_text(policy),
        reduce=partial(reduce_gradients_, tensors),
        fault=_never_clipped(tensors, gradients),
    )
    if error_if_nonfinite:
        _check_finite(decision, given, policy, where)
    decision.apply_()
    return decision.report.total_norm


@outside_of_graphs
@torch.no_grad()
def get_total_norm(
    tensors: Parameters,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    mesh: DeviceMesh | None = None,
    distinct: Sequence[str] = ("pp",),
    layouts: LayoutFunction | None = None,
) -> Tensor:
    """The norm of `tensors` together (gradients, as torch takes them), or of a module's gradients.

    Result, errors and collective are those of `clip_grad_norm_`; nothing is changed. The norm is
    that over all ranks of the mesh, pipeline stages included: torch's is that of one stage. A
    trainer that adds up the stages itself passes the slice without them, `mesh=root["dp"]`.
    """
    error_if_nonfinite = _check_arguments(error_if_nonfinite, foreach, mesh)
    distinct = as_axes("distinct", distinct)
    given = _rereadable(tensors)
    decision = measure_tensors(given, norm_type, mesh=mesh, distinct=distinct, layouts=layouts)
    if error_if_nonfinite:
        where = _Where(mesh, tuple(distinct), layouts)
        _check_finite(decision, given, ClipNorm(math.inf, norm_type), where)
    return decision.report.total_norm


@torch.no_grad()
def measure_tensors(
    tensors: Parameters,
    norm_type: float = 2.0,
    *,
    mesh: DeviceMesh | None = None,
    distinct: Sequence[str] = ("pp",),
    layouts: LayoutFunction | None = None,
) -> Decision:
    """The decision of a policy that only measures tensors, or the gradients of a module."""
    given = _rereadable(tensors)
    policy = ClipNorm(math.inf, norm_type)
    listed, plan = _kept_plan(given, policy, _Where(mesh, tuple(distinct), layouts))
    # A module's gradients take their parameters' layout for good; given tensors are not changed.
    if isinstance(given, nn.Module):
        gradients, reduce = local_gradients(listed), partial(reduce_gradients_, listed)
    else:
        gradients, reduce = unreduced_values(listed), partial(reduced_values, listed)
    return step.decide(
        gradients, plan, [policy], [EmptyState()], call=policy_text(policy), reduce=reduce
    )


@outside_of_graphs
@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Parameters, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Scales the gradients in place by max_norm / (total_norm + 1e-6) where that is below 1.

    Raises:
        ValueError: `max_norm` is negative or NaN.

    Collective: none.
    """
    _check_arguments(False, foreach)
    given = _to_clip(parameters)
    policy, norm = TorchClipNorm(max_norm), _total_norm(total_norm)
    limit, _ = policy.limit(norm, EmptyState(), NormContext(torch.ones_like(norm), None, norm))
    if limit is not None:
        lists = kernels.tensor_lists(_gradients(given))
        scaling.scale_(lists, kernels.coefficients(norm, limit))


@outside_of_graphs
@torch.no_grad()
def clip_grad_value_(
    parameters: Parameters, clip_value: float, foreach: bool | None = None
) -> None:
    """Clamps every gradient element to [-clip_value, clip_value] in place; NaN stays NaN.

    Raises:
        ValueError: `clip_value` is negative or NaN, or a gradient is complex, which has no order.

    Collective: none (`Partial` gradients are reduced first).
    """
    _check_arguments(False, foreach)
    clip_value = check_not_negative("clip_value", clip_value)
    gradients = _gradients(_to_clip(parameters))
    scaling.check_real(gradients)
    bound = torch.full((), clip_value, dtype=torch.float64, device="cpu")
    scaling.clamp_(kernels.tensor_lists(gradients), bound)


def _check_arguments(
    error_if_nonfinite: bool, foreach: bool | None, mesh: DeviceMesh | None = None
) -> bool:
    """`error_if_nonfinite` as a bool. Raises TypeError where one is of another type."""
    if foreach is not None:
        as_flag("foreach", foreach)
    check_mesh_type(mesh)
    return as_flag("error_if_nonfinite", error_if_nonfinite)


def _total_norm(given: Any) -> Tensor:
    """A norm that the caller knows as a float64 scalar; a tensor's device stays."""
    if not isinstance(given, Tensor):
        number = as_number("total_norm", given, "what `get_total_norm` returned, or a number")
        if number < 0:
            check_not_negative("total_norm", number)
        return torch.full((), number, dtype=torch.float64, device="cpu")
    if given.numel() != 1 or given.dtype is torch.bool or given.is_complex():
        raise ValueError(
            f"cannot clip with a total_norm of shape {list(given.shape)} and {given.dtype}: all "
            f"gradients have one norm, a real number. Pass what `get_total_norm` returned."
        )
    return local_values(given).double().reshape(())


class _Where(NamedTuple):
    """What the user says of ranks and layouts."""

    mesh: DeviceMesh | None
    distinct: tuple[str, ...]
    layouts: LayoutFunction | None


class _TensorsAndPlan(NamedTuple):
    tensors: list[Tensor]
    plan: Plan


def _rereadable(given: Parameters) -> Parameters:
    """Iterables as lists."""
    if isinstance(given, nn.Module | Tensor):
        return given
    listed = list_items(given)
    if listed and isinstance(listed[0], dict):
        named_tensors(listed)  # raises: one limit is for all, and groups have one each
    return listed


def _to_clip(given: Parameters) -> Parameters:
    """As `_rereadable`. Of an empty generator it warns at the line that calls torch's function."""
    listed = _rereadable(given)
    if isinstance(listed, list) and not listed:
        warn_of_empty_generator(given, stacklevel=6)  # the decorators are frames too
    return listed


def _kept_plan(given: Parameters, policy: Policy[Any], where: _Where) -> _TensorsAndPlan:
    """The tensors, each once, and their plan; an earlier one where it fits.

    A plan for Scope.MODEL depends on nothing but what the tensors show, and on the ranks.
    """
    tensors = unique_tensors(given)
    shown = None if tensors is None else layout_cache_key(tensors)
    if tensors is None or shown is None or where.layouts is not None:
        plan = _make_plan(given, policy, where)
        return _TensorsAndPlan([param.param for param in plan.params], plan)
    kept = plans_of(shown.mesh if where.mesh is None else where.mesh)
    key = (shown.key, policy.norm_type, where.distinct, where.mesh is None, world_id())
    plan = kept.get(key)
    if plan is None or plan.has_new_copies(tensors):
        plan = _make_plan(given, policy, where)
        kept.put(key, plan, shown.specs)
    return _TensorsAndPlan(tensors, plan)


def _check_finite(
    decision: Decision, given: Parameters, policy: Policy[Any], where: _Where
) -> None:
    """Raises NonFiniteGradientError. Kept plans have no names: a new one gives them."""
    if decision.is_known_nonfinite:
        plan = _make_plan(given, policy, where)
        raise nonfinite.error(
            decision.total_norm,
            decision.gradients,
            plan,
            setting="error_if_nonfinite=False",
        )


def _never_clipped(
    tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> ValueError | None:
    if all(grad is not None for grad in gradients):
        return None
    return never_clipped(tensors, [f"parameter {i}" for i in range(len(tensors))])


def _make_plan(given: Parameters, policy: Policy[Any], where: _Where) -> Plan:
    read = read_parameters(given, policy)
    return make_plan(
        read_layouts(read.named, read.modules, *where, during_a_call=True), read.groups
    )


def _gradients(parameters: Parameters) -> list[Tensor]:
    params = [param for _, param in named_tensors(parameters)]
    gradients = local_gradients(params)
    each = zip(params, gradients, strict=True)
    if any_unreduced(gradients) or any(g is None and may_lack_gradient(p) for p, g in each):
        gradients = reduce_gradients_(params, everywhere=False, alike=False)
    scaling.check_writable(gradients)
    return [grad for grad in gradients if grad is not None]
