"""What happened in one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.torch_private import on_device, outside_of_graphs


class GroupFigures(NamedTuple):
    """The figures of one parameter group; a limit may be a scalar on the CPU."""

    norm: Tensor
    limit: Tensor
    coefficient: Tensor


@dataclass(frozen=True, repr=False)
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

    A figure is converted when it is read: a step launches nothing on an accelerator for figures
    that nobody reads. In a CUDA graph they are converted in the graph, and each replay writes them.

    Attributes:
        total_norm: before clipping.
        limit: the largest norm that is not clipped, inf where the policy only measures.
        coefficient: what the gradients were multiplied by. With `on_nonfinite="skip"` it is 1 where
            the norm is not finite, because the gradients stay as they are; with "zero" it is 0.
        finite: whether `total_norm` is neither NaN nor infinite; bool.
        clipped: whether the gradients were scaled down; bool.
        norms, limits, coefficients: the same for each parameter group, by its name.
    """

    figures: dict[str, GroupFigures]
    total: Tensor
    dtype: torch.dtype
    search: Callable[[], dict[str, list[int]]] = field(compare=False)

    @property
    def total_norm(self) -> Tensor:
        return self._shown(self.total)

    @property
    def norms(self) -> dict[str, Tensor]:
        return {name: self._shown(group.norm) for name, group in self.figures.items()}

    @property
    def limits(self) -> dict[str, Tensor]:
        return {name: self._shown(group.limit) for name, group in self.figures.items()}

    @property
    def coefficients(self) -> dict[str, Tensor]:
        return {name: self._shown(group.coefficient) for name, group in self.figures.items()}

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

    def converted(self) -> Report:
        """With all figures as they are shown, each a tensor that stays the same."""
        groups = {
            name: GroupFigures(*(self._shown(figure) for figure in group))
            for name, group in self.figures.items()
        }
        return replace(self, figures=groups, total=self.total_norm)

    @outside_of_graphs
    def _shown(self, figure: Tensor) -> Tensor:
        return on_device(figure, self.total.device).to(self.dtype)

    def __repr__(self) -> str:
        return (
            f"Report(total_norm={self.total_norm}, limits={self.limits}, "
            f"coefficients={self.coefficients})"
        )


def _smallest(scalars: dict[str, Tensor]) -> Tensor:
    if len(scalars) == 1:
        return next(iter(scalars.values()))
    return torch.stack(list(scalars.values())).amin()
