"""How near figures must be, by the dtype that gradients are computed in, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """Relative errors. Those of a tensor are relative to its largest element.

    Attributes:
        backward: of gradients before clipping, against those of the whole model in float64.
        norm: of the total norm and the coefficient, against the float64 norm of the same gradients.
        product: of clipped gradients, beyond what the coefficient explains.
    """

    backward: float
    norm: float
    product: float


TOLERANCES = {
    # Sums of a backward pass in another order; the norm may be returned in float32.
    torch.float64: Tolerance(1e-9, 2e-7, 1e-12),
    # A backward pass sums thousands of products of 24 bits; a norm has a few roundings.
    torch.float32: Tolerance(2e-5, 2e-6, 2.5e-7),
    # Products of 11 bits; a norm in this dtype is rounded once for each tensor, and then again.
    torch.float16: Tolerance(2e-2, 2e-3, 1e-3),
    # The same with 8 bits.
    torch.bfloat16: Tolerance(6e-2, 1e-2, 8e-3),
}
# torch's coefficient is max_norm / (norm + 1e-6), which small norms show.
EPSILON = 1e-6
# Tensors with gradients this much smaller than the largest are compared with that instead: what
# should be zero is rounding of the larger ones.
FLOOR = 1e-4


def tolerance_of(gradients: Iterable[Tensor], dtype: torch.dtype | None = None) -> Tolerance:
    """That of the least precise dtype."""
    real = [grad.abs().dtype if grad.is_complex() else grad.dtype for grad in gradients]
    found = [each for each in (*real, dtype) if each in TOLERANCES]
    return TOLERANCES[max(found, key=list(TOLERANCES).index, default=torch.float32)]
