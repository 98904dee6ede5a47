"""What happened in one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Report:
    """The figures of one step: scalars on the device, the same bits on every rank. Reading one waits for it.

    Attributes:
        total_norm: before clipping; float32.
        limit: the largest norm let through, inf where the policy only measures; float32.
        coefficient: what the gradients were multiplied by; float32.
        finite: whether `total_norm` is neither NaN nor infinite; bool.
        clipped: whether the gradients were scaled down; bool.
        norms, coefficients: the same by the name of the parameter group.
    """

    norms: dict[str, Tensor]
    limits: dict[str, Tensor]
    coefficients: dict[str, Tensor]
    total_norm: Tensor

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
