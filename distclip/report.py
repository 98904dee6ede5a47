"""What happened in one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Report:
    """The figures of one step: scalars on the device. Reading one waits for it.

    Norms are the same bits on every rank, and so is all else where one limit holds for the whole group. With limits
    by tensor or by unit, `limit` and `coefficient` are the smallest on this rank, and `clipped` speaks of this rank.

    Attributes:
        total_norm: before clipping; float32.
        limit: the largest norm let through, inf where the policy only measures; float32.
        coefficient: what the gradients were multiplied by; float32.
        finite: whether `total_norm` is neither NaN nor infinite; bool.
        clipped: whether the gradients were scaled down; bool.
        norms, coefficients: the same by the name of the parameter group.

    With `on_nonfinite="skip"` the coefficient of a norm that is not finite is 1, since the gradients stay as they
    are; with "zero" it is 0. A loss scale is in none of the figures.
    """

    norms: dict[str, Tensor]
    limits: dict[str, Tensor]
    coefficients: dict[str, Tensor]
    total_norm: Tensor
    search: Callable[[], dict[str, list[int]]] = field(default=dict[str, "list[int]"], repr=False, compare=False)

    @property
    def limit(self) -> Tensor:
        return min_of(self.limits)

    @property
    def coefficient(self) -> Tensor:
        return min_of(self.coefficients)

    @property
    def finite(self) -> Tensor:
        return self.total_norm.isfinite()

    @property
    def clipped(self) -> Tensor:
        return self.coefficient < 1

    def nonfinite_parameters(self) -> dict[str, list[int]]:
        """The parameters whose gradients were not finite, each with the ranks that hold such elements.

        Empty where the total norm was finite. At most 100 parameters a rank. They are those of the call that made
        this report, whatever has become of the gradients since. Waits for the device.

        Collective: where the norm was not finite, an all-gather of names; all ranks must ask.
        """
        return {} if bool(self.finite) else self.search()

    def to_dict(self) -> dict[str, float | bool]:
        """Plain numbers for a log. Waits for the device."""
        return {
            "total_norm": float(self.total_norm),
            "limit": float(self.limit),
            "coefficient": float(self.coefficient),
            "finite": bool(self.finite),
            "clipped": bool(self.clipped),
        }


def min_of(scalars: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(scalars.values())).amin()
