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

NEW = ""  # what states have of a tensor that had no gradient yet


class Norms(NamedTuple):
    """What a policy sees in a step; one entry a row (of the model, of each tensor or unit).

    `loss` is None where none is given.
    """

    names: Sequence[str]
    norms: Sequence[float]
    sizes: Sequence[int]
    weights: Sequence[float]
    total: float
    loss: float | None = None


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

    def accepts_loss(self, loss: float) -> float:
        """The largest loss that is accepted."""
        return math.inf

    def count(self, seen: Norms) -> None:
        """The step was taken."""

    def saved(self) -> Any:
        """What `Clipper.state_dict` has of it."""
        return {}


def _ring(past: Sequence[float], size: int) -> list[float]:
    ring = [math.inf] * size
    for index, norm in enumerate(past):
        ring[index % size] = norm
    return ring


class PlainAutoClip(Plain):
    def limits(self, seen: Norms) -> list[float] | None:
        now = [n for n in seen.norms if 0 < n < math.inf]
        past = [*self.past, *now][-self.policy.history :]
        return [float(np.percentile(past, self.policy.percentile)) if past else math.inf]

    def count(self, seen: Norms) -> None:
        self.past += [n for n in seen.norms if n > 0]

    def saved(self) -> Any:
        return {"history": _ring(self.past, self.policy.history), "num_steps": len(self.past)}


class PlainSkipSpike(Plain):
    def __post_init__(self) -> None:
        self.losses: list[float] = []

    def limits(self, seen: Norms) -> list[float] | None:
        return None

    def accepts(self, norm: float) -> float:
        return min(self.policy.max_norm, self._highest(self.past))

    def accepts_loss(self, loss: float) -> float:
        return self._highest(self.losses) if math.isfinite(loss) else -math.inf

    def _highest(self, accepted: list[float]) -> float:
        p, past = self.policy, accepted[-self.policy.window :]
        if len(past) < max(2, p.window // 2):
            return math.inf
        mean = statistics.fmean(past)
        deviation = np.sqrt(np.var(past, ddof=1))
        return mean + p.z_thresh * max(float(deviation), 1e-6 * abs(mean))

    def count(self, seen: Norms) -> None:
        self.past += [n for n in seen.norms if n > 0]
        self.losses += [] if seen.loss is None else [seen.loss]

    def saved(self) -> Any:
        rings = [_ring(each, self.policy.window) for each in (self.past, self.losses)]
        return {"values": rings, "counts": [len(self.past), len(self.losses)]}


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
        return {"gamma": {NEW: math.inf, **self.gamma}, "num_steps": self.num_steps}


class PlainAdaGN(Plain):
    """From all norms of a tensor at once: moving averages as weighted sums."""

    def __post_init__(self) -> None:
        self.norms: dict[str, list[float]] = {}

    def limits(self, seen: Norms) -> list[float] | None:
        return [
            self._new(self._with(name, norm)) if norm else math.inf
            for name, norm in zip(seen.names, seen.norms, strict=True)
        ]

    def _with(self, name: str, norm: float) -> list[float]:
        return [*self.norms.get(name, []), norm]

    def _new(self, norms: list[float]) -> float:
        p = self.policy
        mean, square = average(norms, p.gamma1), average([norm * norm for norm in norms], p.gamma2)
        unbiased = mean / (1 - p.gamma1 ** len(norms)), square / (1 - p.gamma2 ** len(norms))
        return unbiased[0] / (math.sqrt(unbiased[1]) + p.eps)

    def count(self, seen: Norms) -> None:
        for name, norm in zip(seen.names, seen.norms, strict=True):
            if norm > 0:
                self.norms[name] = self._with(name, norm)

    def saved(self) -> Any:
        p, each = self.policy, self.norms.items()
        square = {name: average([norm**2 for norm in norms], p.gamma2) for name, norms in each}
        return {
            "mean": {NEW: 0.0} | {name: average(norms, p.gamma1) for name, norms in each},
            "rms": {NEW: 0.0} | {name: math.sqrt(number) for name, number in square.items()},
            "num_steps": {NEW: 0} | {name: len(norms) for name, norms in each},
        }


class PlainAGGC(Plain):
    """From the norms afterwards, and when each came."""

    def limits(self, seen: Norms) -> list[float] | None:
        p, (norm,) = self.policy, seen.norms
        late = min(1.0, max(0.0, (self.num_steps - p.late_from) / p.late_steps))
        past = average(self.past, p.beta)
        low = past * (p.low * (1 - late) + p.late_low * late)
        high = past * (p.high * (1 - late) + p.late_high * late)
        if norm == 0 or math.isnan(norm):
            return [norm]
        if high and norm > high:
            return [max(high, p.max_down * norm) if p.max_down else high]
        return [min(low, p.max_up * norm) if norm < low else norm]

    def count(self, seen: Norms) -> None:
        self.past += [norm for norm in self.limits(seen) or [] if norm > 0]
        self.num_steps += 1

    def saved(self) -> Any:
        return {"average": average(self.past, self.policy.beta), "num_steps": self.num_steps}


class PlainMinimum(Plain):
    def __post_init__(self) -> None:
        self.both = plain(self.policy.first), plain(self.policy.second)

    def limits(self, seen: Norms) -> list[float] | None:
        found = [limits for each in self.both if (limits := each.limits(seen)) is not None]
        return [float(np.min(each)) for each in zip(*found, strict=True)] if found else None

    def accepts(self, norm: float) -> float:
        return min(each.accepts(norm) for each in self.both)

    def accepts_loss(self, loss: float) -> float:
        return min(each.accepts_loss(loss) for each in self.both)

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
    real.AdaGN: PlainAdaGN,
    real.AGGC: PlainAGGC,
    real.Minimum: PlainMinimum,
}


def plain(policy: Any) -> Plain:
    return KINDS.get(type(policy), Plain)(policy)


def average(numbers: Sequence[float], decay: float) -> float:
    """The moving average that begins at 0 and keeps `decay` of itself in each step."""
    last = len(numbers) - 1
    return sum((1 - decay) * decay ** (last - i) * number for i, number in enumerate(numbers))
