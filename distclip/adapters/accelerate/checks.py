"""What must be so before a policy is put on what an Accelerator has prepared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distclip.adapters.frameworks import ACCELERATE, import_framework
from distclip.clipper import Clipper

_accelerate = import_framework(ACCELERATE, "accelerate")
_Accelerated = import_framework(ACCELERATE, "accelerate.optimizer").AcceleratedOptimizer


def is_deepspeed(accelerator: Any) -> bool:
    return accelerator.distributed_type == _accelerate.DistributedType.DEEPSPEED


def check_accelerator(accelerator: Any) -> None:
    if not isinstance(accelerator, _accelerate.Accelerator):
        raise TypeError(
            f"cannot prepare for accelerator={type(accelerator).__qualname__}: it is no "
            f"accelerate.Accelerator, and only that knows when gradients are synchronised. Pass "
            f"the accelerator first: `prepare(accelerator, model, optimizer, policy)`."
        )
    kind = accelerator.distributed_type
    other = {
        "MEGATRON_LM": "use `distclip.adapters.megatron` on its optimizer",
        "XLA": "clip by the accelerator's own method",
    }.get(str(kind.value))
    if other is not None or accelerator.has_lomo_optimizer:
        name = "a LOMO optimizer" if other is None else str(kind.value)
        raise ValueError(
            f"cannot clip under {name}: accelerate keeps no gradients between backward and step "
            f"there that are summed over ranks and could be measured. Instead, "
            f"{other or 'use an optimizer of torch'}."
        )


def check_engine(
    accelerator: Any, model: Any, options: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    wrapped = accelerator.deepspeed_engine_wrapped
    if wrapped is None or model is not wrapped.engine:
        raise ValueError(
            f"cannot clip this {type(model).__qualname__} under DeepSpeed: only the engine that "
            f"`accelerator.prepare` returned shows where the gradients lie, and it clips them as "
            f"one group. Call `model, optimizer = accelerator.prepare(model, optimizer)` first, "
            f"and pass that model."
        )
    if given := [name for name, value in options.items() if value != defaults[name]]:
        raise ValueError(
            f"cannot use {', '.join(f'{name}=' for name in given)} under DeepSpeed: its engine "
            f"holds the gradients in partitions of its own, and clips inside its step. Leave out "
            f"what is not `policy`, `on_nonfinite` or `tensor_norms`."
        )


def check_optimizers(accelerator: Any, given: Sequence[Any]) -> None:
    if not given:
        raise TypeError(
            "cannot prepare without an optimizer: whether gradients are scaled, and which step "
            "follows, is a matter of each. Pass what `accelerator.prepare` returned."
        )
    for each in given:
        if not any(each is known for known in accelerator._optimizers):
            why = "accelerate has not prepared it"
            if isinstance(each, _Accelerated):
                why = "it is of another accelerator, or of before `accelerator.free_memory()`"
            raise ValueError(
                f"cannot clip for this {type(each).__qualname__}: {why}, and "
                f"would not step it when gradients are synchronised. Call `model, optimizer = "
                f"accelerator.prepare(model, optimizer)` first, and pass what that returned."
            )


def check_prepared(accelerator: Any, clipper: Clipper) -> None:
    known = {id(param) for model in accelerator._models for param in model.parameters()}
    for param in clipper.plan.params:
        if id(param.param) not in known:
            raise ValueError(
                f"cannot clip {param.name!r}: it belongs to no model that accelerate has prepared, "
                f"and its gradients may not be summed over ranks. Call `model, optimizer = "
                f"accelerator.prepare(model, optimizer)` first, and pass that model, or "
                f"parameters taken from it afterwards."
            )
