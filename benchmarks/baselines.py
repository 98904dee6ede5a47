"""Who clips plain tensors and DTensors, and the passes over memory that clipping needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import distclip
from benchmarks.gradients import Gradients
from benchmarks.timing import Baseline, Run

ONE_ULP = 1.2e-7  # of float32: the tolerance of distclip's norm
TORCH, CLIPPER, FUNCTION = "torch", "distclip, Clipper", "distclip, function"
FOLLOWING = "distclip, Clipper of modules"
TENSORS, BETWEEN = "distclip, tensor norms", "distclip, between tensor norms"
OVERLAP, MEASURING = "distclip, overlap", "distclip, measuring alone"
PLAIN_READ, PLAIN_WRITE, COPY = "plain read", "plain write (mul_)", "device copy"
PLAIN_BOTH, LOOK = "sum, then mul_", "a look at .grad and its version"
FOREACH, FOREACH_MUL = "torch._foreach_norm", "torch._foreach_mul_"
COMPILED = "torch, compiled"


def torch_clip(gradients: Gradients, limit: float) -> Run:
    """As trainers call it: a norm that is a DTensor is made whole before anyone can log it."""

    def run() -> Tensor:
        norm = nn.utils.clip_grad_norm_(gradients.params, limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    return run


def torchtitan_clip(gradients: Gradients, limit: float) -> Run:
    from torchtitan.distributed.utils import clip_grad_norm_

    return lambda: clip_grad_norm_(gradients.params, limit, foreach=True)


def megatron_clip(gradients: Gradients, limit: float) -> Run:
    if not gradients.flat.is_cuda:  # its import takes seconds
        raise RuntimeError(f"these gradients are on {gradients.flat.device}")
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32

    def run() -> float:
        norm = get_grad_norm_fp32([p.grad for p in gradients.params])
        clip_grad_by_total_norm_fp32(gradients.params, limit, norm)
        return norm

    return run


def deepspeed_clip(gradients: Gradients, limit: float) -> Run:
    """What its bf16 optimizer calls; its `clip_grad_norm_` needs process groups of DeepSpeed."""
    from deepspeed.runtime.utils import clip_tensors_by_global_norm

    return lambda: clip_tensors_by_global_norm([p.grad for p in gradients.params], limit)


def clipper_of(gradients: Gradients, limit: float, **options: Any) -> distclip.Clipper:
    return distclip.Clipper(gradients.params, distclip.ClipNorm(limit), **options)


def clipper_clip(gradients: Gradients, limit: float) -> Run:
    clipper = clipper_of(gradients, limit)
    return lambda: clipper.clip_().total_norm


def following_clip(gradients: Gradients, limit: float) -> Run:
    """It looks for other parameters in the modules, of two tensors each, and in the optimizer."""
    pairs = zip(gradients.params[::2], gradients.params[1::2], strict=False)
    modules = [nn.ParameterList(pair) for pair in pairs]
    if len(gradients.params) % 2:
        modules.append(nn.ParameterList(gradients.params[-1:]))
    model = nn.ModuleList(modules)
    clipper = distclip.Clipper(model, distclip.ClipNorm(limit))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return lambda: clipper.clip_(optimizer).total_norm


def overlap_clip(gradients: Gradients, limit: float) -> Run:
    clipper = clipper_of(gradients, limit, overlap=True)
    return lambda: clipper.clip_().total_norm


def tensor_norms_clip(gradients: Gradients, limit: float) -> Run:
    """A call that has the norm of every tensor."""
    clipper = clipper_of(gradients, limit, tensor_norms=True)
    return lambda: clipper.clip_().total_norm


def between_clip(gradients: Gradients, limit: float) -> Run:
    """Calls of such a Clipper that leave them out. The first has them; the check makes it."""
    clipper = clipper_of(gradients, limit, tensor_norms=1 << 30)
    return lambda: clipper.clip_().total_norm


def function_clip(gradients: Gradients, limit: float) -> Run:
    return lambda: distclip.clip_grad_norm_(gradients.params, limit)


def measure_alone(gradients: Gradients, limit: float) -> Run:
    """What `clip_` does before it scales."""
    clipper = clipper_of(gradients, limit)
    return lambda: clipper.decide().report.total_norm


def plain_read(gradients: Gradients, limit: float) -> Run:
    """One call over all elements. In 16 bits `dot` is bound by its arithmetic, and `sum` is not."""
    flat = gradients.flat
    return (lambda: torch.dot(flat, flat)) if flat.dtype == torch.float32 else flat.sum


def plain_write(gradients: Gradients, limit: float) -> Run:
    return lambda: gradients.flat.mul_(1.0)  # torch has no shortcut for 1


def plain_both(gradients: Gradients, limit: float) -> Run:
    """The least that torch's operators need for a clip that knows the norm before it writes."""
    return lambda: (gradients.flat.sum(), gradients.flat.mul_(1.0))


def foreach_norm(gradients: Gradients, limit: float) -> Run:
    """Of each tensor: what torch's function does before it combines them."""
    by_dtype = gradients.by_dtype
    return lambda: [torch._foreach_norm(values) for values in by_dtype]


def foreach_mul(gradients: Gradients, limit: float) -> Run:
    by_dtype = gradients.by_dtype
    return lambda: [torch._foreach_mul_(values, 1.0) for values in by_dtype]


def compiled_clip(gradients: Gradients, limit: float) -> Run:
    backend = "inductor" if gradients.flat.is_cuda else "eager"  # a dry run compiles no C++
    function = torch.compile(nn.utils.clip_grad_norm_, backend=backend)
    return lambda: function(gradients.params, limit)


def look(gradients: Gradients, limit: float) -> Run:
    """Whether each gradient still is what backward measured: the least that overlap needs."""
    return lambda: [p.grad._version for p in gradients.params if p.grad is not None]


def copy(gradients: Gradients, limit: float) -> Run:
    target = torch.empty_like(gradients.flat)
    return lambda: target.copy_(gradients.flat)


CLIPPING = Baseline(TORCH, torch_clip), Baseline(CLIPPER, clipper_clip, ONE_ULP)
AFTER_BACKWARD = (
    *CLIPPING,
    Baseline(OVERLAP, overlap_clip, ONE_ULP),
    Baseline(LOOK, look, tolerance=None),
)
ON_RANKS = (
    *CLIPPING,
    Baseline(FUNCTION, function_clip, ONE_ULP),
    Baseline(TENSORS, tensor_norms_clip, ONE_ULP),
    Baseline(BETWEEN, between_clip, ONE_ULP),
    Baseline("torchtitan", torchtitan_clip),
    Baseline(PLAIN_READ, plain_read, tolerance=None),
)
IN_ONE_PROCESS = (
    *ON_RANKS,
    Baseline(FOLLOWING, following_clip, ONE_ULP),
    Baseline("Megatron-core", megatron_clip, needs="float32 gradients on CUDA and a process group"),
    Baseline("DeepSpeed", deepspeed_clip),
    Baseline(PLAIN_WRITE, plain_write, tolerance=None),
    Baseline(PLAIN_BOTH, plain_both, tolerance=None),
)
MEASURED = (
    Baseline(COPY, copy, tolerance=None),
    Baseline(FOREACH, foreach_norm, tolerance=None),
    Baseline(MEASURING, measure_alone, ONE_ULP),
    *CLIPPING,
)
CLIPPED = (Baseline(FOREACH_MUL, foreach_mul, tolerance=None), *CLIPPING)
