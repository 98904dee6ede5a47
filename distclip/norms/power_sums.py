"""How sums of |g|**p are reduced: as float64 partials that an all-reduce combines.

| norm_type | partials                                    | combined by |
|-----------|---------------------------------------------|-------------|
| p <= 6    | the sum                                     | SUM         |
| p > 6     | the sum, split by magnitude (see `_binned`) | SUM         |
| inf       | the maximum, and whether a NaN was seen     | MAX         |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Up to this p, float64 holds the p-th power of every float32 magnitude (2**-149 to 2**128), and
# the sum of 2**80 such powers.
PLAIN_UP_TO = 6.0
# For higher p, the powers of what lies within one bin stay between 2**-900 and 2**900.
_LOWEST, _HIGHEST, _REACH = -160.0, 140.0, 900.0


def num_partials(norm_type: float) -> int:
    if math.isinf(norm_type):
        return 2
    return 1 if norm_type <= PLAIN_UP_TO else len(_centers(norm_type, torch.device("cpu")))


def partials(per_tensor: Tensor, norm_type: float) -> Tensor:
    """The partials of each tensor, from its sum of powers for p <= 6, else from its norm.

    Shapes: per_tensor: [n]; the result: [n, num_partials].
    """
    if norm_type <= PLAIN_UP_TO:
        return per_tensor.unsqueeze(1)
    if math.isinf(norm_type):
        # gloo compares with `<`, and its MAX drops a NaN, which needs a number of its own.
        is_nan = per_tensor.isnan()
        return torch.stack([per_tensor.masked_fill(is_nan, math.inf), is_nan.double()], dim=1)
    return _binned(per_tensor, norm_type)


def combine(partials: Tensor, norm_type: float) -> Tensor:
    """The partials of several tensors together. Shapes: [n, k] to [k]; zeros for n = 0."""
    if not len(partials):
        return partials.new_zeros(partials.shape[1])
    return partials.amax(0) if math.isinf(norm_type) else partials.sum(0)


def combine_rows_(partials: Tensor, rows: Tensor, more: Tensor, norm_type: float) -> None:
    """Combines row i of `more` with row `rows[i]` of `partials`, in place."""
    if math.isinf(norm_type):
        partials.index_reduce_(0, rows, more, "amax")
    else:
        partials.index_add_(0, rows, more)


def norm_from_partials(partials: Tensor, norm_type: float) -> Tensor:
    """The norms, float64, from combined partials. Shapes: [..., num_partials] to [...]."""
    if math.isinf(norm_type):
        return torch.where(partials[..., 1] > 0, math.nan, partials[..., 0])
    if norm_type <= PLAIN_UP_TO:
        return partials[..., 0] ** (1 / norm_type)
    centers = _centers(norm_type, partials.device)
    return norm_of_norms(partials ** (1 / norm_type) * centers, norm_type)


def norm_of_norms(norms: Tensor, norm_type: float) -> Tensor:
    """The p-norm over the last dim, without under- or overflow. Shapes: [..., n] to [...]."""
    largest = norms.amax(-1, keepdim=True)
    if math.isinf(norm_type):
        return largest.squeeze(-1)
    sums = ((norms / largest) ** norm_type).sum(-1, keepdim=True)
    norm = largest * sums ** (1 / norm_type)
    return torch.where((largest == 0) | largest.isinf(), largest, norm).squeeze(-1)


def _binned(norms: Tensor, norm_type: float) -> Tensor:
    """For p > 6: each norm in the bin whose center is nearest, as (norm / center)**p.

    The p-th power of a small or a large norm has no float64, but that of its ratio to the nearest
    center has.
    """
    centers = _centers(norm_type, norms.device)
    width = 2 * _REACH / norm_type
    nearest = ((norms.log2() - _LOWEST) / width).nan_to_num(nan=0.0).clamp(0, len(centers) - 1)
    bins = nearest.long()
    powers = (norms / centers[bins]) ** norm_type
    binned = norms.new_zeros(len(norms), len(centers))
    return binned.scatter_(1, bins.unsqueeze(1), powers.unsqueeze(1))


def _centers(norm_type: float, device: torch.device) -> Tensor:
    width = 2 * _REACH / norm_type
    count = math.ceil((_HIGHEST - _LOWEST) / width)
    return torch.exp2(
        _LOWEST + width * (torch.arange(count, dtype=torch.float64, device=device) + 0.5)
    )
