"""AutoClip: the limit is a percentile of the norms so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.policies._policy import About, Combines, Scope, check, check_norm_type


class Past(NamedTuple):
    """The latest norms, float64 [history], in a ring; and how many there have been, int64."""

    norms: Tensor
    seen: Tensor


@dataclass(frozen=True)
class AutoClip(Combines):
    """Clips the total norm to the `percentile`-th percentile of all norms so far, the current one included.

    Interpolated linearly between norms, as `numpy.percentile` does. Of a longer run the last `history` norms count.

    Raises:
        ValueError: `percentile` is outside 0..100, `history` below 1, `norm_type` not above 0.

    Reference: Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: adaptive gradient clipping for source separation
        networks", 2020 (arXiv:2007.14469), section 3. It keeps the whole history.
    """

    percentile: float = 10.0
    history: int = 10_000
    norm_type: float = 2.0
    scope = Scope.MODEL

    def __post_init__(self) -> None:
        check("AutoClip", "percentile", self.percentile, 0 <= self.percentile <= 100, "within 0..100")
        check("AutoClip", "history", self.history, self.history >= 1, "1 or above")
        check_norm_type(self.norm_type)

    def init(self, num_groups: int, device: torch.device) -> Past:
        norms = torch.zeros(self.history, dtype=torch.float64, device=device)
        return Past(norms, torch.zeros((), dtype=torch.int64, device=device))

    def limit(self, norms: Tensor, state: Past, about: About) -> tuple[Tensor | None, Past]:
        del about
        place = (state.seen % self.history).reshape(1)
        past = Past(state.norms.index_copy(0, place, norms.reshape(1)), state.seen + 1)
        known = torch.arange(self.history, device=norms.device) < past.seen
        ordered = torch.where(known, past.norms, torch.inf).sort().values
        rank = (past.seen.clamp(max=self.history) - 1) * (self.percentile / 100)
        low, high = (ordered.gather(0, end.long().reshape(1)).squeeze(0) for end in (rank.floor(), rank.ceil()))
        return low + (high - low) * (rank - rank.floor()), past
