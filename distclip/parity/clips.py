"""What is compared: functions that clip, and what they should do by definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from distclip import api
from distclip.clipper import Clipper
from distclip.policies import Policy
from distclip.sharding.local_tensors import local_values

# (model, max_norm) -> the total norm before clipping, or None
ClipFunction: TypeAlias = Callable[[Any, float], "Tensor | float | None"]
# (whole float64 gradients by name, max_norm) -> what they should be after clipping
Definition: TypeAlias = Callable[[Mapping[str, Tensor], float], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Clip:
    """A way to clip, and what it should do.

    Attributes:
        function: `(model, max_norm) -> total norm`, or None where it has no norm. Called on every
            rank after `step`, with what the layout returned. It writes the gradients.
        norm_type: of the norm that it clips by and returns.
        expected: what it should do: None for min(1, max_norm / norm) times the gradients; a policy
            of distclip, which then runs on the whole float64 gradients, with a state over the
            steps; or `(whole gradients by name, max_norm) -> clipped gradients by name`.
    """

    function: ClipFunction
    norm_type: float = 2.0
    expected: Policy[Any] | Definition | None = None


class PolicyClip:
    """A policy as a clip function. Each rank has its own, with a Clipper for the model."""

    def __init__(self, policy: Policy[Any]) -> None:
        self.policy = policy
        self._clipper: Clipper | None = None

    def __call__(self, model: Any, max_norm: float) -> Tensor:
        if self._clipper is None:
            self._clipper = Clipper(model, self.policy)
        return self._clipper.clip_().total_norm


def is_policy(value: Any) -> bool:
    return not isinstance(value, type) and hasattr(value, "scope") and hasattr(value, "limit")


def clip_as_distclip(model: Any, max_norm: float) -> Tensor:
    return api.clip_grad_norm_(model, max_norm)


def clip_as_torch(model: Any, max_norm: float) -> Tensor:
    """As torch's documentation says: FSDP1 has a method of its own."""
    if (own := getattr(model, "clip_grad_norm_", None)) is not None:
        return own(max_norm)
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm)


DEFAULT = {"distclip": Clip(clip_as_distclip), "torch": Clip(clip_as_torch)}


def as_number(norm: Any) -> float | None:
    """What a clip function returned.

    Collective: where it is a DTensor that is not reduced yet.

    Raises:
        TypeError: it is no number.
    """
    if isinstance(norm, Tensor) and norm.numel() == 1:
        return float(local_values(norm.detach()))
    if norm is None or (isinstance(norm, int | float) and not isinstance(norm, bool)):
        return norm
    raise TypeError(
        f"cannot compare what the clip function returned: it is a {type(norm).__qualname__}. "
        f"Return the total norm before clipping, as a number or a tensor with one element, or None."
    )


def total_norm(gradients: Mapping[str, Tensor], norm_type: float = 2.0) -> float:
    """Of all elements in float64."""
    wide = [_magnitudes(grad) for grad in gradients.values()]
    elements = torch.cat([torch.zeros(1, dtype=torch.float64), *wide])
    largest = elements.max()
    if math.isinf(norm_type) or largest == 0 or not largest.isfinite():
        return float(largest)
    return float(largest * (elements / largest).pow(norm_type).sum() ** (1 / norm_type))


def _magnitudes(grad: Tensor) -> Tensor:
    return (grad.to(torch.complex128) if grad.is_complex() else grad.double()).abs().flatten()


class Definer:
    """What a clip should do, step after step, on whole float64 gradients.

    Args:
        weights: whole float64 parameters by name, for policies that look at them.
    """

    def __init__(self, clip: Clip, weights: Mapping[str, Tensor]) -> None:
        self.clip, self._clipper = clip, cast(Any, None)
        if is_policy(clip.expected):
            self._params = {name: nn.Parameter(weight) for name, weight in weights.items()}
            policy = cast("Policy[Any]", clip.expected)
            self._clipper = Clipper(list(self._params.items()), policy)

    def __call__(
        self, gradients: Mapping[str, Tensor], max_norm: float
    ) -> tuple[float, Mapping[str, Tensor]]:
        """The total norm before, and the clipped gradients."""
        if self._clipper is not None:
            return self._by_policy(gradients)
        norm = total_norm(gradients, self.clip.norm_type)
        if self.clip.expected is not None:
            return norm, cast(Definition, self.clip.expected)(gradients, max_norm)
        coefficient = min(1.0, max_norm / norm) if norm else 1.0
        return norm, {name: grad * coefficient for name, grad in gradients.items()}

    def _by_policy(self, gradients: Mapping[str, Tensor]) -> tuple[float, Mapping[str, Tensor]]:
        for name, param in self._params.items():
            param.grad = gradients[name].clone() if name in gradients else None
        norm = float(self._clipper.clip_().total_norm)
        grads = {name: param.grad for name, param in self._params.items()}
        return norm, {name: grad for name, grad in grads.items() if grad is not None}
