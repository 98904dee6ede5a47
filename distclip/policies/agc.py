"""Limits in proportion to the weights, unit by unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

from distclip.policies.base import EmptyState, NormContext, Scope, check_finite, check_norm_type
from distclip.policies.minimum import StatelessPolicy

if TYPE_CHECKING:
    Excluded: TypeAlias = tuple[str | nn.Module, ...]
else:
    Excluded = tuple[str, ...]  # what a command line can give, where one is made from the dataclass


@dataclass(frozen=True)
class AGC(StatelessPolicy):
    """Lets the gradient of each unit be at most `clip_factor` times as long as the unit's weights.

        limit_i = clip_factor * max(||W_i||, eps)

    A unit is one index of dim 0, which is what one output is computed from; a tensor of at most one dim is one unit.
    The floor `eps` lets zero-initialised weights learn. A zero gradient stays as it is; a NaN or an infinity spoils
    its own unit alone.

    Args:
        clip_factor: 0.01 suits batches of 4,096; smaller batches bear more.
        exclude: parameters left as they are: names, patterns of names (`"blocks.*.bias"`), names of modules
            (`"head"` stands for all of its parameters too), or modules. The authors leave out the last linear layer.
        unit_dim: 0, or -1 for weights whose last dim numbers the outputs, as in optax; then a tensor with one dim
            longer than 1, such as [1, 8], is one unit too.

    Raises:
        ValueError: `clip_factor` or `eps` is negative, infinite or NaN, `norm_type` is not above 0, `unit_dim` is
            neither 0 nor -1, or `exclude` holds something that is no name and no module.

    Reference: Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization",
        2021 (arXiv:2102.06171), the definition of adaptive gradient clipping.
    """

    clip_factor: float = 0.01
    eps: float = 1e-3
    norm_type: float = 2.0
    exclude: Excluded = ()
    unit_dim: int = 0
    scope = Scope.UNIT
    needs_weights = True

    def __post_init__(self) -> None:
        check_finite("clip_factor", self.clip_factor)
        check_finite("eps", self.eps)
        check_norm_type(self.norm_type)
        object.__setattr__(self, "exclude", _names(self.exclude))
        if self.unit_dim not in (0, -1):
            raise ValueError(
                f"cannot clip units with unit_dim={self.unit_dim}: a unit is what one output is computed from, and "
                f"weights number their outputs on the first or on the last dim. Pass 0 or -1."
            )

    def limit(self, norms: Tensor, state: EmptyState, about: NormContext) -> tuple[Tensor | None, EmptyState]:
        assert about.weights is not None
        return self.clip_factor * about.weights.clamp(min=self.eps), state


def _names(given: Any) -> tuple[str | nn.Module, ...]:
    listed: tuple[Any, ...] = () if isinstance(given, str) else tuple(given)
    if isinstance(given, str) or not all(isinstance(item, str | nn.Module) for item in listed):
        raise ValueError(
            f"cannot exclude {given!r}: it must be a tuple of names and modules, since anything else would match no "
            f"parameter, and those meant to be left out would be clipped. "
            f'Pass, for example, `exclude=("head", model.norm)`.'
        )
    return listed
