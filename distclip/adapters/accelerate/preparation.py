"""`prepare`: a policy on what one `Accelerator` has prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distclip.adapters import deepspeed
from distclip.adapters.accelerate import checks
from distclip.adapters.accelerate.engine import EngineClipper
from distclip.adapters.accelerate.handle import AcceleratedClipper, detach_freed
from distclip.clipper import Clipper
from distclip.nonfinite import OnNonFinite
from distclip.policies import ClipNorm, Policy
from distclip.sharding.layout import LayoutFunction
from distclip.training import wrappers
from distclip.training.wrappers import Optimizers


def prepare(
    accelerator: Any,
    model: Any,
    optimizer: Optimizers,
    policy: Policy[Any] = ClipNorm(1.0),  # noqa: B008 - frozen
    *,
    mesh: DeviceMesh | None = None,
    distinct: Sequence[str] = ("pp",),
    layouts: LayoutFunction | None = None,
    gradient: Callable[[Tensor], Tensor | None] | None = None,
    on_nonfinite: OnNonFinite = "propagate",
    max_consecutive_skips: int = 20,
    overlap: bool = False,
    tensor_norms: bool | int = False,
    symmetric_memory: bool = False,
) -> AcceleratedClipper:
    """A clipper for what `accelerator.prepare` returned: call this after it, once for each model.

    `clipper.clip_()` stands where `accelerator.clip_grad_norm_` stood, and `clipper.step()` in
    place of that and `optimizer.step()`. Until `clipper.detach()`, the accelerator's own methods
    raise for the parameters that it clips, and `save_state` and `load_state` include what the
    policy remembers.

    Args:
        accelerator: an `accelerate.Accelerator`.
        model: what `accelerator.prepare` returned; or any of its parameters, or parameter groups,
            as `Clipper` takes them, under FSDP too.
        optimizer: what `accelerator.prepare` returned, or a list of all that step these parameters.
        policy, mesh, distinct, layouts, gradient, on_nonfinite, max_consecutive_skips, overlap,
            tensor_norms, symmetric_memory: as `Clipper` has them. Under DeepSpeed, `policy`,
            `on_nonfinite` and `tensor_norms`.

    Raises:
        ValueError: accelerate has not prepared the model or the optimizer; the optimizer steps none
            of the parameters; its gradients are clipped by distclip already; accelerate runs
            Megatron-LM, XLA or LOMO, which keep no gradients that could be clipped here.
        TypeError: `accelerator` is no Accelerator.
        LayoutError, ValueError, TypeError: as `Clipper`, or `adapters.deepspeed.attach`.

    Collective: as `Clipper`; under DeepSpeed as `adapters.deepspeed.attach`.
    """
    checks.check_accelerator(accelerator)
    detach_freed()
    options: dict[str, Any] = {
        "mesh": mesh,
        "distinct": tuple(distinct) if isinstance(distinct, list) else distinct,
        "layouts": layouts,
        "gradient": gradient,
        "max_consecutive_skips": max_consecutive_skips,
        "overlap": overlap,
        "symmetric_memory": symmetric_memory,
    }
    if checks.is_deepspeed(accelerator):
        checks.check_engine(accelerator, model, options, prepare.__kwdefaults__ or {})
        handle = deepspeed.attach(model, policy, on_nonfinite, tensor_norms=tensor_norms)
        return EngineClipper(accelerator, handle)
    given = wrappers.list_optimizers(optimizer)
    checks.check_optimizers(accelerator, given)
    # `_models` is private: nothing public says what was prepared, and FSDP1 keeps there how its
    # parameters are sharded.
    clipper = Clipper(
        model,
        policy,
        on_nonfinite=on_nonfinite,
        tensor_norms=tensor_norms,
        modules=accelerator._models,
        **options,
    )
    checks.check_prepared(accelerator, clipper)
    for each in given:
        wrappers.check_wrapped(each, clipper.plan)
    return AcceleratedClipper(accelerator, clipper, given)
