"""The rooms in order: measure, reduce, limit, apply, report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distclip import apply, measure, reduce
from distclip.errors import LayoutError, NonFiniteGradientError
from distclip.inputs import Parameters, named_tensors
from distclip.layout import Layouts, local_gradient, local_values, read_layouts
from distclip.plan import Group, Plan
from distclip.policies import About, ClipNorm, Policy, check_not_negative
from distclip.report import Report


class Clipper:
    """Clips the gradients of a model, however it is sharded.

    Args:
        parameters: an `nn.Module` (needed for FSDP1; parameters keep their names), or an iterable of parameters.
            Make the clipper after the model has been wrapped and sharded.
        policy: how large the gradients may be.
        mesh: a `DeviceMesh` over all ranks that train together. Found from the parameters' DTensors when omitted.
        distinct: the mesh axes whose ranks hold different parameters.
        layouts: for sharding that tensors do not show: `(name, parameter) -> Layout`, or None to read the tensor.
        on_nonfinite: when the total norm is NaN or infinite: "propagate" scales by limit / norm, as torch does;
            "raise" raises on every rank and leaves the gradients as they are.

    Raises:
        LayoutError: it cannot be told which ranks hold which elements.
        ValueError, TypeError: something that cannot be clipped.

    Collective: at construction, the making of a process group where a mesh of several axes leaves out ranks of
        the world. All ranks of the mesh must make the clipper, and call it every step.
    """

    def __init__(
        self,
        parameters: Parameters,
        policy: Policy[Any] = ClipNorm(1.0),  # noqa: B008 - frozen
        *,
        mesh: DeviceMesh | None = None,
        distinct: Sequence[str] = ("pp",),
        layouts: Layouts | None = None,
        on_nonfinite: str = "propagate",
    ) -> None:
        if on_nonfinite not in ("propagate", "raise"):
            raise ValueError(
                f"cannot make a Clipper with on_nonfinite={on_nonfinite!r}: no behaviour has that name, so that it is "
                f'not clear what a NaN should do. Pass "propagate" or "raise".'
            )
        self.policy = policy
        self._module = parameters if isinstance(parameters, nn.Module) else None
        self._on_nonfinite = on_nonfinite
        named = named_tensors(parameters)
        held, team = read_layouts(named, self._module, mesh, tuple(distinct), layouts)
        self.plan = Plan(held, team, [Group("all", slice(0, len(held)), policy.norm_type, repr(policy))])

    @torch.no_grad()
    def clip_(self) -> Report:
        """Scales the gradients in place: call it after backward, on every rank, before `optimizer.step()`.

        Raises:
            NonFiniteGradientError: with on_nonfinite="raise", on every rank together.

        Collective: one all-reduce of a few numbers; none where nothing is sharded.
        """
        values = [local_gradient(h.param) for h in self.plan.held]
        if self._module is not None and all(v is None for v in values):
            self._check_fresh(self._module)
        norm = _total_norm(values, self.plan, self._on_nonfinite)
        limit, factor = _limit(self.policy, norm)
        if limit is not None:
            apply.scale_([v for v in values if v is not None], factor)
        return _report(norm, limit, factor)

    def _check_fresh(self, module: nn.Module) -> None:
        known = {id(h.param) for h in self.plan.held}
        for name, param in module.named_parameters():
            if param.grad is not None and id(param) not in known:
                raise LayoutError(
                    f"cannot clip {name!r}: the model got this parameter after the Clipper was made, and none of "
                    f"those that the Clipper knows has a gradient, so that nothing would be clipped. "
                    f"Make the Clipper after the model has been wrapped (fully_shard, FSDP, parallelize_module)."
                )


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
    on_nonfinite = "raise" if error_if_nonfinite else "propagate"
    plan = Clipper(tensors, policy, mesh=mesh, distinct=distinct).plan
    read = local_gradient if isinstance(tensors, nn.Module) else local_values
    return _total_norm([read(h.param) for h in plan.held], plan, on_nonfinite)


def scale_gradients_(parameters: Parameters, policy: Policy[Any], total_norm: Tensor) -> None:
    """Scales as `policy` would at this total norm, on this rank alone; see `clip_grads_with_norm_`."""
    limit, factor = _limit(policy, local_values(total_norm).double())
    if limit is not None:
        apply.scale_(_gradients(parameters), factor)


def clamp_gradients_(parameters: Parameters, clip_value: float) -> None:
    """See `clip_grad_value_`."""
    check_not_negative("clip_value", clip_value)
    apply.clamp_(_gradients(parameters), clip_value)


def _gradients(parameters: Parameters) -> list[Tensor]:
    found = (local_gradient(param) for _, param in named_tensors(parameters))
    return [values for values in found if values is not None]


def _limit(policy: Policy[Any], norm: Tensor) -> tuple[Tensor | None, Tensor]:
    """The limit and the coefficient for a total norm; without a limit nothing is to be written."""
    about = About(torch.ones_like(norm), None, norm)
    limit, _ = policy.limit(norm, policy.init(1, norm.device), about)
    return limit, torch.ones_like(norm) if limit is None else apply.coefficient(norm, limit)


def _total_norm(values: Sequence[Tensor | None], plan: Plan, on_nonfinite: str) -> Tensor:
    sums = measure.local_sums(values, plan)
    reduce.all_reduce_(sums, plan)
    (norm,) = reduce.norms(sums, plan)
    if on_nonfinite == "raise" and not bool(norm.float().isfinite()):
        raise _nonfinite(norm, values, plan)
    return norm


def _nonfinite(norm: Tensor, values: Sequence[Tensor | None], plan: Plan) -> NonFiniteGradientError:
    """The error for all ranks. All of them come here together, since `norm` is the same on each."""
    here = [(h.name, v) for h, v in zip(plan.held, values, strict=True) if v is not None]
    norms = measure.local_norms([v for _, v in here], plan.groups[0].norm_type, plan.device)
    ranked = [(_badness(float(n)), float(n), name) for (name, _), n in zip(here, norms, strict=True)]
    mine = max(ranked, key=lambda found: found[0], default=None)
    everywhere = [(found, rank) for rank, found in reduce.gathered(mine, plan).items() if found is not None]
    (_, worst, name), rank = max(everywhere, key=lambda f: (f[0][0], -f[1]))
    return NonFiniteGradientError(
        f"cannot clip to a total norm of {norm.item()}: the worst gradient is that of {name!r}, whose norm on rank "
        f"{rank} is {worst}. No coefficient makes such gradients finite, so that all were left as they are. "
        f"Look for the cause in the loss and its inputs, or skip this step."
    )


def _badness(norm: float) -> float:
    """NaN is worse than inf, and inf than any number."""
    return 2.0 if math.isnan(norm) else 1.0 if math.isinf(norm) else -1 / (1 + norm)


def _report(norm: Tensor, limit: Tensor | None, factor: Tensor) -> Report:
    limits = torch.full_like(norm, math.inf) if limit is None else limit
    return Report({"all": norm.float()}, {"all": limits.float()}, {"all": factor.float()}, total_norm=norm.float())
