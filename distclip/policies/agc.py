"""Limits in proportion to the weights, for each unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from distclip.arguments import as_number, items, shown
from distclip.policies.base import EmptyState, NormContext, Scope, StatelessPolicy
from distclip.policies.checks import check_finite, check_norm_type, store_checked


@dataclass(frozen=True)
class AGC(StatelessPolicy):
    """Limits the gradient norm of each unit to `clip_factor` times the norm of the unit's weights.

        limit_i = clip_factor * max(||W_i||, eps)

    A unit is one index of dim 0, from which one output is computed; a tensor of at most one dim is
    one unit. The floor `eps` lets zero-initialised weights learn. A zero gradient stays as it is; a
    NaN or an infinity affects its own unit alone. Frozen weights without a gradient are not read,
    and have no limit.

    Args:
        clip_factor: 0.01 suits batches of 4,096; smaller batches allow more.
        exclude: the parameters that are not clipped: names, patterns of names (`"blocks.*.bias"`),
            names of modules (`"head"` stands for all of its parameters too), or modules. The
            authors exclude the last linear layer.
        unit_dim: 0, or -1 for weights whose last dim indexes the outputs, as in optax; with -1, a
            tensor with only one dim longer than 1, such as [1, 8], is one unit too.

    Raises:
        ValueError: `clip_factor` or `eps` is negative, infinite or NaN, `norm_type` is not above 0,
            `unit_dim` is neither 0 nor -1, or `exclude` holds anything but names and modules.

    Reference: Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without
        Normalization", 2021 (arXiv:2102.06171), the definition of adaptive gradient clipping.
    """

    clip_factor: float = 0.01
    eps: float = 1e-3
    norm_type: float = 2.0
    # Of names and modules. Any, because tyro makes no option for a tuple that may hold modules.
    exclude: tuple[Any, ...] = ()
    unit_dim: int = 0
    scope = Scope.UNIT
    needs_weights = True

    def __post_init__(self) -> None:
        store_checked(self, clip_factor=check_finite, eps=check_finite, norm_type=check_norm_type)
        store_checked(self, exclude=_names_and_modules, unit_dim=_check_unit_dim)

    def limit(
        self, norms: Tensor, state: EmptyState, context: NormContext
    ) -> tuple[Tensor | None, EmptyState]:
        assert context.weights is not None
        return self.clip_factor * context.weights.clamp(min=self.eps), state


def _check_unit_dim(name: str, value: Any) -> int:
    number = as_number(name, value)
    if number not in (0, -1):
        raise ValueError(
            f"cannot clip units with {name}={shown(value)}: one output is computed from each unit, "
            f"and weights index their outputs on the first or on the last dim. Pass 0 or -1."
        )
    return int(number)


def _names_and_modules(name: str, exclude: Any) -> tuple[str | nn.Module, ...]:
    listed = None if isinstance(exclude, nn.Module) else items(exclude)
    if listed is None or not all(isinstance(each, str | nn.Module) for each in listed):
        raise ValueError(
            f"cannot use {name}={shown(exclude)}: it must be a tuple of names and modules. "
            f"Anything else matches no parameter, and those to leave out would be clipped. "
            f'Pass, for example, `exclude=("head", model.norm)`.'
        )
    # The order of a set differs between ranks, and the text of a policy must not.
    return tuple(sorted(listed, key=str) if isinstance(exclude, set | frozenset) else listed)
