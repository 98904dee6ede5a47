"""The functions of `torch.nn.utils`, right on every layout: the same names and order of arguments.

`parameters` is a tensor, an iterable of tensors (a generator is read once) or an `nn.Module`. FSDP1 needs the
module, since its parameters do not show how they are sharded. `foreach` is taken for torch's sake and ignored:
the device chooses the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distclip import once
from distclip.clipper import ClipNorm, Parameters

if TYPE_CHECKING:
    from distclip import EmptyState, NormContext

_EPS = 1e-6  # torch.nn.utils.clip_grad


@dataclass(frozen=True)
class _TorchNorm(ClipNorm):
    """`ClipNorm` with torch's coefficient, max_norm / (norm + 1e-6)."""

    def limit(self, norms: Tensor, state: EmptyState, about: NormContext) -> tuple[Tensor | None, EmptyState]:
        # The limit whose quotient by the norm is torch's coefficient, at zero and infinity too.
        return None if math.isinf(self.max_norm) else self.max_norm / (1 + _EPS / norms), state


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
    """Scales all gradients by max_norm / (total norm + 1e-6) where that is below 1; returns the norm before.

    The norm is that of the whole model's gradients, each element counted once, as a plain float32 scalar that has
    the same bits on every rank. A NaN on any rank makes it NaN; gradients are then scaled all the same, as by
    torch. `max_norm=math.inf` only measures. A parameter given twice counts once.

    Raises:
        NonFiniteGradientError: with `error_if_nonfinite`, on all ranks together, and no gradient is changed.
        LayoutError: it cannot be told which ranks hold which elements.
        ValueError: `max_norm` is negative or NaN, `norm_type` is not above 0, or a tensor holds integers.

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
    policy = _TorchNorm(float(max_norm), float(norm_type))
    return once.clip_(parameters, policy, error_if_nonfinite, mesh, tuple(distinct))


def get_total_norm(
    tensors: Parameters,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    mesh: DeviceMesh | None = None,
    distinct: Sequence[str] = ("pp",),
) -> Tensor:
    """The norm over all elements of `tensors` (gradients, as torch takes them), or of a module's gradients.

    Result, errors and collective are those of `clip_grad_norm_`; nothing is changed.
    """
    del foreach
    policy = ClipNorm(math.inf, float(norm_type))
    return once.total_norm_of(tensors, policy, error_if_nonfinite, mesh=mesh, distinct=distinct).float()


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
    once.scale_gradients_(parameters, _TorchNorm(float(max_norm)), total_norm)


@torch.no_grad()
def clip_grad_value_(parameters: Parameters, clip_value: float, foreach: bool | None = None) -> None:
    """Clamps every gradient element to [-clip_value, clip_value] in place; NaN stays NaN.

    Raises:
        ValueError: `clip_value` is negative or NaN, or a gradient is complex, which has no order.

    Collective: none (`Partial` gradients are reduced first).
    """
    del foreach
    once.clamp_gradients_(parameters, float(clip_value))
