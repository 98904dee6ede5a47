"""Clipping without an object: what stands behind torch's functions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distclip import apply, kernels, nonfinite
from distclip import parameters as inputs
from distclip.norms import measure
from distclip.norms.plan import Plan, make_plan
from distclip.parameters import Parameters, named_tensors
from distclip.policies import EmptyState, NormContext, Policy, check_not_negative
from distclip.sharding.layout import read_layouts
from distclip.sharding.local_tensors import layout_cache_key, local_gradient, local_gradients, local_values
from distclip.step import decide, norms, write_

_KEPT = 16  # plans; a trainer with a generator, a discriminator and a few limits has fewer


@torch.no_grad()
def clip_(
    parameters: Parameters,
    policy: Policy[Any],
    error_if_nonfinite: bool,
    mesh: DeviceMesh | None,
    distinct: tuple[str, ...],
) -> Tensor:
    """Clips as a `Clipper` of these parameters would; the norm before, float32. See `clip_grad_norm_`."""
    if not isinstance(parameters, nn.Module | Tensor):
        parameters = cast(Parameters, list(cast("Iterable[Any]", parameters)) or parameters)
    params, plan = _params_and_plan(parameters, policy, mesh, distinct)
    values = local_gradients(params)
    if isinstance(parameters, nn.Module) and all(v is None for v in values):
        inputs.check_fresh(parameters, params)
    decision = decide(values, measure.local(values, plan), plan, [g.policy.init(1, plan.device) for g in plan.groups], None, "propagate")
    if error_if_nonfinite and not bool(decision.finite):
        raise nonfinite.error(decision.norm, values, _plan(parameters, policy, mesh, distinct))
    write_(decision)
    return decision.norm.float()


@torch.no_grad()
def total_norm_of(
    tensors: Parameters,
    policy: Policy[Any],
    error_if_nonfinite: bool = False,
    *,
    mesh: DeviceMesh | None = None,
    distinct: Sequence[str] = ("pp",),
) -> Tensor:
    """The total norm of the values of `tensors`, or of a module's gradients: a float64 scalar; see `get_total_norm`."""
    plan = _plan(tensors, policy, mesh, tuple(distinct))
    read = local_gradient if isinstance(tensors, nn.Module) else local_values
    values = [read(h.param) for h in plan.params]
    norm = norms(measure.local(values, plan), plan)[0].total
    if error_if_nonfinite and not bool(norm.float().isfinite()):
        raise nonfinite.error(norm, values, plan)
    return norm


def scale_gradients_(parameters: Parameters, policy: Policy[Any], norm: Tensor) -> None:
    """Scales as `policy` would at this total norm, on this rank alone; see `clip_grads_with_norm_`."""
    norm = local_values(norm).double()
    limit, _ = policy.limit(norm, EmptyState(), NormContext(torch.ones_like(norm), None, norm))
    if limit is not None:
        apply.scale_(_pieces(parameters), apply.coefficient(norm, limit))


def clamp_gradients_(parameters: Parameters, clip_value: float) -> None:
    """See `clip_grad_value_`."""
    check_not_negative("clip_value", clip_value)
    apply.clamp_(_pieces(parameters), torch.tensor(clip_value, dtype=torch.float64, device="cpu"))


def _pieces(parameters: Parameters) -> apply.Pieces:
    values = local_gradients([param for _, param in named_tensors(parameters)])
    return kernels.pieces([v for v in values if v is not None])


def _plan(parameters: Parameters, policy: Policy[Any], mesh: DeviceMesh | None, distinct: tuple[str, ...]) -> Plan:
    given = inputs.read(parameters, policy)
    held, team = read_layouts(given.named, given.modules, mesh, distinct)
    return make_plan(held, team, given.groups)


_kept: OrderedDict[Any, tuple[Plan, object]] = OrderedDict()


def _params_and_plan(
    parameters: Parameters, policy: Policy[Any], mesh: DeviceMesh | None, distinct: tuple[str, ...]
) -> tuple[list[Tensor], Plan]:
    """The parameters, each once, and a plan; an earlier one if it fits, since to make one takes longer than to clip.

    All that a policy of scope MODEL needs of a plan follows from what the parameters show, and from the ranks.
    """
    params = inputs.listed(parameters)
    if params is None or (layout := layout_cache_key(params)) is None:
        plan = _plan(parameters, policy, mesh, distinct)
        return [h.param for h in plan.params], plan
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    key = (layout[0], policy, id(mesh), distinct, id(world))
    if key not in _kept:
        plan = _plan(parameters, policy, mesh, distinct)
        nobody = torch.empty(0, device="meta")  # a kept plan must not keep parameters alive
        plan = replace(plan, params=[replace(h, name="", param=nobody) for h in plan.params])
        _kept[key] = plan, (layout[1], mesh, world)  # alive, so that no other object takes over an id
        if len(_kept) > _KEPT:
            _kept.popitem(last=False)
    return params, _kept[key][0]
