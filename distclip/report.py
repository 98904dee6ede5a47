"""What happened in one step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import repeat
from typing import NamedTuple, cast

import torch
from torch import Tensor

from distclip.torch_private import on_device, outside_of_graphs


class GroupFigures(NamedTuple):
    """The figures of one parameter group; a limit may be a scalar on the CPU."""

    norm: Tensor
    limit: Tensor
    coefficient: Tensor


class TensorFigures(NamedTuple):
    """The norms of all tensors of a parameter group, on any rank, of order `norm_type`; float64."""

    names: Sequence[str]
    norms: Tensor
    norm_type: float


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
        limit: the largest norm that is not clipped, inf where the policy only measures; the norm
            afterwards where it raises norms, as `AdaGN` does.
        coefficient: what the gradients were multiplied by; above 1 only where the policy raises
            norms. With `on_nonfinite="skip"` it is 1 where the norm is not finite, because the
            gradients stay as they are; with "zero" it is 0. It is 1 where a policy vetoes the step.
        finite: whether `total_norm` is neither NaN nor infinite; bool.
        clipped: whether gradients were scaled down, whatever others were; bool.
        skipped: whether the step is left out: a policy vetoes it, or the norm is not finite with
            on_nonfinite="skip"; bool. The gradients stay as they are. `step` and `attach` leave it
            out; after `clip_` without a scaler your loop must. What a GradScaler leaves out of its
            own accord, after an overflow, is not in it.
        norms, limits, coefficients: the same for each parameter group, by its name.
    """

    figures: dict[str, GroupFigures]
    total: Tensor
    dtype: torch.dtype
    search: Callable[[], dict[str, list[int]]] = field(compare=False)
    tensors: Sequence[TensorFigures] = field(default=(), compare=False)
    vetoed: Tensor | None = None
    skips_nonfinite: bool = False

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

    @property
    def skipped(self) -> Tensor:
        skipped = ~self.finite if self.skips_nonfinite else torch.zeros_like(self.finite)
        return skipped if self.vetoed is None else skipped | self.vetoed

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
    def tensor_norms(self, prefix: str | None = None) -> dict[str, float]:
        """The norm of every tensor before clipping, whole, by its name; or of every module.

        Those of the whole model, the same on every rank: along the `distinct` axes too, where
        tensors of one name get their index, as in "layers.0.w (pp 1)". 0 for a tensor without a
        gradient on any rank. Each norm has the order p of its group's policy. Empty in steps that
        `Clipper(tensor_norms=...)` leaves out. Waits for the device.

        Args:
            prefix: the path of a module: one norm for each module or tensor directly in it, over
                all tensors there, under its own path. A part of a path may be a pattern, as
                `fnmatch` has them. "" is the model.

        Raises:
            ValueError: a module has tensors of groups whose p differ.

        Example:
            >>> import torch, distclip
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Linear(1, 2))
            >>> for param in model.parameters():
            ...     param.grad = torch.full_like(param, 2.0)
            >>> report = distclip.Clipper(model, tensor_norms=True).clip_()
            >>> {name: round(norm, 2) for name, norm in report.tensor_norms().items()}
            {'0.weight': 2.83, '0.bias': 2.0, '1.weight': 2.83, '1.bias': 2.83}
            >>> {name: round(norm, 2) for name, norm in report.tensor_norms(prefix="").items()}
            {'0': 3.46, '1': 4.0}
        """
        found = [_Norm(*each) for group in self.tensors for each in self._each(group)]
        if prefix is not None:
            return _by_module(found, prefix)
        norms: dict[str, float] = {}
        counts = Counter[str]()
        for each in found:  # two modules that were given as parameters may have a "weight" each
            counts[each.name] += 1
            count = counts[each.name]
            norms[f"{each.name} ({count})" if count > 1 else each.name] = each.norm
        return norms

    def _each(self, group: TensorFigures) -> Iterator[tuple[str, float, float]]:
        norms = cast("list[float]", group.norms.to(self.dtype).tolist())
        return zip(group.names, norms, repeat(group.norm_type))

    @outside_of_graphs
    def to_dict(self) -> dict[str, float | bool]:
        """Plain numbers for a log. Waits for the device."""
        return {
            "total_norm": float(self.total_norm),
            "limit": float(self.limit),
            "coefficient": float(self.coefficient),
            "finite": bool(self.finite),
            "clipped": bool(self.clipped),
            "skipped": bool(self.skipped),
        }

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> Report:
        """With its figures on another device, as `Tensor.to`.

        With `non_blocking`, figures of an accelerator are right on the CPU when the copies have
        arrived: record an event, and wait for it.
        """

        def moved(figure: Tensor) -> Tensor:
            return figure.to(device, non_blocking=non_blocking)

        groups = {name: GroupFigures(*map(moved, group)) for name, group in self.figures.items()}
        tensors = [each._replace(norms=moved(each.norms)) for each in self.tensors]
        vetoed = None if self.vetoed is None else moved(self.vetoed)
        return replace(
            self, figures=groups, total=moved(self.total), tensors=tensors, vetoed=vetoed
        )

    def converted(self) -> Report:
        """With all figures as they are shown, each a tensor that stays the same."""
        groups = {
            name: GroupFigures(*(self._shown(figure) for figure in group))
            for name, group in self.figures.items()
        }
        tensors = [each._replace(norms=each.norms.to(self.dtype)) for each in self.tensors]
        return replace(self, figures=groups, total=self.total_norm, tensors=tensors)

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


class _Norm(NamedTuple):
    name: str
    norm: float
    norm_type: float


def _by_module(norms: Sequence[_Norm], prefix: str) -> dict[str, float]:
    patterns = prefix.split(".") if prefix else []
    modules: dict[str, list[_Norm]] = {}
    for each in norms:
        path = each.name.split(".")
        inside = len(path) > len(patterns) and all(map(fnmatchcase, path, patterns))
        if inside:
            modules.setdefault(".".join(path[: len(patterns) + 1]), []).append(each)
    return {module: _norm_of(module, inside) for module, inside in modules.items()}


def _norm_of(module: str, norms: Sequence[_Norm]) -> float:
    """The norm of all together, as `power_sums.norm_of_norms`."""
    if len(orders := {each.norm_type for each in norms}) > 1:
        raise ValueError(
            f"cannot combine the norms of the tensors in {module!r}: they are norms of the orders "
            f"{sorted(orders)}, and together they have none. Give the groups policies of one "
            f"norm_type, or combine the norms of `report.tensor_norms()` yourself."
        )
    (p,), numbers = orders, [each.norm for each in norms]
    largest = max(numbers)
    if any(map(math.isnan, numbers)):
        return math.nan
    if largest == 0 or math.isinf(largest) or math.isinf(p):
        return largest
    return largest * math.fsum((number / largest) ** p for number in numbers) ** (1 / p)
