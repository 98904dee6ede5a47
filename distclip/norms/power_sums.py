"""How sums of |g|**p are reduced: as float64 partials that an all-reduce combines.

| norm_type                   | partials                                    | combined by |
|-----------------------------|---------------------------------------------|-------------|
| p <= 6                      | the sum                                     | SUM         |
| p > 6, or norms are float64 | the sum, split by magnitude (see `_binned`) | SUM         |
| inf                         | the maximum, and whether a NaN was seen     | MAX         |
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# Up to this p, float64 holds the p-th power of every float32 magnitude (2**-149 to 2**128), and
# the sum of 2**80 such powers.
PLAIN_UP_TO = 6.0
# Where it does not, the powers of what lies within one bin stay between 2**-900 and 2**900.
_REACH = 900.0
# Exponents of 2: of the norms of float32 and float64 tensors, and the widest bin.
_RANGES = {torch.float32: (-160.0, 140.0), torch.float64: (-1074.0, 1024.0)}
_WIDEST = 700.0


class Power(NamedTuple):
    """The p of a norm, and the dtype in which the norm has to be right: float32 or float64."""

    norm_type: float
    dtype: torch.dtype = torch.float32

    @property
    def needs_norms(self) -> bool:
        """Whether sums of powers would leave the range of float64."""
        is_plain = self.norm_type <= PLAIN_UP_TO and self.dtype is torch.float32
        return not (is_plain or math.isinf(self.norm_type))

    @property
    def num_partials(self) -> int:
        if math.isinf(self.norm_type):
            return 2
        return len(_centers(self, torch.device("cpu"))) if self.needs_norms else 1


def norm_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype of the norm of tensors: float64 where all are as wide, else float32."""
    return torch.float64 if {d.to_real() for d in dtypes} == {torch.float64} else torch.float32


def partials(per_tensor: Tensor, power: Power) -> Tensor:
    """The partials of each tensor, from its norm where `power.needs_norms`, else from its sum.

    Shapes: per_tensor: [n]; the result: [n, num_partials].
    """
    if power.needs_norms:
        return _binned(per_tensor, power)
    if math.isinf(power.norm_type):
        # gloo compares with `<`, and its MAX drops a NaN, which needs a number of its own.
        is_nan = per_tensor.isnan()
        return torch.stack([per_tensor.masked_fill(is_nan, math.inf), is_nan.double()], dim=1)
    return per_tensor.unsqueeze(1)


def combine(partials: Tensor, norm_type: float) -> Tensor:
    """The partials of several tensors together. Shapes: [n, k] to [k]; zeros for n = 0."""
    if not len(partials):
        return partials.new_zeros(partials.shape[1])
    return partials.amax(0) if math.isinf(norm_type) else partials.sum(0)


def combine_rows_(partials: Tensor, more: Tensor, norm_type: float) -> None:
    """Combines each row of `more` with that of `partials`, in place. Shapes: [n, k]."""
    if math.isinf(norm_type):
        torch.maximum(partials, more, out=partials)
    else:
        partials.add_(more)


def gathered(partials: Tensor, index: Tensor | None, norm_type: float) -> Tensor:
    """The partials of n units, each combined from those of its parts, in one order.

    Args:
        index: the parts of each unit; the number of all parts where a unit has fewer than others.
            None if the parts are the units.

    Shapes: partials: [number of parts, k]; index: [parts of a unit, n]; the result: [n, k].
    """
    if index is None:
        return partials
    of_parts = torch.cat([partials, partials.new_zeros(1, partials.shape[1])])[index]
    combined, *others = of_parts.unbind()
    for more in others:  # two at most; `sum` may add in another order for another number of units
        combine_rows_(combined, more, norm_type)
    return combined


def norm_from_partials(partials: Tensor, power: Power) -> Tensor:
    """The norms, float64, from combined partials. Shapes: [..., num_partials] to [...]."""
    norm_type = power.norm_type
    if power.needs_norms:
        centers = _centers(power, partials.device)
        return norm_of_norms(partials ** (1 / norm_type) * centers, norm_type)
    if math.isinf(norm_type):
        return torch.where(partials[..., 1] > 0, math.nan, partials[..., 0])
    return partials[..., 0] ** (1 / norm_type)


def norm_of_norms(norms: Tensor, norm_type: float) -> Tensor:
    """The p-norm over the last dim, without under- or overflow. Shapes: [..., n] to [...]."""
    largest = norms.amax(-1, keepdim=True)
    if math.isinf(norm_type):
        return largest.squeeze(-1)
    sums = ((norms / largest) ** norm_type).sum(-1, keepdim=True)
    norm = largest * sums ** (1 / norm_type)
    return torch.where((largest == 0) | largest.isinf(), largest, norm).squeeze(-1)


def _binned(norms: Tensor, power: Power) -> Tensor:
    """Each norm in the bin whose center is nearest, as (norm / center)**p.

    The p-th power of a small or a large norm has no float64, but that of its ratio to the nearest
    center has.
    """
    centers = _centers(power, norms.device)
    lowest, highest = _RANGES[power.dtype]
    nearest = (norms.log2() - lowest) * (len(centers) / (highest - lowest))
    bins = nearest.nan_to_num(nan=0.0).clamp(0, len(centers) - 1).long()
    powers = (norms / centers[bins]) ** power.norm_type
    each = torch.arange(len(centers), device=norms.device)
    return torch.where(bins.unsqueeze(1) == each, powers.unsqueeze(1), 0.0)


def _centers(power: Power, device: torch.device) -> Tensor:
    lowest, highest = _RANGES[power.dtype]
    count = math.ceil((highest - lowest) / min(2 * _REACH / power.norm_type, _WIDEST))
    width = (highest - lowest) / count
    return torch.exp2(
        lowest + width * (torch.arange(count, dtype=torch.float64, device=device) + 0.5)
    )
