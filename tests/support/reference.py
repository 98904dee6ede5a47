"""Each method in at most eight lines of float64 on whole tensors: the definition that every layout
must meet.

The adaptive methods take the norms of all steps, one after the other, and return what is left of
them.
"""

from __future__ import annotations

import math
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


def clip_norm(
    grads: Sequence[Tensor], max_norm: float, norm_type: float = 2.0, eps: float = 0.0
) -> list[Tensor]:
    factor = (max_norm / (total_norm(grads, norm_type) + eps)).clamp(max=1).item()
    return [g * factor if g.is_complex() else g.double() * factor for g in grads]


def clip_by_norm(tensor: Tensor, clip_norm: float, axes: Sequence[int] | None = None) -> Tensor:
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float64))
    dims = tuple(range(tensor.ndim)) if axes is None else tuple(axes)
    norms = wide.abs().square().sum(dims, keepdim=True).sqrt() if dims else wide.abs()
    return wide * (clip_norm / norms).nan_to_num(nan=1.0).clamp(max=1)


def clip_tensor_norm(
    grads: Sequence[Tensor], max_norm: float, norm_type: float = 2.0
) -> list[Tensor]:
    return [clip_norm([g], max_norm, norm_type)[0] for g in grads]


def clip_block_rms(grads: Sequence[Tensor], threshold: float) -> list[Tensor]:
    return [
        g.double() * (threshold / g.double().square().mean().sqrt()).clamp(max=1) for g in grads
    ]


def clip_value(grads: Sequence[Tensor], bound: float) -> list[Tensor]:
    return [g.double().clamp(-bound, bound) for g in grads]


def units(tensor: Tensor, unit_dim: int = 0) -> Tensor:
    """One row a unit. optax (units on the last dim) takes a tensor with one dim longer than 1 as a
    single unit.
    """
    single = tensor.ndim <= 1 or (unit_dim == -1 and tensor.squeeze().ndim <= 1)
    return (
        tensor.double().reshape(1, -1)
        if single
        else tensor.double().movedim(unit_dim, 0).flatten(1)
    )


def agc(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    clip_factor: float,
    eps=1e-3,
    unit_dim=0,
    norm_type=2.0,
) -> list[Tensor]:
    clipped = []
    for weight, grad in zip(weights, grads, strict=True):
        limits = clip_factor * units(weight, unit_dim).norm(norm_type, dim=1).clamp(min=eps)
        factors = (limits / units(grad, unit_dim).norm(norm_type, dim=1)).clamp(max=1)
        factors = factors if unit_dim else factors.reshape(-1, *[1] * (grad.ndim - 1))
        clipped.append((grad.double() * factors).reshape(grad.shape))
    return clipped


def autoclip(norms: Sequence[float], percentile: float, history: int) -> list[float]:
    seen = [norms[max(0, t + 1 - history) : t + 1] for t in range(len(norms))]
    import numpy as np  # not on every machine with a GPU

    return [
        min(norm, np.percentile(past, percentile)) for norm, past in zip(norms, seen, strict=True)
    ]


def accepts(norms: Sequence[float], z_thresh: float, window: int, max_norm: float) -> list[bool]:
    import numpy as np

    accepted: list[float] = []
    for norm in norms:
        past, limit = accepted[-window:], max_norm
        if len(past) >= max(2, window // 2):
            limit = min(max_norm, np.mean(past) + z_thresh * np.std(past, ddof=1))
        accepted += [norm] if norm <= limit else []
    return [norm in accepted for norm in norms]


def zclip(
    norms: Sequence[float], z_thresh: float, alpha: float, warmup_steps: int, max_norm: float
) -> list[float]:
    import numpy as np

    mean, var = np.mean(norms[:warmup_steps]), np.var(norms[:warmup_steps])
    clipped = [min(norm, max_norm) for norm in norms[:warmup_steps]]
    for norm in norms[warmup_steps:]:
        spike = norm - mean > z_thresh * math.sqrt(var)
        accepted = mean + z_thresh**2 * var / (norm - mean) if spike else norm
        mean, var = (
            (m := alpha * mean + (1 - alpha) * accepted),
            alpha * var + (1 - alpha) * (accepted - m) ** 2,
        )
        clipped.append(min(accepted, max_norm))
    return clipped


def adagc(
    steps: Sequence[Sequence[float]], ratio: float, max_norm: float, beta: float, warmup_steps: int
) -> Tensor:
    gamma, clipped = torch.full((len(steps[0]),), math.inf, dtype=torch.float64), []
    for t, norms in enumerate(torch.tensor(steps, dtype=torch.float64)):
        early = gamma.isinf() | (t < warmup_steps)
        scale = min(1.0, max_norm / max(norms.norm().item(), 1e-300))
        clipped.append(torch.where(early, norms * scale, norms.minimum(ratio * gamma)))
        after = torch.where(
            early, gamma.minimum(clipped[-1]), beta * gamma + (1 - beta) * clipped[-1]
        )
        gamma = torch.where(norms > 0, after, gamma)
    return torch.stack(clipped)


def adagn(steps: Sequence[Sequence[float]], gamma1: float, gamma2: float, eps: float) -> Tensor:
    scaled = torch.zeros(len(steps), len(steps[0]), dtype=torch.float64)
    for tensor, norms in enumerate(zip(*steps, strict=True)):
        m, v, counted = 0.0, 0.0, [step for step, norm in enumerate(norms) if norm]
        for t, step in enumerate(counted, 1):
            m = gamma1 * m + (1 - gamma1) * norms[step]
            v = gamma2 * v + (1 - gamma2) * norms[step] ** 2
            scaled[step, tensor] = m / (1 - gamma1**t) / (math.sqrt(v / (1 - gamma2**t)) + eps)
    return scaled


def aggc(
    norms: Sequence[float],
    low: float,
    high: float,
    beta: float,
    max_down: float,
    max_up: float,
    late: tuple[float, float, float, float] = (1.0, 1.0, math.inf, 1.0),
) -> list[float]:
    """`late` is late_low, late_high, late_from and late_steps."""
    average, scaled = 0.0, []
    for step, norm in enumerate(norms):
        share = min(1.0, max(0.0, (step - late[2]) / late[3]))
        bottom = average * (low + share * (late[0] - low))
        top = average * (high + share * (late[1] - high))
        down, up = max(top, max_down * norm), min(bottom, max_up * norm) if norm else 0.0
        scaled.append(down if 0 < top < norm else up if norm < bottom else norm)
        average = beta * average + (1 - beta) * scaled[-1] if norm else average
    return scaled
