"""The right answer: the whole model in one process, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from distclip.sharding.read import named_parameters

Build: TypeAlias = Callable[[], nn.Module]
# (model, rank, world_size) -> the loss of this rank's share; None where it has called backward.
Step: TypeAlias = Callable[[Any, int, int], "Tensor | None"]


class Whole(NamedTuple):
    """What the float64 run found.

    Attributes:
        gradients: for each step the mean of the ranks' gradients, by name.
        weights: the parameters, by name.
        digest: of the weights before they became float64: those of every rank must be the same.
    """

    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    digest: str


def whole_gradients(
    build: Build, steps: Step | Sequence[Step], world_size: int, seed: int = 0
) -> list[dict[str, Tensor]]:
    """For each step the float64 gradients of the whole model: the mean over the ranks' shares.

    Args, Raises: as `parity`.

    Collective: none; in one process.
    """
    each = [steps] if callable(steps) else steps
    return run_whole(build, each, world_size, seed).gradients


def run_whole(build: Build, steps: Sequence[Step], world_size: int, seed: int) -> Whole:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        model = build_seeded(build, seed)
        before = digest(model)
        model.double()
        casting = model.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
        gradients = [
            _mean_gradients(model, step, index, world_size, seed)
            for index, step in enumerate(steps)
        ]
        casting.remove()
        weights = {name: p.detach().clone() for name, p in named_parameters(model)}
        return Whole(gradients, weights, before)


def build_seeded(build: Build, seed: int) -> nn.Module:
    """`build()`, with the same weights on every rank and in one process.

    Raises:
        TypeError: it returned no module.
    """
    torch.manual_seed(seed)
    model: Any = build()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"cannot compare the model: build() returned a {type(model).__qualname__}. Return the "
            f"whole nn.Module, before it is wrapped or sharded."
        )
    return model


def digest(model: nn.Module) -> str:
    """Equal for models with the same parameters: names, shapes, and sums of their values."""
    texts: list[str] = []
    for name, param in named_parameters(model):
        wide = param.detach().abs().double()
        at = torch.arange(1, wide.numel() + 1, dtype=torch.float64)
        texts.append(f"{name} {tuple(param.shape)} {float(wide.flatten().cpu() @ at):.17g}")
    return "\n".join(texts)


def seed_step(seed: int, index: int) -> None:
    """Before each step, on every rank alike: random numbers are the same ones everywhere."""
    torch.manual_seed(seed + 1 + index)


def _mean_gradients(
    model: nn.Module, step: Step, index: int, world_size: int, seed: int
) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    for rank in range(world_size):
        seed_step(seed, index)
        loss = step(model, rank, world_size)
        if isinstance(loss, Tensor):
            loss.backward()
    found = {name: _dense(p.grad) for name, p in named_parameters(model) if p.grad is not None}
    if not found:
        raise ValueError(
            f"cannot compare step {index}: it left no gradients in the whole model. Return the "
            f"loss of this rank's share of the batch, or call backward in `step`."
        )
    return {name: grad / world_size for name, grad in found.items()}


def _dense(grad: Tensor) -> Tensor:
    return (grad if grad.layout is torch.strided else grad.to_dense()).detach().clone()


def _cast_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """The inputs of the whole model become float64 as its weights are."""
    return map_floats(args, Tensor.double), map_floats(kwargs, Tensor.double)


def map_floats(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` of each tensor of floating point in it."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        mapped = copy.copy(cast("dict[Any, Any]", value))  # outputs of models have their own class
        for key in list(mapped):
            mapped[key] = map_floats(mapped[key], function)
        return mapped
    if isinstance(value, list | tuple):
        listed = cast("Sequence[Any]", value)
        each = [map_floats(item, function) for item in listed]
        kind: Any = type(listed)
        return kind(*each) if hasattr(kind, "_fields") else kind(each)
    return value
