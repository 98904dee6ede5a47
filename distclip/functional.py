"""TensorFlow's functions: out of place, on tensors and DTensors.

A DTensor comes back as one with the same placements, a `Partial` one reduced. Sums are float64. The
results carry no autograd history.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from distclip import api, kernels, scaling
from distclip.arguments import as_number, items, kind_of, shown
from distclip.norms import reduce
from distclip.norms.power_sums import norm_dtype
from distclip.parameters import list_items, named_tensors
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
    clip_norm = check_not_negative("clip_norm", clip_norm)
    t = gradients.resolve_partial(_check_tensor("t", t))
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
    """All tensors scaled by min(1, clip_norm / their common norm), and that norm.

    The norm is float32, or float64 where all tensors are float64. None stays None. A norm that is
    infinite or NaN makes every element NaN. A tensor given twice counts once.

    Args:
        use_norm: the norm, if it is known already; nothing is measured then.

    Raises:
        ValueError: `clip_norm` is negative or NaN, or a tensor holds integers.

    Collective: one all-reduce of a few numbers over all ranks; none where nothing is sharded, or
        with `use_norm`.

    Reference: TensorFlow, `tf.clip_by_global_norm`.
    """
    clip_norm = check_not_negative("clip_norm", clip_norm)
    listed = [t if t is None else _check_tensor(f"#{i}", t) for i, t in enumerate(_items(t_list))]
    given = [None if t is None else gradients.resolve_partial(t) for t in listed]
    present = [t for t in given if t is not None]
    norm = _norm(present) if use_norm is None else _as_norm(use_norm, present)
    seen = norm.to(norm_dtype(t.dtype for t in present))  # by the caller
    factor = torch.where(seen.isfinite(), _coefficient(norm, clip_norm), math.nan)
    scaled = iter(_scaled(present, factor))
    return [None if t is None else next(scaled) for t in given], seen


@outside_of_graphs
@torch.no_grad()
def clip_by_value(
    t: Tensor, clip_value_min: float | Tensor, clip_value_max: float | Tensor
) -> Tensor:
    """`t` with every element clamped to [clip_value_min, clip_value_max]; NaN stays NaN.

    Args:
        clip_value_min, clip_value_max: numbers, or tensors that can be broadcast to the shape of
            `t`. For a DTensor only numbers and tensors with one element, because it is unknown
            which part of larger ones belongs to its shard.

    Raises:
        ValueError: no number lies between the bounds somewhere, or they have another shape; `t` is
            sparse, or complex, which has no order.

    Collective: none. Bounds on an accelerator are waited for.

    Reference: TensorFlow, `tf.clip_by_value`.
    """
    _check_tensor("t", t)
    low = _bound("clip_value_min", clip_value_min, t)
    high = _bound("clip_value_max", clip_value_max, t)
    if not _all(low <= high):
        raise ValueError(
            f"cannot clamp to [{shown(clip_value_min)}, {shown(clip_value_max)}]: the lower bound "
            f"is not at most the upper one everywhere, and no number lies between them. "
            f"Pass clip_value_min <= clip_value_max."
        )
    if t.is_complex():
        raise ValueError(
            "cannot clamp a complex tensor: complex numbers have no order, and none lies between "
            "two bounds. Clip its norm instead, or clamp `torch.view_as_real(t)`."
        )
    _check_dense(t)
    t = gradients.resolve_partial(t)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low, high = (
            torch.as_tensor(bound, dtype=t.dtype, device=t.device) for bound in (low, high)
        )
    return torch.clamp(t, low, high)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return api.measure_tensors(tensors).total_norm


def _bound(name: str, given: Any, t: Tensor) -> Any:
    """A bound as a number, or as a tensor that can be broadcast to `t`."""
    if not isinstance(given, Tensor) or given.numel() == 1:
        plain = gradients.local_values(given) if isinstance(given, Tensor) else given
        return as_number(name, plain, "a number or a tensor")
    if given.is_complex() or given.dtype is torch.bool:
        as_number(name, given, "real numbers")  # raises
    if gradients.is_dtensor(t) or gradients.is_dtensor(given):
        raise ValueError(
            f"cannot clamp a DTensor to a {name} of shape {list(given.shape)}: it is unknown which "
            f"of its elements belong to the shard on this rank. Pass a number, or a tensor with "
            f"one element; or clamp `t.full_tensor()`."
        )
    try:
        fits = torch.broadcast_shapes(given.shape, t.shape) == t.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"cannot clamp a tensor of shape {list(t.shape)} to a {name} of shape "
            f"{list(given.shape)}: there is not one bound for each element. Pass a number, or a "
            f"tensor that can be broadcast to the shape of `t`."
        )
    return given.to(t.device)


def _all(found: bool | Tensor) -> bool:
    return bool(found.all()) if isinstance(found, Tensor) else found


def _as_norm(given: Any, beside: Sequence[Tensor]) -> Tensor:
    if isinstance(given, Tensor) and given.numel() == 1 and given.is_floating_point():
        return gradients.local_values(given).double().reshape(())
    given = as_number("use_norm", given, "a number, or a tensor with one element")
    device = beside[0].device if beside else torch.device("cpu")
    return torch.full((), given, dtype=torch.float64, device=device)


def _coefficient(norms: Tensor, clip_norm: float) -> Tensor:
    return kernels.coefficients(norms, torch.full_like(norms, clip_norm))


def _scaled(tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    copies = [t.clone() for t in tensors]
    scaling.scale_(kernels.tensor_lists([gradients.local_values(copy) for copy in copies]), factor)
    return copies


def _items(t_list: Any) -> list[Any]:
    """The items of `t_list`; a tensor by itself would be taken apart into its rows."""
    if isinstance(t_list, Tensor):
        raise TypeError(
            f"cannot clip t_list: it is {kind_of(t_list)}, and a tensor would be taken for a list "
            f"of its rows. Pass a list of tensors, `[t]`, or use `clip_by_norm(t, clip_norm)`."
        )
    return list_items(t_list)


def _check_tensor(name: str, t: Any) -> Tensor:
    if isinstance(t, Tensor):
        return t
    raise TypeError(
        f"cannot clip {name}={shown(t)}: it is {kind_of(t)}, and the result would have no dtype "
        f"and no device. Pass a tensor, such as `torch.as_tensor({name.lstrip('#')})`."
    )


def _check_dense(t: Tensor) -> None:
    if t.layout is not torch.strided:
        raise ValueError(
            f"cannot clip a tensor of layout {t.layout} element by element or over some of its "
            f"dims: its zeros are not stored and would be left out. Pass `t.to_dense()`, or clip "
            f"its whole norm."
        )


def _dims(t: Tensor, axes: int | Sequence[int]) -> list[int]:
    """`axes` counted from the first dim, each once."""
    given = items(axes)
    given = [axes] if given is None else given
    numbers = [as_number("axes", axis, "whole numbers, or None for all dims") for axis in given]
    if broken := [number for number in numbers if not number.is_integer()]:
        raise ValueError(
            f"cannot clip over axes={shown(axes)}: {broken[0]} is no whole number, and counts no "
            f"dim. Pass numbers from {-t.ndim} to {t.ndim - 1}, or None for all dims."
        )
    listed = [int(number) for number in numbers]
    if unknown := [axis for axis in listed if not -t.ndim <= axis < t.ndim]:
        raise ValueError(
            f"cannot clip over axes={axes}: the tensor has the shape {list(t.shape)}, and no dim "
            f"{unknown}. Pass numbers from {-t.ndim} to {t.ndim - 1}, or None for all dims."
        )
    return sorted({axis % t.ndim for axis in listed})
