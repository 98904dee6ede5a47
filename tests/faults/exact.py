"""Policies with a state in decimal numbers of 40 digits, for series that are long.

Written from the documents of the policies, as plain.py is, but with sums that go on from step to
step: a million steps take half a minute.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Sequence
from decimal import Context, Decimal, localcontext
from typing import Any, Generic, NamedTuple, TypeVar

from distclip.policies import AdaGC, AutoClip, SkipSpike, ZClip

DIGITS = Context(prec=40)
P = TypeVar("P")
Number = Decimal | float


class Seen(NamedTuple):
    """One step: the norm of the model or of each tensor, that of the model, and the loss."""

    norms: Sequence[float]
    total: float
    loss: float


class Exact(Generic[P]):
    """A policy, and what it remembers."""

    def __init__(self, policy: P) -> None:
        self.policy = policy

    def limits(self, seen: Seen) -> list[Number] | None:
        """None where nothing is limited."""
        raise NotImplementedError

    def accepts(self, seen: Seen) -> bool | None:
        """None where rounding decides."""
        return True

    def count(self, seen: Seen) -> None:
        """The step was taken."""
        raise NotImplementedError

    def state(self) -> list[list[Number]]:
        """In the order of the fields of the policy's state."""
        raise NotImplementedError


class ExactZClip(Exact[ZClip]):
    def __init__(self, policy: ZClip) -> None:
        super().__init__(policy)
        self.mean = self.var = self.sum = self.squares = Decimal(0)
        self.num = 0

    def _highest(self, norm: Decimal) -> Decimal:
        z = Decimal(self.policy.z_thresh)
        threshold = self.mean + z * self.var.sqrt()
        return threshold if norm <= threshold else self.mean + z**2 * self.var / (norm - self.mean)

    def limits(self, seen: Seen) -> list[Number]:
        most = self.policy.max_norm
        assert most is not None
        if self.num < self.policy.warmup_steps:
            return [most]
        return [min(Decimal(most), self._highest(Decimal(seen.norms[0])))]

    def count(self, seen: Seen) -> None:
        norm, alpha = Decimal(seen.norms[0]), Decimal(self.policy.alpha)
        if not norm:
            return
        self.num += 1
        if self.num > self.policy.warmup_steps:
            norm = min(norm, self._highest(norm))
            self.mean = alpha * self.mean + (1 - alpha) * norm
            self.var = alpha * self.var + (1 - alpha) * (norm - self.mean) ** 2
            return
        self.sum, self.squares = self.sum + norm, self.squares + norm**2
        self.mean = self.sum / self.num
        self.var = self.squares / self.num - self.mean**2

    def state(self) -> list[list[Number]]:
        return [[self.mean], [self.var], [self.num]]


class _Window:
    """The last values: as a ring, in their order of size, and their sums."""

    def __init__(self, size: int) -> None:
        self.size, self.num = size, 0
        self.last: deque[float] = deque()
        self.ordered: list[float] = []
        self.sum = self.squares = Decimal(0)

    def add(self, value: float) -> None:
        if len(self.last) == self.size:
            oldest = self.last.popleft()
            del self.ordered[bisect.bisect_left(self.ordered, oldest)]
            self.sum, self.squares = self.sum - Decimal(oldest), self.squares - Decimal(oldest) ** 2
        self.last.append(value)
        bisect.insort(self.ordered, value)
        self.sum, self.squares = self.sum + Decimal(value), self.squares + Decimal(value) ** 2
        self.num += 1

    def ring(self) -> list[Number]:
        """The oldest is the next to be overwritten."""
        ring: list[Number] = [math.inf] * self.size
        for age, value in enumerate(reversed(self.last), start=1):
            ring[(self.num - age) % self.size] = value
        return ring


class ExactAutoClip(Exact[AutoClip]):
    def __init__(self, policy: AutoClip) -> None:
        super().__init__(policy)
        self.window = _Window(policy.history)

    def limits(self, seen: Seen) -> list[Number]:
        """The current norm is one of the history."""
        (norm,), ordered = seen.norms, self.window.ordered.copy()
        if norm and len(ordered) == self.policy.history:
            del ordered[bisect.bisect_left(ordered, self.window.last[0])]
        if norm:
            bisect.insort(ordered, norm)
        if not ordered:
            return [math.inf]
        place = Decimal(len(ordered) - 1) * Decimal(self.policy.percentile) / 100
        low = ordered[int(place)]
        high = ordered[min(int(place) + 1, len(ordered) - 1)]
        return [Decimal(low) + (Decimal(high) - Decimal(low)) * (place - int(place))]

    def count(self, seen: Seen) -> None:
        if seen.norms[0]:
            self.window.add(seen.norms[0])

    def state(self) -> list[list[Number]]:
        return [self.window.ring(), [self.window.num]]


class ExactAdaGC(Exact[AdaGC]):
    def __init__(self, policy: AdaGC) -> None:
        super().__init__(policy)
        self.gamma: list[Number] = []
        self.num = 0

    def limits(self, seen: Seen) -> list[Number]:
        p = self.policy
        self.gamma = self.gamma or [math.inf] * len(seen.norms)
        scale = min(Decimal(1), Decimal(p.max_norm) / Decimal(seen.total)) if seen.total else 1
        return [
            Decimal(norm) * scale if self._is_early(gamma) else Decimal(p.ratio) * Decimal(gamma)
            for norm, gamma in zip(seen.norms, self.gamma, strict=True)
        ]

    def _is_early(self, gamma: Number) -> bool:
        return self.num < self.policy.warmup_steps or gamma == math.inf

    def count(self, seen: Seen) -> None:
        limits, beta = self.limits(seen), Decimal(self.policy.beta)
        for i, (norm, limit) in enumerate(zip(seen.norms, limits, strict=True)):
            gamma, clipped = self.gamma[i], min(Decimal(norm), Decimal(limit))
            if norm and self._is_early(gamma):
                self.gamma[i] = min(Decimal(gamma), clipped)
            elif norm:
                self.gamma[i] = beta * Decimal(gamma) + (1 - beta) * clipped
        self.num += 1

    def state(self) -> list[list[Number]]:
        return [self.gamma, [self.num]]


class ExactSkipSpike(Exact[SkipSpike]):
    """Norms and losses have a window each; squares of 40 digits leave 20 of their differences."""

    def __init__(self, policy: SkipSpike) -> None:
        super().__init__(policy)
        self.windows = _Window(policy.window), _Window(policy.window)

    def limits(self, seen: Seen) -> None:
        return None

    def accepts(self, seen: Seen) -> bool | None:
        each = [
            self._fits(value, window)
            for value, window in zip((seen.norms[0], seen.loss), self.windows, strict=True)
        ]
        each.append(seen.norms[0] <= self.policy.max_norm)
        return False if False in each else None if None in each else True

    def _fits(self, value: float, window: _Window) -> bool | None:
        num = len(window.last)
        if num < max(2, self.policy.window // 2):
            return True
        mean = window.sum / num
        var = max(Decimal(0), window.squares - window.sum * mean) / (num - 1)
        deviation = max(var.sqrt(), Decimal("1e-6") * abs(mean))
        highest = mean + Decimal(self.policy.z_thresh) * deviation
        near = abs(Decimal(value) - highest) <= abs(highest) * Decimal("1e-12")
        return None if near else Decimal(value) <= highest

    def count(self, seen: Seen) -> None:
        if seen.norms[0]:
            self.windows[0].add(seen.norms[0])
        self.windows[1].add(seen.loss)

    def state(self) -> list[list[Number]]:
        norms, losses = self.windows
        return [[*norms.ring(), *losses.ring()], [norms.num, losses.num]]


EXACT = {
    AdaGC: ExactAdaGC,
    AutoClip: ExactAutoClip,
    SkipSpike: ExactSkipSpike,
    ZClip: ExactZClip,
}


def exact(policy: Any) -> Exact[Any]:
    return EXACT[type(policy)](policy)


def distance(found: float, right: Number, scale: Number = 0.0) -> float:
    """The relative difference; relative to `scale` where that is larger."""
    if not math.isfinite(right) or found == right:
        return 0.0 if found == right else math.inf
    with localcontext(DIGITS):
        size = max(abs(Decimal(right)), Decimal(scale))
        return float(abs(Decimal(found) - Decimal(right)) / size) if size else math.inf
