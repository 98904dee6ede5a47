"""How sums of |g|**p travel: a few float64 columns that can be joined by one all-reduce and hold any norm.

| norm_type   | columns                                     | joined by |
|-------------|---------------------------------------------|-----------|
| p <= 6      | the sum                                     | SUM       |
| p > 6       | the sum, split by magnitude (see `_binned`) | SUM       |
| inf         | the maximum, and whether a NaN was seen     | MAX       |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Up to this p, float64 holds the p-th power of every float32 magnitude (2**-149 to 2**128), and the sum of 2**80 such.
PLAIN_UP_TO = 6.0
# For higher p, the powers of what lies within one bin stay between 2**-900 and 2**900.
_LOWEST, _HIGHEST, _REACH = -160.0, 140.0, 900.0


def num_columns(norm_type: float) -> int:
    if math.isinf(norm_type):
        return 2
    return 1 if norm_type <= PLAIN_UP_TO else len(_centres(norm_type, torch.device("cpu")))


def columns(each: Tensor, norm_type: float) -> Tensor:
    """From one number for each set of elements: its sum of powers for p <= 6, else its norm.

    Shapes: each: [n]; the result: [n, num_columns].
    """
    if norm_type <= PLAIN_UP_TO:
        return each.unsqueeze(1)
    if math.isinf(norm_type):
        # A MAX reduction may drop a NaN (gloo compares with `<`), so that it travels as a number of its own.
        return torch.stack([torch.where(each.isnan(), math.inf, each), each.isnan().to(each.dtype)], dim=1)
    return _binned(each, norm_type)


def joined(columns: Tensor, norm_type: float) -> Tensor:
    """The columns of several sets together. Shapes: [n, num_columns] to [num_columns]; zeros for n = 0."""
    if not len(columns):
        return columns.new_zeros(columns.shape[1])
    return columns.amax(0) if math.isinf(norm_type) else columns.sum(0)


def add_(columns: Tensor, index: Tensor, more: Tensor, norm_type: float) -> None:
    """Joins each row of `more` into the row of `columns` that `index` names."""
    if math.isinf(norm_type):
        columns.index_reduce_(0, index, more, "amax")
    else:
        columns.index_add_(0, index, more)


def root(columns: Tensor, norm_type: float) -> Tensor:
    """The norms, float64, from joined columns. Shapes: [..., num_columns] to [...]."""
    if math.isinf(norm_type):
        return torch.where(columns[..., 1] > 0, math.nan, columns[..., 0])
    if norm_type <= PLAIN_UP_TO:
        return columns[..., 0] ** (1 / norm_type)
    norms = columns ** (1 / norm_type) * _centres(norm_type, columns.device)
    largest = norms.amax(-1, keepdim=True)
    within = ((norms / largest) ** norm_type).sum(-1, keepdim=True)
    plain = largest * within ** (1 / norm_type)
    return torch.where((largest == 0) | largest.isinf(), largest, plain).squeeze(-1)


def _binned(norms: Tensor, norm_type: float) -> Tensor:
    """For p > 6: each norm in the bin whose centre is nearest, as (norm / centre)**p.

    The p-th power of a small or a large norm has no float64, but that of its distance to the nearest centre has.
    """
    centres = _centres(norm_type, norms.device)
    width = 2 * _REACH / norm_type
    nearest = ((norms.log2() - _LOWEST) / width).nan_to_num(nan=0.0).clamp(0, len(centres) - 1).long()
    powers = (norms / centres[nearest]) ** norm_type
    return norms.new_zeros(len(norms), len(centres)).scatter_(1, nearest.unsqueeze(1), powers.unsqueeze(1))


def _centres(norm_type: float, device: torch.device) -> Tensor:
    width = 2 * _REACH / norm_type
    count = math.ceil((_HIGHEST - _LOWEST) / width)
    return torch.exp2(_LOWEST + width * (torch.arange(count, dtype=torch.float64, device=device) + 0.5))
