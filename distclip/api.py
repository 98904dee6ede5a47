"""The functions of `torch.nn.utils`, right on every layout: the same names and order of arguments.

`parameters` is a tensor, an iterable of tensors (a generator is read once) or an `nn.Module`. FSDP1
needs the module, because its parameters do not show how they are sharded. `foreach` is accepted as
torch's argument and ignored: the device chooses the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distclip import kernels, nonfinite, step
from distclip.norms.kept_plans import plans_of
from distclip.norms.plan import Plan, make_plan
from distclip.parameters import (
    Parameters,
    check_model_unchanged,
    named_tensors,
    read_parameters,
    unique_tensors,
)
from distclip.policies import (
    ClipNorm,
    EmptyState,
    NormContext,
    Policy,
    Scope,
    StatelessPolicy,
)
from distclip.policies.checks import check_norm_type, check_not_negative
from distclip.sharding.local_tensors import layout_cache_key, local_gradients, local_values
from distclip.sharding.mesh import world_id
from distclip.sharding.read import read_layouts
from distclip.step import Decision
from distclip.torch_private import outside_of_graphs

_EPS = 1e-6  # torch.nn.utils.clip_grad


@dataclass(frozen=True)
class _TorchClipNorm(StatelessPolicy):
    """torch's coefficient, max_norm / (norm + 1e-6), as a policy."""

    max_norm: float
    norm_type: float = 2.0
    scope = Scope.MODEL

    def __post_init__(self) -> None:
        check_not_negative("max_norm", self.max_norm)
        check_norm_type(self.norm_type)

    def limit(
        self, norms: Tensor, state: EmptyState, context: NormContext
    ) -> tuple[Tensor | None, EmptyState]:
        # The limit whose quotient by the norm is torch's coefficient, at zero and infinity too.
        return None if math.isinf(self.max_norm) else self.max_norm / (1 + _EPS / norms), state


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
) -> Tensor:
    """Scales all gradients by max_norm / (total norm + 1e-6) where that is below 1.

    Returns the total norm before.

    The norm is that of the whole model's gradients, each element counted once, as a plain float32
    scalar that has the same bits on every rank. A NaN on any rank makes it NaN, and the gradients
    are scaled all the same, as torch does. `max_norm=math.inf` only measures. A parameter given
    twice counts once.

    Raises:
        NonFiniteGradientError: with `error_if_nonfinite`, on all ranks together; no gradient is
            changed.
        LayoutError: it is unknown which ranks hold which elements.
        ValueError: `max_norm` is negative or NaN, `norm_type` is not above 0, or a tensor holds
            integers.

    Collective: one all-reduce of a few numbers over all ranks; none where nothing is sharded.

    Example:
        >>> import torch, distclip
        >>> weight = torch.zeros(3, requires_grad=True)
        >>> weight.grad = torch.tensor([10.0, 20.0, 30.0])
        >>> round(distclip.clip_grad_norm_([weight], max_norm=15.0).item(), 4)
        37.4166
        >>> [round(x, 2) for x in weight.grad.tolist()]
        [4.01, 8.02, 12.03]
    """
    del foreach
    policy = _TorchClipNorm(float(max_norm), float(norm_type))
    given = _rereadable(parameters)
    tensors, plan = _kept_plan(given, policy, mesh, tuple(distinct))
    gradients = local_gradients(tensors)
    if isinstance(given, nn.Module) and all(grad is None for grad in gradients):
        check_model_unchanged(given, tensors)
    decision = step.decide(gradients, plan, [policy], [EmptyState()])
    if error_if_nonfinite:
        _check_finite(decision, given, policy, mesh, tuple(distinct))
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
) -> Tensor:
    """The norm of `tensors` together (gradients, as torch takes them), or of a module's gradients.

    Result, errors and collective are those of `clip_grad_norm_`; nothing is changed.
    """
    del foreach
    given = _rereadable(tensors)
    decision = measure_tensors(given, norm_type, mesh=mesh, distinct=distinct)
    if error_if_nonfinite:
        _check_finite(decision, given, ClipNorm(math.inf, norm_type), mesh, tuple(distinct))
    return decision.report.total_norm


@torch.no_grad()
def measure_tensors(
    tensors: Parameters,
    norm_type: float = 2.0,
    *,
    mesh: DeviceMesh | None = None,
    distinct: Sequence[str] = ("pp",),
) -> Decision:
    """The decision of a policy that only measures tensors, or the gradients of a module."""
    given = _rereadable(tensors)
    policy = ClipNorm(math.inf, float(norm_type))
    listed, plan = _kept_plan(given, policy, mesh, tuple(distinct))
    is_model = isinstance(given, nn.Module)
    gradients = local_gradients(listed) if is_model else [local_values(each) for each in listed]
    return step.decide(gradients, plan, [policy], [EmptyState()])


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
    del foreach
    policy, norm = _TorchClipNorm(float(max_norm)), local_values(total_norm).double()
    limit, _ = policy.limit(norm, EmptyState(), NormContext(torch.ones_like(norm), None, norm))
    if limit is not None:
        lists = kernels.tensor_lists(_gradients(parameters))
        step.scale_(lists, step.coefficient(norm, limit))


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
    del foreach
    check_not_negative("clip_value", clip_value := float(clip_value))
    gradients = _gradients(parameters)
    step.check_real(gradients)
    bound = torch.full((), clip_value, dtype=torch.float64, device="cpu")
    step.clamp_(kernels.tensor_lists(gradients), bound)


class _TensorsAndPlan(NamedTuple):
    tensors: list[Tensor]
    plan: Plan


def _rereadable(given: Parameters) -> Parameters:
    """Iterables as lists; an empty generator stays, because `named_tensors` warns about it."""
    if isinstance(given, nn.Module | Tensor):
        return given
    return cast(Parameters, list(cast("Iterable[Any]", given)) or given)


def _kept_plan(
    given: Parameters, policy: Policy[Any], mesh: DeviceMesh | None, distinct: tuple[str, ...]
) -> _TensorsAndPlan:
    """The tensors, each once, and their plan; an earlier one where it fits.

    A plan for Scope.MODEL depends on nothing but what the tensors show, and on the ranks.
    """
    tensors = unique_tensors(given)
    shown = None if tensors is None else layout_cache_key(tensors)
    if tensors is None or shown is None:
        plan = _make_plan(given, policy, mesh, distinct)
        return _TensorsAndPlan([param.param for param in plan.params], plan)
    kept = plans_of(shown.mesh if mesh is None else mesh)
    key = (shown.key, policy.norm_type, distinct, mesh is None, world_id())
    if (plan := kept.get(key)) is None:
        plan = _make_plan(given, policy, mesh, distinct)
        kept.put(key, plan, shown.specs)
    return _TensorsAndPlan(tensors, plan)


def _check_finite(
    decision: Decision,
    given: Parameters,
    policy: Policy[Any],
    mesh: DeviceMesh | None,
    distinct: tuple[str, ...],
) -> None:
    """Raises NonFiniteGradientError. Kept plans have no names: a new one gives them."""
    if decision.is_known_nonfinite:
        plan = _make_plan(given, policy, mesh, distinct)
        raise nonfinite.error(decision.total_norm, decision.gradients, plan)


def _make_plan(
    given: Parameters, policy: Policy[Any], mesh: DeviceMesh | None, distinct: tuple[str, ...]
) -> Plan:
    read = read_parameters(given, policy)
    return make_plan(read_layouts(read.named, read.modules, mesh, distinct), read.groups)


def _gradients(parameters: Parameters) -> list[Tensor]:
    gradients = local_gradients([param for _, param in named_tensors(parameters)])
    return [grad for grad in gradients if grad is not None]
