"""Judges what ranks have found against what is right; works on whole gradients alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor

from distclip.parity.clips import Clip, Definer, total_norm
from distclip.parity.tolerances import EPSILON, FLOOR, tolerance_of

COLUMNS = ("gradients", "norm", "coefficient", "clipped", "copies", "ranks")
MAX_LISTED = 10  # parameters that differ


class Cell(NamedTuple):
    """One figure of one step.

    Attributes:
        text: as it stands in the table: a relative error, or what is wrong.
        agrees: with what is right; also where there is nothing to compare.
        details: lines that say more, where it does not agree.
    """

    text: str
    agrees: bool = True
    details: tuple[str, ...] = ()


NOTHING = Cell("-")


@dataclass(frozen=True)
class Outcome:
    """One step of one layout, clipped in one way.

    Attributes:
        cells: by column. "gradients": those before clipping, against the whole model's in float64.
            "norm", "coefficient", "clipped": against the definition, on the same gradients.
            "copies": whether ranks that hold the same elements have the same bits. "ranks":
            whether all ranks do the same: return, raise, or take a norm for finite.
    """

    layout: str
    clip: str
    step: str
    cells: Mapping[str, Cell] = field(default_factory=dict[str, Cell])

    @property
    def agrees(self) -> bool:
        return all(cell.agrees for cell in self.cells.values())

    @property
    def title(self) -> str:
        return ", ".join(text for text in (self.layout, self.clip, self.step) if text)


def compare(
    whole: Mapping[str, Tensor],
    clipped: Mapping[str, Tensor],
    max_norm: float,
    *,
    norms: Sequence[float | None] = (),
    before: Mapping[str, Tensor] | None = None,
    clip: Clip | None = None,
    definer: Definer | None = None,
    scale: float = 1.0,
    copies: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    layout: str = "",
    name: str = "",
    step: str = "",
) -> Outcome:
    """Judges one step of a trainer that clips inside its own loop.

    Args:
        whole: float64 gradients of the whole model before clipping, by name (`whole_gradients`).
        clipped: what the ranks have after it, whole, by name (`gradient_pieces`, `assemble`).
        norms: the total norm that each rank reports; None or empty where it reports none.
        before: what the ranks have before it. If omitted, `clipped` and `norms` are judged against
            `whole`, with the tolerances of a backward pass.
        clip: what clipping means; by default min(1, max_norm / norm), with the 2-norm.
        definer: `clip` with what a policy remembers of earlier steps.
        scale: the factor that `before` carries and `clipped` must not: a loss scale.
        copies: gradients whose copies differ between ranks (`Assembled.copies`).
        dtype: that gradients are computed in, where they lie in a wider one.
        layout, name, step: for the table.
    """
    define = definer or Definer(clip or Clip(_no_function), whole)
    tolerance = tolerance_of((before or clipped).values(), dtype)
    cells: dict[str, Cell] = {}
    source, slack = whole, tolerance.backward
    if before is not None:
        source = {n: _wide(grad) / scale for n, grad in before.items()}
        slack = 0.0
        cells["gradients"] = _tensors_cell(whole, source, tolerance.backward)
    right_norm, right = define(source, max_norm)
    of_norm = tolerance.norm + slack
    of_coefficient = of_norm + (EPSILON / right_norm if right_norm else 0.0)
    cells["norm"] = _norm_cell(norms, right_norm, of_norm)
    found_coefficient = _coefficient(source, clipped)
    cells["coefficient"] = _number_cell(
        found_coefficient, _coefficient(source, right), of_coefficient
    )
    cells["clipped"] = _tensors_cell(right, clipped, of_coefficient + tolerance.product)
    if copies is not None:
        listed = tuple(f"{n}: {text}" for n, text in copies.items())
        cells["copies"] = Cell(f"{len(copies)} differ", False, listed) if copies else Cell("same")
    return Outcome(layout, name, step, cells)


def nonfinite_cell(norms: Sequence[float | None], arrived: bool) -> Cell:
    """Whether every rank sees that the gradients are not finite, and can skip the step."""
    if not arrived:
        return Cell("no NaN arrived", True)
    known = [norm for norm in norms if norm is not None]
    if not known:
        return Cell("return no norm")
    blind = [rank for rank, norm in enumerate(norms) if norm is not None and math.isfinite(norm)]
    if not blind:
        return Cell("all see it")
    shown = ", ".join(f"{norms[rank]!r} on rank {rank}" for rank in blind)
    detail = f"a gradient is NaN, and the norm is {shown}: these ranks step, and others may skip"
    return Cell(f"{len(blind)} of {len(norms)} do not see it", False, (detail,))


def _no_function(model: object, max_norm: float) -> None:
    """Of a Clip that is only a definition."""


def _wide(grad: Tensor) -> Tensor:
    return grad.to(torch.complex128) if grad.is_complex() else grad.double()


def _norm_cell(norms: Sequence[float | None], right: float, tolerance: float) -> Cell:
    known = [(rank, norm) for rank, norm in enumerate(norms) if norm is not None]
    if not known:
        return NOTHING
    if len({norm for _, norm in known}) > 1:
        shown = ", ".join(f"{norm!r} on rank {rank}" for rank, norm in known)
        return Cell("differs by rank", False, (f"{shown}; right is {right:.9g}",))
    return _number_cell(known[0][1], right, tolerance)


def _number_cell(found: float, right: float, tolerance: float) -> Cell:
    error = _relative(abs(found - right), abs(right))
    if error <= tolerance:
        return Cell(f"{error:.0e}")
    text = f"{found:.6g}, not {right:.6g}"
    return Cell(text, False, (f"{found:.9g}; right is {right:.9g}, within {tolerance:.0e}",))


def _coefficient(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """What the gradients were multiplied by, as least squares see it."""
    largest = max((float(_wide(g).abs().max()) for g in before.values() if g.numel()), default=0.0)
    if largest == 0:
        return 1.0
    pairs = [
        (_wide(grad) / largest, _wide(after[name]) / largest)
        for name, grad in before.items()
        if name in after and after[name].shape == grad.shape
    ]
    product = sum(float((b.conj() * a).real.sum()) for b, a in pairs)
    square = sum(float((b.conj() * b).real.sum()) for b, _ in pairs)
    return product / square if square else 0.0


def _tensors_cell(
    right: Mapping[str, Tensor], found: Mapping[str, Tensor], tolerance: float
) -> Cell:
    """The largest error of a tensor; and each parameter that differs."""
    largest = max((float(g.abs().max()) for g in right.values() if g.numel()), default=0.0)
    errors: dict[str, float] = {}
    details: list[str] = []
    for name in {**right, **found}:
        a, b = right.get(name), found.get(name)
        if a is None or b is None:
            a = torch.zeros_like(cast(Tensor, b)) if a is None else a
            b = torch.zeros_like(a) if b is None else b
        if a.shape != b.shape:
            errors[name] = math.inf
            details.append(f"{name}: shape {tuple(b.shape)}, not {tuple(a.shape)}")
            continue
        error, at = _error(a, b, FLOOR * largest)
        errors[name] = error
        if not error <= tolerance:
            where = f"at {at}: {b[at].item():.6g}, not {a[at].item():.6g}" if a.numel() else ""
            details.append(f"{name}: {where}; relative error {error:.2g}{_factor(a, b)}")
    worst = max(errors.values(), default=0.0)
    if not details:
        return Cell(f"{worst:.0e}")
    if (more := len(details) - MAX_LISTED) > 0:
        details = [*details[:MAX_LISTED], f"and {more} others"]
    wrong = sum(1 for error in errors.values() if not error <= tolerance)
    return Cell(f"{wrong} of {len(errors)} differ", False, tuple(details))


def _error(right: Tensor, found: Tensor, floor: float) -> tuple[float, tuple[int, ...]]:
    """Of the worst element, relative to the largest; and its index."""
    if not right.numel():
        return 0.0, ()
    a, b = _wide(right), _wide(found)
    off = (a - b).abs()
    off[(a == b) | (a.isnan() & b.isnan())] = 0.0
    off = off.nan_to_num(nan=math.inf, posinf=math.inf)
    flat = int(off.argmax())
    at: list[int] = []
    for size in reversed(right.shape):
        at.insert(0, flat % size)
        flat //= size
    return _relative(float(off.max()), max(float(a.abs().max()), floor)), tuple(at)


def _relative(off: float, size: float) -> float:
    if math.isnan(off):
        return math.inf
    return 0.0 if off == 0 else (off / size if size else math.inf)


def _factor(right: Tensor, found: Tensor) -> str:
    """A hint where the whole tensor is off by one factor, such as the number of ranks."""
    factor = _coefficient({"": right}, {"": found})
    explained = _error(_wide(right) * factor, found, 0.0)[0] <= 1e-2
    return f"; all of it is {factor:.4g} times what is right" if explained and factor else ""


def norm_of(gradients: Mapping[str, Tensor], norm_type: float) -> float:
    return total_norm(gradients, norm_type)
