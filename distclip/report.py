"""What happened in one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distclip.torch_private import outside_of_graphs


@dataclass(frozen=True)
class Report:
    """The figures of one step: 0-d tensors on the device. Reading one waits for the device.

    Norms have the same bits on every rank, and so has everything else where one limit holds for
    the whole group. With limits per tensor or per unit, `limit` and `coefficient` are the smallest
    on this rank, and `clipped` is about this rank.

    The figures are those of the gradients as the optimizer sees them: without the loss scale, and
    times `scale` where the caller gave one. A report keeps no gradient, parameter or plan alive,
    and can be pickled; the copy cannot ask other ranks.

    Numbers are float32, and float64 where every parameter is float64 on every rank: but float32
    along the `distinct` axes, where other ranks may hold any.

    Attributes:
        total_norm: before clipping.
        limit: the largest norm that is not clipped, inf where the policy only measures.
        coefficient: what the gradients were multiplied by. With `on_nonfinite="skip"` it is 1 where
            the norm is not finite, because the gradients stay as they are; with "zero" it is 0.
        finite: whether `total_norm` is neither NaN nor infinite; bool.
        clipped: whether the gradients were scaled down; bool.
        norms, limits, coefficients: the same for each parameter group, by its name.
    """

    norms: dict[str, Tensor]
    limits: dict[str, Tensor]
    coefficients: dict[str, Tensor]
    total_norm: Tensor
    search: Callable[[], dict[str, list[int]]] = field(repr=False, compare=False)

    @property
    def limit(self) -> Tensor:
        return _smallest(self.limits)

    @property
    def coefficient(self) -> Tensor:
        return _smallest(self.coefficients)

    @property
    def finite(self) -> Tensor:
        return self.total_norm.isfinite()

    @property
    def clipped(self) -> Tensor:
        return self.coefficient < 1

    @outside_of_graphs
    def nonfinite_parameters(self) -> dict[str, list[int]]:
        """The parameters with gradients that were not finite, each with the ranks that have them.

        Empty where the total norm was finite. At most 100 parameters of each rank. The answer is
        about the call that made this report, whatever happened to the gradients since. Waits for
        the device.

        Raises:
            RuntimeError: this report was pickled, and the other ranks cannot be asked any more.

        Collective: where the norm was not finite, an all-gather of names; all ranks must call.
        """
        return {} if bool(self.finite) else self.search()

    @outside_of_graphs
    def to_dict(self) -> dict[str, float | bool]:
        """Plain numbers for a log. Waits for the device."""
        return {
            "total_norm": float(self.total_norm),
            "limit": float(self.limit),
            "coefficient": float(self.coefficient),
            "finite": bool(self.finite),
            "clipped": bool(self.clipped),
        }


def _smallest(scalars: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(scalars.values())).amin()
