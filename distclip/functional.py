"""TensorFlow's functions: out of place, on tensors and DTensors.

A DTensor comes back as one with the same placements, a `Partial` one reduced. Sums are float64. The
results carry no autograd history.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from distclip import api, kernels, step
from distclip.norms import reduce
from distclip.parameters import named_tensors
from distclip.policies import check_not_negative
from distclip.sharding import local_tensors as gradients
from distclip.torch_private import outside_of_graphs


@outside_of_graphs
@torch.no_grad()
def clip_by_norm(t: Tensor, clip_norm: float, axes: int | Sequence[int] | None = None) -> Tensor:
    """`t` scaled by min(1, clip_norm / its norm); with `axes`, norms are taken over these dims.

    `axes=[1]` clips every row of a matrix by itself. Zeros stay zeros, and a NaN makes everything
    that shares its norm NaN.

    Raises:
        ValueError: `clip_norm` is negative or NaN, `t` holds integers, it has no such dims, or it
            is sparse and `axes` are given.

    Collective: one all-reduce for each mesh axis that shards a dim which the norm covers; without
        `axes`, one over all ranks if `t` is sharded.

    Example:
        >>> import torch, distclip
        >>> distclip.functional.clip_by_norm(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0, axes=[1])
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])

    Reference: TensorFlow, `tf.clip_by_norm`.
    """
    check_not_negative("clip_norm", clip_norm)
    t = gradients.resolve_partial(t)
    if axes is None:
        return _scaled([t], _coefficient(_norm([t]), clip_norm))[0]
    named_tensors(t)
    _check_dense(t)
    dims = _dims(t, axes)
    clipped = t.clone()
    local = gradients.local_values(clipped)
    wide = local.to(torch.promote_types(local.dtype, torch.float64))
    squares = wide.abs().square()
    sums = squares.sum(dims, keepdim=True) if dims else squares  # torch takes no dims for all dims
    reduce.sum_(sums, gradients.groups_sharding(t, dims))
    local.copy_(wide * _coefficient(sums.sqrt(), clip_norm))
    return clipped


@outside_of_graphs
@torch.no_grad()
def clip_by_global_norm(
    t_list: Iterable[Tensor | None], clip_norm: float, use_norm: float | Tensor | None = None
) -> tuple[list[Tensor | None], Tensor]:
    """All tensors scaled by min(1, clip_norm / their common norm), and that norm, float32.

    None stays None. A norm that is infinite or NaN makes every element NaN. A tensor given twice
    counts once.

    Args:
        use_norm: the norm, if it is known already; nothing is measured then.

    Raises:
        ValueError: `clip_norm` is negative or NaN, or a tensor holds integers.

    Collective: one all-reduce of a few numbers over all ranks; none where nothing is sharded, or
        with `use_norm`.

    Reference: TensorFlow, `tf.clip_by_global_norm`.
    """
    check_not_negative("clip_norm", clip_norm)
    given = [None if t is None else gradients.resolve_partial(t) for t in t_list]
    present = [t for t in given if t is not None]
    norm = _norm(present) if use_norm is None else _as_norm(use_norm, present)
    # Judged in float32, as the norm that the caller sees.
    factor = torch.where(norm.float().isfinite(), _coefficient(norm, clip_norm), math.nan)
    scaled = iter(_scaled(present, factor))
    return [None if t is None else next(scaled) for t in given], norm.float()


@outside_of_graphs
@torch.no_grad()
def clip_by_value(t: Tensor, clip_value_min: float, clip_value_max: float) -> Tensor:
    """`t` with every element clamped to [clip_value_min, clip_value_max]; NaN stays NaN.

    Raises:
        ValueError: no number lies between the bounds, or `t` is sparse, or complex, which has no
            order.

    Collective: none.

    Reference: TensorFlow, `tf.clip_by_value`.
    """
    if not clip_value_min <= clip_value_max:
        raise ValueError(
            f"cannot clamp to [{clip_value_min}, {clip_value_max}]: the lower bound is not at "
            f"most the upper one, and no number lies between them. "
            f"Pass clip_value_min <= clip_value_max."
        )
    if t.is_complex():
        raise ValueError(
            "cannot clamp a complex tensor: complex numbers have no order, and none lies between "
            "two bounds. Clip its norm instead, or clamp `torch.view_as_real(t)`."
        )
    _check_dense(t)
    return gradients.resolve_partial(t).clamp(clip_value_min, clip_value_max)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return api.measure_tensors(tensors).total_norm


def _as_norm(given: float | Tensor, beside: Sequence[Tensor]) -> Tensor:
    if isinstance(given, Tensor):
        return gradients.local_values(given).double()
    device = beside[0].device if beside else torch.device("cpu")
    return torch.full((), given, dtype=torch.float64, device=device)


def _coefficient(norms: Tensor, clip_norm: float) -> Tensor:
    return step.coefficient(norms, torch.full_like(norms, clip_norm))


def _scaled(tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    copies = [t.clone() for t in tensors]
    step.scale_(kernels.tensor_lists([gradients.local_values(copy) for copy in copies]), factor)
    return copies


def _check_dense(t: Tensor) -> None:
    if t.layout is not torch.strided:
        raise ValueError(
            f"cannot clip a tensor of layout {t.layout} element by element or over some of its "
            f"dims: its zeros are not stored and would be left out. Pass `t.to_dense()`, or clip "
            f"its whole norm."
        )


def _dims(t: Tensor, axes: int | Sequence[int]) -> list[int]:
    """`axes` counted from the first dim, each once."""
    listed = [axes] if isinstance(axes, int) else list(axes)
    if unknown := [axis for axis in listed if not -t.ndim <= axis < t.ndim]:
        raise ValueError(
            f"cannot clip over axes={axes}: the tensor has the shape {list(t.shape)}, and no dim "
            f"{unknown}. Pass numbers from {-t.ndim} to {t.ndim - 1}, or None for all dims."
        )
    return sorted({axis % t.ndim for axis in listed})
