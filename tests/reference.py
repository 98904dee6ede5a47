"""Each method in at most eight lines of float64 on whole tensors: the definition that every layout must meet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def total_norm(grads: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    wide = [g.to(torch.complex128).abs() if g.is_complex() else g.double().abs() for g in grads]
    elements = torch.cat([torch.zeros(1, dtype=torch.float64), *(w.flatten().cpu() for w in wide)])
    largest = elements.max()
    if norm_type == float("inf") or largest == 0 or not largest.isfinite():
        return largest
    return largest * (elements / largest).pow(norm_type).sum() ** (1 / norm_type)


def clip_norm(grads: Sequence[Tensor], max_norm: float, norm_type: float = 2.0, eps: float = 0.0) -> list[Tensor]:
    factor = (max_norm / (total_norm(grads, norm_type) + eps)).clamp(max=1).item()
    return [g * factor if g.is_complex() else g.double() * factor for g in grads]


def _scaled(grad: Tensor, norms: Tensor, limits: Tensor | float) -> Tensor:
    return grad.double() * torch.where(norms <= limits, 1.0, limits / norms)


def clip_tensor_norm(grad: Tensor, max_norm: float, norm_type: float = 2.0) -> Tensor:
    return _scaled(grad, total_norm([grad], norm_type), max_norm)


def clip_block_rms(grad: Tensor, threshold: float) -> Tensor:
    return _scaled(grad, total_norm([grad]), threshold * grad.numel() ** 0.5)


def agc(
    grad: Tensor, weight: Tensor, factor: float, eps: float = 1e-3, norm_type: float = 2.0, unit_dim: int = 0
) -> Tensor:
    dims = tuple(range(grad.ndim)) if grad.ndim < 2 else tuple(d for d in range(grad.ndim) if d != unit_dim % grad.ndim)
    grad_norms = torch.linalg.vector_norm(grad.double(), norm_type, dims, keepdim=True)
    weight_norms = torch.linalg.vector_norm(weight.double(), norm_type, dims, keepdim=True)
    return _scaled(grad, grad_norms, factor * weight_norms.clamp(min=eps))
