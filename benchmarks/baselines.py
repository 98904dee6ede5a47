"""Everyone who clips, on plain tensors and on DTensors, and the passes over memory that nobody can beat."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import distclip
from benchmarks.correctness import NORM_TOLERANCE
from benchmarks.timing import Gradients, Rival

TORCH, CLIPPER, FUNCTION = "torch", "distclip, Clipper", "distclip, function"
OVERLAP = "distclip, overlap"
PLAIN_READ, PLAIN_WRITE = "plain read", "plain write (mul_)"
PLAIN_BOTH, LOOK = "sum, then mul_", "a look at .grad and its version"
MEASURING, COPY = "distclip, measuring alone", "device copy"
Run = Callable[[], Any]


def torch_clip(gradients: Gradients, limit: float) -> Run:
    """As trainers call it: a norm that is a DTensor has to be made whole before anyone can log it."""

    def run() -> Tensor:
        norm = nn.utils.clip_grad_norm_(gradients.params, limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    return run


def torchtitan_clip(gradients: Gradients, limit: float) -> Run:
    from torchtitan.distributed.utils import clip_grad_norm_

    return lambda: clip_grad_norm_(gradients.params, limit, foreach=True)


def megatron_clip(gradients: Gradients, limit: float) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Transformer Engine and Apex need not be installed
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32

    def run() -> float:
        norm = get_grad_norm_fp32([p.grad for p in gradients.params])
        clip_grad_by_total_norm_fp32(gradients.params, limit, norm)
        return norm

    return run


def deepspeed_clip(gradients: Gradients, limit: float) -> Run:
    """The two functions that its bf16 optimizer calls; `clip_grad_norm_` beside them wants DeepSpeed's own groups."""
    from deepspeed.runtime.utils import clip_tensors_by_global_norm

    return lambda: clip_tensors_by_global_norm([p.grad for p in gradients.params], limit)


def clipper_clip(gradients: Gradients, limit: float) -> Run:
    clipper = distclip.Clipper(gradients.params, distclip.ClipNorm(limit))
    return lambda: clipper.clip_().total_norm


def overlap_clip(gradients: Gradients, limit: float) -> Run:
    clipper = distclip.Clipper(gradients.params, distclip.ClipNorm(limit), overlap=True)
    return lambda: clipper.clip_().total_norm


def function_clip(gradients: Gradients, limit: float) -> Run:
    return lambda: distclip.clip_grad_norm_(gradients.params, limit)


def plain_read(gradients: Gradients, limit: float) -> Run:
    """One call over all elements in one buffer. In 16 bits `dot` is bound by its arithmetic, and `sum` is not."""
    flat = gradients.flat
    return (lambda: torch.dot(flat, flat)) if flat.dtype == torch.float32 else flat.sum


def plain_write(gradients: Gradients, limit: float) -> Run:
    return lambda: gradients.flat.mul_(1.0)  # torch has no shortcut for 1


def plain_both(gradients: Gradients, limit: float) -> Run:
    """The least that torch's operators need for a clipping that knows the norm before it writes."""
    return lambda: (gradients.flat.sum(), gradients.flat.mul_(1.0))


def look(gradients: Gradients, limit: float) -> Run:
    """Whether every gradient still is what was measured during backward: nobody who overlaps can do without."""
    return lambda: [param.grad._version for param in gradients.params if param.grad is not None]


def measuring(gradients: Gradients, limit: float) -> Run:
    """What `clip_` does before it scales."""
    clipper = distclip.Clipper(gradients.params, distclip.ClipNorm(limit))
    return lambda: clipper.decide((), None).norm


def copy(gradients: Gradients, limit: float) -> Run:
    target = torch.empty_like(gradients.flat)
    return lambda: target.copy_(gradients.flat)


def stepping(optimizer: Optimizer) -> list[Rival]:
    """Clipping and the step of one optimizer, which everybody shares: its states are large."""

    def torch_step(gradients: Gradients, limit: float) -> Run:
        clip = torch_clip(gradients, limit)
        return lambda: (clip(), optimizer.step())[0]

    def clipper_step(gradients: Gradients, limit: float) -> Run:
        clipper = distclip.Clipper(gradients.params, distclip.ClipNorm(limit))
        return lambda: clipper.step(optimizer).total_norm

    return [Rival(TORCH, torch_step), Rival(CLIPPER, clipper_step, NORM_TOLERANCE)]


ON_RANKS = (
    Rival(TORCH, torch_clip),
    Rival("torchtitan", torchtitan_clip),
    Rival(CLIPPER, clipper_clip, NORM_TOLERANCE),
    Rival(FUNCTION, function_clip, NORM_TOLERANCE),
    Rival(PLAIN_READ, plain_read, None),
)
AFTER_BACKWARD = (
    Rival(TORCH, torch_clip),
    Rival(CLIPPER, clipper_clip, NORM_TOLERANCE),
    Rival(OVERLAP, overlap_clip, NORM_TOLERANCE),
    Rival(LOOK, look, None),
)
IN_ONE_PROCESS = (
    *ON_RANKS,
    Rival("Megatron-core", megatron_clip, needs="float32 gradients on CUDA and a process group"),
    Rival("DeepSpeed", deepspeed_clip),
    Rival(PLAIN_WRITE, plain_write, None),
    Rival(PLAIN_BOTH, plain_both, None),
)
