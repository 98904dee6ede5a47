"""A model in one of the layouts, and which elements of the whole one this rank holds.

Which ones is not asked of distclip: the whole model begins with the numbers of its elements as its
weights, and after it has been sharded each rank reads its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

from tests.faults.cases import DTENSORS, PIPELINE, PLAIN
from tests.support import layouts
from tests.support.ranks import mesh
from tests.support.wrapped import (
    BATCH,
    LENGTH,
    WRAPPERS,
    Model,
    is_partial,
    local,
    loss_of,
)

FIRST = 1000  # the number of the first element; FSDP1 pads with 0 and 42
BATCHES_ALIKE = {"tp": (0, 0, 0, 0), "fsdp2 x tp": (0, 0, 1, 1)}  # others: 0, 1, 2, 3


class WholeTensor(NamedTuple):
    """A tensor of the whole model: elements `first` to `first + shape.numel()`."""

    name: str
    first: int
    shape: torch.Size


@dataclass
class Placed:
    """What one rank has.

    Attributes:
        params: names and parameters, as a Clipper takes them.
        elements: of each parameter, the numbers of its elements, flat; 0 for padding.
        partial: of each parameter, whether its gradient is the sum over the ranks' parts.
        tensors: of the whole model; element 0 is padding.
        backward: computes the gradients of batch `step`, with a loss that is multiplied on `rank`;
            None where gradients are written.
    """

    layout: str
    source: Any
    options: dict[str, Any]
    params: list[tuple[str, nn.Parameter]]
    elements: list[Tensor]
    partial: list[bool]
    specs: list[DTensor | None]
    has_gradient: list[bool]
    tensors: list[WholeTensor]
    backward: Callable[[int, Callable[[Tensor], Tensor]], None] | None = None

    @property
    def numel(self) -> int:
        last = self.tensors[-1]
        return last.first + last.shape.numel()

    def as_gradient(self, index: int, values: Tensor) -> Tensor:
        spec, (_, param) = self.specs[index], self.params[index]
        if spec is None:
            return values.view_as(param)
        return DTensor.from_local(
            values.view_as(local(spec)),
            spec.device_mesh,
            spec.placements,
            run_check=False,
            shape=spec.shape,
            stride=spec.stride(),
        )

    @torch.no_grad()
    def set_weights(self, whole: Tensor) -> None:
        for (_, param), elements in zip(self.params, self.elements, strict=True):
            values = local(param.detach())
            values.copy_(whole[elements].view_as(values))

    def flat(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The values of all parameters, or of their gradients, on this rank, one after another."""
        each = zip(tensors, self.elements, strict=True)
        return torch.cat(
            [torch.zeros(len(e)) if t is None else local(t.detach()).flatten() for t, e in each]
            or [torch.zeros(0)]
        )

    def make_optimizer(self, kind: str) -> Optimizer:
        """In groups whose tensors fused and foreach steps can take together."""
        groups: dict[Any, list[nn.Parameter]] = {}
        for _, param in self.params:
            key = param.device_mesh if isinstance(param, DTensor) else None
            groups.setdefault(key, []).append(param)
        each = [{"params": params} for params in groups.values()]
        name, _, way = kind.partition(" ")
        options: dict[str, Any] = {"fused": True} if way == "fused" else {"foreach": True}
        if name == "SGD":
            return SGD(each, lr=0.1, momentum=0.9, **options)
        return AdamW(each, lr=0.1, weight_decay=0.1, **options)


def whole_tensors(shapes: Sequence[tuple[str, Sequence[int]]]) -> list[WholeTensor]:
    tensors, first = [], 1
    for name, shape in shapes:
        tensors.append(WholeTensor(name, first, torch.Size(shape)))
        first += torch.Size(shape).numel()
    return tensors


def numbers(tensor: WholeTensor) -> Tensor:
    end = FIRST + tensor.first + tensor.shape.numel()
    return torch.arange(FIRST + tensor.first, end, dtype=torch.float32).view(tensor.shape)


def make(layout: str) -> Placed:
    if layout in WRAPPERS:
        return _wrapped(layout)
    if layout == PIPELINE:
        return _pipeline()
    placed = layouts.LAYOUTS["plain" if layout == PLAIN else DTENSORS[layout]]
    tensors = whole_tensors([(f"#{i}", each.shape) for i, each in enumerate(placed)])
    params = layouts.lay_out([numbers(each) for each in tensors], placed)
    for param in params:  # laid out are the gradients
        local(param.detach()).copy_(local(param.grad))
    named = [(each.name, param) for each, param in zip(tensors, params, strict=True)]
    return _placed(layout, params, {}, named, tensors)


def _pipeline() -> Placed:
    """Two stages of plain tensors, each on two ranks."""
    root = mesh((2, 2), ("pp", "dp"))
    tensors = whole_tensors([(f"{i}.weight", (4, 3 + i)) for i in range(4)] + [("3.bias", (5,))])
    mine = [each for each in tensors if int(each.name[0]) // 2 == root["pp"].get_local_rank()]
    named = [(each.name, nn.Parameter(numbers(each))) for each in mine]
    for _, param in named:
        param.grad = torch.zeros_like(param)
    return _placed(PIPELINE, named, {"mesh": root}, named, tensors)


def _wrapped(layout: str) -> Placed:
    model = Model()
    tensors = whole_tensors([(name, p.shape) for name, p in model.named_parameters()])
    for each, param in zip(tensors, model.parameters(), strict=True):
        param.data.copy_(numbers(each))
    wrap, _ = WRAPPERS[layout]
    wrapped = wrap(model, "cpu")
    part = BATCHES_ALIKE.get(layout, (0, 1, 2, 3))[dist.get_rank()]

    def backward(step: int, factor: Callable[[Tensor], Tensor]) -> None:
        generator = torch.Generator().manual_seed(10 * step + part)
        tokens = torch.randint(11, (BATCH, LENGTH), generator=generator)
        factor(loss_of(wrapped, tokens)).backward()

    named = [(name.removeprefix("module."), p) for name, p in wrapped.named_parameters()]
    numbered = [p.detach().clone() for _, p in named]
    for _, param in named:  # so that the first backward is finite
        local(param.detach()).mul_(1e-4)
    backward(0, lambda loss: loss)
    for (_, param), number in zip(named, numbered, strict=True):
        local(param.detach()).copy_(local(number))
    return _placed(layout, wrapped, {}, named, tensors, backward)


def _placed(
    layout: str,
    source: Any,
    options: dict[str, Any],
    named: list[tuple[str, nn.Parameter]],
    tensors: list[WholeTensor],
    backward: Callable[[int, Callable[[Tensor], Tensor]], None] | None = None,
) -> Placed:
    params, elements = [param for _, param in named], []
    for param in params:
        found = local(param.detach()).flatten().round().long() - FIRST
        elements.append(found.clamp(min=0))
    grads = [param.grad for param in params]
    placed = Placed(
        layout,
        source,
        options,
        named,
        elements,
        [is_partial(grad) for grad in grads],
        [grad if isinstance(grad, DTensor) else None for grad in grads],
        [grad is not None for grad in grads],
        tensors,
        backward,
    )
    for param in params:
        param.grad = None
    return placed
