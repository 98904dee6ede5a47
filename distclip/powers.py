"""How sums of |g|**p travel: a few float64 columns that can be joined by one all-reduce and hold any norm.

| norm_type   | columns                                     | joined by |
|-------------|---------------------------------------------|-----------|
| p <= 6      | the sum                                     | SUM       |
| p > 6       | the sum, split by magnitude (see `binned`)  | SUM       |
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


def maximum(maxima: Tensor) -> Tensor:
    """The columns of an inf norm, from maxima of shape [n], NaN where a NaN was seen.

    A MAX reduction may drop a NaN (gloo compares with `<`), so that it travels as a number of its own.
    """
    lost = maxima.isnan()
    largest = torch.where(lost, math.inf, maxima).amax() if len(maxima) else maxima.new_zeros(())
    return torch.stack([largest, lost.any().to(maxima.dtype)])


def binned(norms: Tensor, norm_type: float) -> Tensor:
    """The columns for p > 6, from p-norms of shape [n]: each bin sums (norm / its centre)**p.

    The p-th power of a small or a large norm has no float64, but that of its distance to the nearest centre has.
    """
    centres = _centres(norm_type, norms.device)
    width = 2 * _REACH / norm_type
    nearest = ((norms.log2() - _LOWEST) / width).nan_to_num(nan=0.0).clamp(0, len(centres) - 1).long()
    powers = (norms / centres[nearest]) ** norm_type
    return norms.new_zeros(len(centres)).index_add(0, nearest, powers)


def root(columns: Tensor, norm_type: float) -> Tensor:
    """The norm, a float64 scalar, from its joined columns of shape [num_columns]."""
    if math.isinf(norm_type):
        return torch.where(columns[1] > 0, math.nan, columns[0])
    if norm_type <= PLAIN_UP_TO:
        return columns[0] ** (1 / norm_type)
    norms = columns ** (1 / norm_type) * _centres(norm_type, columns.device)
    largest = norms.amax()
    within = (norms / largest) ** norm_type
    plain = largest * within.sum() ** (1 / norm_type)
    return torch.where((largest == 0) | largest.isinf(), largest, plain)


def _centres(norm_type: float, device: torch.device) -> Tensor:
    width = 2 * _REACH / norm_type
    count = math.ceil((_HIGHEST - _LOWEST) / width)
    return torch.exp2(_LOWEST + width * (torch.arange(count, dtype=torch.float64, device=device) + 0.5))
