"""What a total norm that is NaN or infinite leads to, decided on the norm alone: every rank does the same."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distclip.errors import NonFiniteGradientError
from distclip.norms import measure, reduce
from distclip.norms.plan import Plan

RULES = ("propagate", "raise", "skip", "zero")
_MOST_NAMES = 100  # that a rank sends of its offenders: after a NaN in the loss every parameter is one
_LAG = 4  # steps after which an accelerator's counter is read


def check_rule(rule: str, most: int) -> None:
    if rule not in RULES:
        raise ValueError(
            f"cannot make a Clipper with on_nonfinite={rule!r}: no behaviour has that name, so that it is not clear "
            f'what a NaN should do. Pass "propagate", "raise", "skip" or "zero".'
        )
    if most < 0:
        raise ValueError(
            f"cannot make a Clipper with max_consecutive_skips={most}: a number of steps is never negative. "
            f"Pass 0 or above."
        )


def ruled(factor: Tensor, finite: Tensor, rule: str) -> Tensor:
    """What the gradients are multiplied by, once `rule` has been heard."""
    if rule == "propagate":
        return factor
    return torch.where(finite, factor, 0.0 if rule == "zero" else 1.0)


def bound(limit: Tensor, finite: Tensor, rule: str) -> Tensor:
    """What the gradients are clamped to, once `rule` has been heard."""
    return limit if rule == "propagate" else torch.where(finite, limit, math.inf)


class SkipCounter:
    """Counts, on the device, the steps whose norm was not finite."""

    def __init__(self, most_in_a_row: int) -> None:
        self.most_in_a_row = most_in_a_row
        self._counts: Tensor | None = None  # all of them; those in a row
        self._on_their_way: deque[tuple[Any, Tensor]] = deque()

    @property
    def total(self) -> Tensor:
        return torch.zeros((), dtype=torch.int64, device="cpu") if self._counts is None else self._counts[0]

    def count_(self, finite: Tensor) -> bool:
        """Whether there have been too many in a row. On an accelerator the answer is `_LAG` steps old."""
        if self._counts is None:
            self._counts = torch.zeros(2, dtype=torch.int64, device=finite.device)
        self._counts.add_(~finite)
        self._counts[1].mul_(~finite)
        if finite.device.type == "cpu":
            return int(self._counts[1]) > self.most_in_a_row
        return self._counted_before(torch.get_device_module(finite.device.type))

    def _counted_before(self, device_module: Any) -> bool:
        # Not written for any one step to wait for: the copy of the count that is read has long arrived. All ranks
        # read the same step's, so that all raise together. A step inside a CUDA graph cannot raise.
        assert self._counts is not None
        if getattr(device_module, "is_current_stream_capturing", bool)():
            return False
        arrived = device_module.Event()
        self._on_their_way.append((arrived, self._counts[1].to("cpu", non_blocking=True)))
        arrived.record()
        if len(self._on_their_way) <= _LAG:
            return False
        arrived, in_a_row = self._on_their_way.popleft()
        arrived.synchronize()
        return int(in_a_row) > self.most_in_a_row


def nonfinite_parameters(names: Sequence[str], each: Tensor, plan: Plan) -> dict[str, list[int]]:
    """See `Report.offenders`. Collective: an all-gather of names; all ranks of the team must call."""
    mine = [name for name, number in zip(names, each.cpu(), strict=True) if not math.isfinite(number)]
    mine = list(dict.fromkeys(mine))
    found: dict[str, list[int]] = {}
    for rank, broken in reduce.gathered(mine[:_MOST_NAMES], plan).items():
        for name in broken:
            found.setdefault(name, []).append(rank)
    return found


def error(
    norm: Tensor, values: Sequence[Tensor | None], plan: Plan, skipped: int | None = None
) -> NonFiniteGradientError:
    """The error for all ranks. All of them come here together, since `norm` is the same on each."""
    local = measure.local(values, plan, apart=True)
    numbers = [float(n) for n in local.each.cpu()]
    ranked = [(_badness(n), n, name) for name, n in zip(local.names, numbers, strict=True)]
    mine = max(ranked, key=lambda found: found[0], default=None)
    everyone = reduce.gathered((mine, sum(not math.isfinite(n) for n in numbers)), plan)
    everywhere = [(found, rank) for rank, (found, _) in everyone.items() if found is not None]
    (_, worst, name), rank = max(everywhere, key=lambda f: (f[0][0], -f[1]))
    num_broken = {rank: count for rank, (_, count) in everyone.items() if count}
    tried = f"cannot clip to a total norm of {norm.item()}"
    if skipped is not None:
        tried += f", after {skipped} steps in a row that were left out because the norm was not finite"
    return NonFiniteGradientError(
        f"{tried}: the worst gradient is that of {name!r}, whose norm on rank {rank} is {_size(worst)} (parameters "
        f"with such gradients, by rank: {_shortly(num_broken)}). No coefficient makes such gradients finite, so that "
        f"all were left as they are. Look for the cause in the loss and its inputs, or skip this step."
    )


def _badness(number: float) -> float:
    """NaN is worse than inf, and inf than any number."""
    return 2.0 if math.isnan(number) else 1.0 if math.isinf(number) else -1 / (1 + number)


def _size(number: float) -> str:
    return str(number) if not math.isfinite(number) else "the largest, and finite"


def _shortly(by_rank: dict[int, int]) -> str:
    layout_cache_key = [f"{rank}: {count}" for rank, count in sorted(by_rank.items())[:8]]
    return ", ".join([*layout_cache_key, *(["..."] if len(by_rank) > 8 else [])]) or "none"
