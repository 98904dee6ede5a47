"""Every policy in plain Python: what the state machine compares distclip with.

Written from the documents of the policies, over lists of all norms so far, and not from their code.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from distclip import policies as real


class Norms(NamedTuple):
    """What a policy sees in a step; one entry a row (of the model, of each tensor or unit)."""

    names: Sequence[str]
    norms: Sequence[float]
    sizes: Sequence[int]
    weights: Sequence[float]
    total: float


@dataclass
class Plain:
    """A policy that remembers nothing, or in `past` all that it has seen."""

    policy: Any
    past: list[float] = field(default_factory=list)
    num_steps: int = 0

    def __post_init__(self) -> None:
        """What policies with more to remember begin with."""

    def limits(self, seen: Norms) -> list[float] | None:
        """None where nothing is limited."""
        p = self.policy
        if isinstance(p, real.ClipValue):
            return [p.clip_value]
        if isinstance(p, real.ClipBlockRMS):
            return [p.threshold * math.sqrt(size) for size in seen.sizes]
        if isinstance(p, real.AGC):
            return [p.clip_factor * max(weight, p.eps) for weight in seen.weights]
        return None if math.isinf(p.max_norm) else [p.max_norm] * len(seen.norms)

    def accepts(self, norm: float) -> float:
        """The largest norm that is accepted."""
        return math.inf

    def count(self, seen: Norms) -> None:
        """The step was taken."""

    def saved(self) -> Any:
        """What `Clipper.state_dict` has of it."""
        return {}

    def _ring(self, size: int) -> list[float]:
        ring = [math.inf] * size
        for index, norm in enumerate(self.past):
            ring[index % size] = norm
        return ring


class PlainAutoClip(Plain):
    def limits(self, seen: Norms) -> list[float] | None:
        past = [*self.past, *(n for n in seen.norms if n > 0)][-self.policy.history :]
        if not all(map(math.isfinite, seen.norms)):
            return [math.nan]  # no percentile is one of infinity
        return [float(np.percentile(past, self.policy.percentile)) if past else math.inf]

    def count(self, seen: Norms) -> None:
        self.past += [n for n in seen.norms if n > 0]

    def saved(self) -> Any:
        return {"history": self._ring(self.policy.history), "num_steps": len(self.past)}


class PlainSkipSpike(Plain):
    def limits(self, seen: Norms) -> list[float] | None:
        return None

    def accepts(self, norm: float) -> float:
        p, past = self.policy, self.past[-self.policy.window :]
        if len(past) < max(2, p.window // 2):
            return p.max_norm
        mean = statistics.fmean(past)
        deviation = np.sqrt(np.var(past, ddof=1))
        return min(p.max_norm, mean + p.z_thresh * max(float(deviation), 1e-6 * mean))

    def count(self, seen: Norms) -> None:
        self.past += [n for n in seen.norms if n > 0]

    def saved(self) -> Any:
        no_losses = [math.inf] * self.policy.window
        values = [self._ring(self.policy.window), no_losses]
        return {"values": values, "counts": [len(self.past), 0]}


class PlainZClip(Plain):
    def _statistics(self) -> tuple[float, float]:
        """Mean and variance after all norms so far, each pulled back as it was when it came."""
        p, first = self.policy, self.past[: self.policy.warmup_steps]
        mean, var = (float(np.mean(first)), float(np.var(first))) if first else (0.0, 0.0)
        for found in self.past[p.warmup_steps :]:
            norm = min(found, self._highest(found, mean, var))
            mean = p.alpha * mean + (1 - p.alpha) * norm
            var = p.alpha * var + (1 - p.alpha) * (norm - mean) ** 2
        return mean, var

    def _highest(self, norm: float, mean: float, var: float) -> float:
        z = self.policy.z_thresh
        if not norm > mean + z * math.sqrt(var):
            return mean + z * math.sqrt(var)
        return mean + z**2 * var / (norm - mean)  # z² σ / ((norm - μ) / σ)

    def limits(self, seen: Norms) -> list[float] | None:
        (norm,), p = seen.norms, self.policy
        warm = len(self.past) < p.warmup_steps
        return [min(p.max_norm, math.inf if warm else self._highest(norm, *self._statistics()))]

    def count(self, seen: Norms) -> None:
        self.past += [n for n in seen.norms if n > 0]

    def saved(self) -> Any:
        mean, var = self._statistics()
        return {"mean": mean, "var": var, "num_steps": len(self.past)}


class PlainAdaGC(Plain):
    def __post_init__(self) -> None:
        self.gamma: dict[str, float] = {}

    def limits(self, seen: Norms) -> list[float] | None:
        p = self.policy
        within = seen.total <= p.max_norm
        scale = 1.0 if within else p.max_norm / seen.total if seen.total else math.nan
        return [
            norm * scale if self._is_early(name) else p.ratio * self.gamma[name]
            for name, norm in zip(seen.names, seen.norms, strict=True)
        ]

    def _is_early(self, name: str) -> bool:
        return self.num_steps < self.policy.warmup_steps or name not in self.gamma

    def count(self, seen: Norms) -> None:
        limits, beta = self.limits(seen) or [], self.policy.beta
        for name, norm, limit in zip(seen.names, seen.norms, limits, strict=True):
            clipped = min(norm, limit)
            if norm > 0 and self._is_early(name):
                self.gamma[name] = min(self.gamma.get(name, math.inf), clipped)
            elif norm > 0:
                self.gamma[name] = beta * self.gamma[name] + (1 - beta) * clipped
        self.num_steps += 1

    def saved(self) -> Any:
        return {"gamma": self.gamma, "num_steps": self.num_steps}


class PlainMinimum(Plain):
    def __post_init__(self) -> None:
        self.both = plain(self.policy.first), plain(self.policy.second)

    def limits(self, seen: Norms) -> list[float] | None:
        found = [limits for each in self.both if (limits := each.limits(seen)) is not None]
        return [float(np.min(each)) for each in zip(*found, strict=True)] if found else None

    def accepts(self, norm: float) -> float:
        return min(each.accepts(norm) for each in self.both)

    def count(self, seen: Norms) -> None:
        for each in self.both:
            each.count(seen)

    def saved(self) -> Any:
        return {"first": self.both[0].saved(), "second": self.both[1].saved()}


KINDS = {
    real.AutoClip: PlainAutoClip,
    real.SkipSpike: PlainSkipSpike,
    real.ZClip: PlainZClip,
    real.AdaGC: PlainAdaGC,
    real.Minimum: PlainMinimum,
}


def plain(policy: Any) -> Plain:
    return KINDS.get(type(policy), Plain)(policy)
