"""What clipping in hooks of backward serves, and the errors for the rest; see step_in_backward."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from distclip.arguments import as_number, kind_of, shown
from distclip.errors import LayoutError
from distclip.nonfinite import OnNonFinite
from distclip.norms.plan import Plan
from distclip.policies import Policy, Scope, raises, vetoes
from distclip.sharding.fsdp1 import any_flattened
from distclip.sharding.shard import BlockShard
from distclip.torch_private import (
    has_hooks_after_accumulation,
    optimizers_in_backward,
    steps_in_bucket_hook,
)
from distclip.training.wrappers import is_wrapper, params_of

_WHAT = "cannot clip in hooks of backward"
_LOAD = "cannot load the state of a BackwardClipper"


def check_mode(mode: OnNonFinite, plan: Plan, policies: Sequence[Policy[Any]]) -> None:
    """Raises ValueError where a mode, or the veto of a policy, comes after tensors have stepped."""
    if vetoing := [policy for policy in policies if vetoes(policy)]:
        raise ValueError(
            f"{_WHAT} with {vetoing[0]}: it leaves out whole steps, and tensors have stepped "
            f"before the norm of the model is known. Use a policy that sets limits, such as "
            f"ClipNorm, or step after backward."
        )
    late = [each for each in policies if raises(each) and each.scope is Scope.MODEL]
    if late:
        raise ValueError(
            f"{_WHAT} with {late[0]}: it raises the norm of all tensors together, which is known "
            f"one step late. What raises a small norm would raise the spike that follows it as "
            f"much. Use a policy with limits per tensor, such as AdaGN, or step after backward."
        )
    if mode == "skip":
        raise ValueError(
            f'{_WHAT} with on_nonfinite="skip": tensors have stepped before the norm of the model '
            f'is known, and the step cannot be left out any more. Pass "zero", which steps '
            f'tensors whose gradient is not finite with zeros, or "raise".'
        )
    is_whole = all(group.units is not None for group in plan.groups)
    if mode == "zero" and plan.reduce_mesh is not None and not is_whole:
        raise ValueError(
            f'{_WHAT} with on_nonfinite="zero" and a policy without limits per tensor, where ranks '
            f"hold parts of the model: one rank would set its part of a tensor to zero, and others "
            f'would not know. Pass "raise", or a policy per tensor such as ClipTensorNorm.'
        )


def check_layouts(plan: Plan, declared: bool) -> None:
    """Raises LayoutError where it is not known that hooks run in one order on all ranks.

    Args:
        declared: sharding is declared by `layouts=`.
    """
    params = [param.param for param in plan.params]
    pieces = [p for p in plan.params if any(not isinstance(s.shard, BlockShard) for s in p.shards)]
    if pieces or any_flattened(params):
        name = pieces[0].name if pieces else plan.params[0].name
        raise LayoutError(
            f"{_WHAT} that step {name!r}: it is a flat buffer, as FSDP1 makes it, whose gradient "
            f"is reduced and cut after the hook. Use `fully_shard` (FSDP2)."
        )
    mesh = plan.reduce_mesh
    cut = [group for group in plan.groups if group.num_slots > 0]
    if mesh is not None and cut and (declared or mesh.holds_distinct):
        raise LayoutError(
            f"{_WHAT} in group {cut[0].name!r} with {cut[0].description}: ranks hold parts of "
            f"tensors, whose norms take an all-reduce in each hook, and with layouts= or with "
            f"ranks that hold different tensors (pipeline stages, experts) it is not known that "
            f"the hooks run in the same order. Use a policy for the whole model, such as ClipNorm, "
            f"which communicates in `end_step` alone."
        )


def check_optimizers(
    optimizers: Sequence[Optimizer], plan: Plan, modules: Sequence[nn.Module]
) -> None:
    """Raises ValueError unless each parameter that trains is stepped by one of them, once."""
    for each in optimizers:
        if is_wrapper(each):
            raise ValueError(
                f"{_WHAT} that step a {type(each).__qualname__}: it does not call the hooks of "
                f"`torch.optim.Optimizer`. Pass the optimizers inside."
            )
    names = {id(param.param): param.name for param in plan.params}
    counts = Counter(
        id(p) for each in optimizers for p in {id(q): q for q in params_of([each])}.values()
    )
    if twice := [names[i] for i, count in counts.items() if count > 1 and i in names]:
        raise ValueError(
            f"{_WHAT} that step {twice[0]!r} with two optimizers: its gradient would be clipped "
            f"twice. Give each parameter one optimizer."
        )
    for each in optimizers:
        if names.keys().isdisjoint(map(id, params_of([each]))):
            raise ValueError(
                f"{_WHAT} that step a {type(each).__qualname__} with parameters that the Clipper "
                f"does not hold: others may have taken their places (fully_shard, "
                f"parallelize_module). Make the optimizers after the model has been sharded."
            )
    left = [p.name for p in plan.params if p.param.requires_grad and id(p.param) not in counts]
    if left:
        raise ValueError(
            f"{_WHAT}: no optimizer given steps {left[0]!r} ({len(left)} parameters without one), "
            f"and its gradient would not be clipped. Pass all of them, or make two Clippers: one "
            f"for what is stepped in backward, one for the rest."
        )
    _check_ddp(optimizers, names, modules)


def _check_ddp(
    optimizers: Sequence[Optimizer], names: Mapping[int, str], modules: Sequence[nn.Module]
) -> None:
    inner = [each for module in modules for each in module.modules()]
    for ddp in (each for each in inner if isinstance(each, DistributedDataParallel)):
        steps = steps_in_bucket_hook(ddp)
        known = {id(o) for p in ddp.parameters() for o in optimizers_in_backward(p)}
        managed = {id(p) for p in ddp.parameters()}
        for each in optimizers:
            inside = [p for p in params_of([each]) if id(p) in managed and id(p) in names]
            if inside and not (steps and id(each) in known):
                raise ValueError(
                    f"{_WHAT} that step {names[id(inside[0])]!r}, which is a parameter of "
                    f"DistributedDataParallel: DDP reduces its gradient after the hook, and each "
                    f"rank would step its own. Call `_apply_optimizer_in_backward` of "
                    f"torch.distributed.optim before the first forward of DDP, which then "
                    f"steps after the all-reduce, and attach to those optimizers."
                )


def check_call(optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for a step with a closure, or one by a GradScaler."""
    name = type(optimizer).__qualname__
    if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
        raise ValueError(
            f"{_WHAT} that call `{name}.step(closure)`: the closure would run a backward inside "
            f"the hook. Call `step()`."
        )
    if getattr(optimizer, "grad_scale", None) is not None or (
        getattr(optimizer, "found_inf", None) is not None
    ):
        raise ValueError(
            f"{_WHAT} that step {name} by a GradScaler: whether to skip is known only when all "
            f"gradients are, and the first have stepped by then. Train in bfloat16 or float32."
        )


def left_out(
    plan: Plan, covered: Collection[int], stepped: Collection[int], changed: bool
) -> ValueError | None:
    """The error where a step has left out gradients, or where the model has changed."""
    if changed:
        return ValueError(
            f"{_WHAT}: the model has other parameters than when the Clipper was attached, and "
            f"their gradients were not clipped. Call `attached.remove()`, make their optimizers, "
            f"and attach again."
        )
    for i, param in enumerate(plan.params):
        tensor = param.param
        if i not in covered and tensor.requires_grad:
            return ValueError(
                f"{_WHAT}: {param.name!r} trains now, and no attached optimizer steps it. Call "
                f"`attached.remove()`, make its optimizer, and attach again."
            )
        if i in covered and i not in stepped and tensor.grad is not None:
            return ValueError(
                f"{_WHAT}: {param.name!r} has a gradient, and its optimizer has not stepped: the "
                f"hook that should call it did not run, or did not step. Under `fully_shard` "
                f"`_apply_optimizer_in_backward` registers hooks that never run; use "
                f"`param.register_post_accumulate_grad_hook`. Call `end_step` after the last "
                f"micro-batch."
            )
    return None


def stepped_again(name: str) -> ValueError:
    return ValueError(
        f"{_WHAT}: the optimizer of {name!r} steps again before `attached.end_step()` was called, "
        f"and the norm of the step would hold its gradient twice. Call `end_step()` on every rank "
        f"after each backward that steps: for each micro-batch where the hooks step in each, and "
        f"after a backward that raised."
    )


def unreduced(plan: Plan) -> ValueError:
    return ValueError(
        f"{_WHAT} that step {plan.params[0].name!r}: its gradient is `Partial`, and is reduced "
        f"only after backward. Reduce it in the hook before the step."
    )


def invalid_limit(plan: Plan) -> ValueError:
    (group,) = plan.groups
    return ValueError(
        f"{_WHAT} in group {group.name!r} with {group.description}: its `limit` returned a "
        f"negative number or NaN for {plan.params[0].name!r}, although the norm is finite. Return "
        f"limits of 0 or above."
    )


def never_clipped(params: Sequence[Tensor], names: Sequence[str]) -> ValueError | None:
    """The error where optimizers have stepped in backward, and what they stepped was not clipped.

    Hooks that a user registers need not step: they count only where no gradient is left at all.
    """
    gone = [p.requires_grad and p.grad is None for p in params]
    for param, name, is_gone in zip(params, names, gone, strict=True):
        if is_gone and optimizers_in_backward(param):
            return _never_clipped(name)
    trained = [i for i, p in enumerate(params) if p.requires_grad]
    all_gone = bool(trained) and all(p.grad is None for p in params)
    if all_gone and all(has_hooks_after_accumulation(params[i]) for i in trained):
        return _never_clipped(names[trained[0]])
    return None


def _never_clipped(name: str) -> ValueError:
    return ValueError(
        f"cannot clip {name!r}: it has no gradient, and a hook that runs in backward, as that of "
        f"an optimizer which steps there and frees the gradient. It was not clipped. Call "
        f"`attached = clipper.attach_in_backward(optimizers)` once, and `attached.end_step()` in "
        f"each step in the place of this call."
    )


class _State(NamedTuple):
    coefficients: list[Tensor | None]
    norms: list[Tensor | None]


def read_state(saved: Any, names: Sequence[str], device: torch.device) -> _State:
    """What `BackwardClipper.state_dict` returned, in the order of the groups.

    Raises:
        ValueError: the groups are others, or a number cannot be one of the state.
        TypeError: `saved` is no dictionary.
    """
    if not isinstance(saved, Mapping):
        raise TypeError(
            f"{_LOAD}: {shown(saved)} is {kind_of(saved)}. Nothing was loaded. Pass what "
            f"`attached.state_dict()` returned."
        )
    state = cast("Mapping[Any, Any]", saved)
    if set(state) != {"coefficients", "norms"}:
        raise ValueError(
            f"{_LOAD}: it has {shown(sorted(state, key=str))}, and not the coefficients and norms "
            f"of the last step. Nothing was loaded. Pass what `attached.state_dict()` returned."
        )
    return _State(
        _numbers("coefficients", state["coefficients"], names, 1.0, device),
        _numbers("norms", state["norms"], names, sys.float_info.max, device),
    )


def _numbers(
    what: str, given: Any, names: Sequence[str], largest: float, device: torch.device
) -> list[Tensor | None]:
    """One for each group, None where there is none yet."""
    if not isinstance(given, Mapping) or not set(cast("Mapping[Any, Any]", given)) <= set(names):
        raise ValueError(
            f"{_LOAD}: its {what} are {shown(given)}, and the groups here are {shown([*names])}. "
            f"Nothing was loaded. Attach as it was when the state was saved, or start without it."
        )
    by_name = cast("Mapping[str, Any]", given)
    return [
        _number(f"{what}[{name!r}]", by_name[name], largest, device) if name in by_name else None
        for name in names
    ]


def _number(path: str, given: Any, largest: float, device: torch.device) -> Tensor:
    try:
        number = as_number(path, given)
    except TypeError:
        number = math.nan
    if not 0 <= number <= largest:
        raise ValueError(
            f"{_LOAD}: {path} is {shown(given)} in the saved state, which no step can have left "
            f"there. Nothing was loaded. Load an earlier checkpoint, or start without the state."
        )
    return torch.full((), number, dtype=torch.float64, device=device)
