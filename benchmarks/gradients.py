"""Gradients that are clipped again and again, and how wrong a clipped one is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import torch
from torch import Tensor, nn

CHUNK, ON_DEVICE = 1 << 20, 1 << 26  # elements that are compared in float64 at a time
Shapes = Sequence[tuple[int, ...]]


@dataclass
class Gradients:
    """Parameters with gradients, the original gradients, and their norm in float64.

    Attributes:
        values: the elements of each gradient on this rank.
        flat: the same elements in one buffer that no baseline scales; bytes if dtypes differ.
        saved: views of `flat` in the shapes of the gradients.
    """

    params: list[nn.Parameter]
    values: list[Tensor]
    norm: float
    flat: Tensor = field(init=False)
    saved: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        sizes, first = [v.nbytes for v in self.values], self.values[0]
        memory = torch.empty(sum(sizes), dtype=torch.uint8, device=first.device)
        pairs = zip(memory.split(sizes), self.values, strict=True)
        self.saved = [part.view(v.dtype).view(v.shape) for part, v in pairs]
        self.flat = memory.view(first.dtype) if len(self.dtypes) == 1 else memory
        torch._foreach_copy_(self.saved, self.values)

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {v.dtype for v in self.values}

    @property
    def by_dtype(self) -> list[list[Tensor]]:
        return [[v for v in self.values if v.dtype == dtype] for dtype in self.dtypes]

    def restore(self) -> None:
        torch._foreach_copy_(self.values, self.saved)

    def prepare(self, clipping: bool) -> None:
        """Before every call."""
        if clipping:
            self.restore()

    def errors(self, norm: Tensor | float, limit: float) -> tuple[float, float]:
        """The relative errors of the norm and of the worst gradient element."""
        factor = min(1.0, limit / self.norm)
        pairs = zip(self.values, self.saved, strict=True)
        worst = largest(worst_element(new, old, factor) for new, old in pairs)
        return abs(float(norm) / self.norm - 1), worst


def float64_norm(tensors: Sequence[Tensor]) -> float:
    """The oracle's norm, in chunks and on the device: gradients of billions of elements fit."""
    chunks = (chunk for t in tensors for chunk in chunked(t))
    return sum(float(chunk.double().square().sum()) for chunk in chunks) ** 0.5


def chunked(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.flatten().split(ON_DEVICE if tensor.is_cuda else CHUNK)


def worst_element(values: Tensor, saved: Tensor, factor: float) -> float:
    """The largest error of `values` as `saved * factor`: relative, or absolute for subnormals."""
    floor, errors = torch.finfo(values.dtype).smallest_normal, [0.0]
    for new, old in zip(chunked(values), chunked(saved), strict=True):
        if new.numel() and not (factor == 1 and torch.equal(new, old)):
            right = old.double() * factor
            errors.append(float(((new.double() - right).abs() / (right.abs() + floor)).max()))
    return largest(errors)


def largest(errors: Iterable[float]) -> float:
    """NaN where any is."""
    return float(torch.tensor(list(errors), dtype=torch.float64).max())


def random_gradients(
    shapes: Shapes,
    *dtypes: torch.dtype,
    device: str | torch.device = "cpu",
    weights: bool = True,
) -> Gradients:
    """Each gradient in memory of its own, in the dtypes in turn. The norm fits into fp16.

    Args:
        weights: whether anyone reads or writes the parameters. Otherwise they share memory.
    """
    generator = torch.Generator(device).manual_seed(0)
    params, shared = [], {}
    for dtype in dtypes if not weights else ():
        most = max(torch.Size(shape).numel() for shape in shapes)
        shared[dtype] = torch.zeros(most, dtype=dtype, device=device)
    for shape, dtype in zip(shapes, cycle(dtypes), strict=False):
        if weights:
            values = torch.zeros(shape, dtype=dtype, device=device)
        else:
            values = shared[dtype][: torch.Size(shape).numel()].view(shape)
        params.append(nn.Parameter(values))
    for param in params:
        param.grad = torch.empty_like(param).normal_(generator=generator)
    values = [p.grad for p in params if p.grad is not None]
    return Gradients(params, values, float64_norm(values))


class AfterBackward(Gradients):
    """Gradients that a backward makes anew for every call, so the caches hold little of them."""

    def restore(self) -> None:
        for param in self.params:
            param.grad = None
        pairs = zip(self.params, self.saved, strict=True)
        torch.stack([(param * grad).sum() for param, grad in pairs]).sum().backward()

    def prepare(self, clipping: bool) -> None:
        self.restore()

    def errors(self, norm: Tensor | float, limit: float) -> tuple[float, float]:
        self.values = [p.grad for p in self.params if p.grad is not None]
        found = super().errors(norm, limit)
        self.values = (
            self.saved
        )  # gradients that stay alive would scatter the next ones over memory
        return found
