"""The losses that ranks give policies to judge, and those that the policies remember."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.faults.cases import GIVEN, NOT_FINITE, NUM_RANKS, PIPELINE, UNSHARDED, Case


def given_loss(case: Case, step: int, breaks: bool) -> float | Tensor | None:
    """What this rank gives to be judged, as a number or a tensor; some ranks give none.

    Args:
        breaks: whether the loss of this rank's backward is the wrong one.
    """
    rank, givers = dist.get_rank(), givers_of(case)
    if rank not in givers:
        return None
    loss = 2.0 + 0.1 * rank + 0.05 * step
    is_now = step == case.faulty and case.place == GIVEN
    if breaks or (is_now and rank == givers[case.rank % len(givers)]):
        loss *= NOT_FINITE.get(case.fault, 1e30)
    return loss if case.number % 2 else torch.tensor([loss])


def givers_of(case: Case) -> list[int]:
    """The ranks that give a loss: the last stage of a pipeline, else all, or two of them."""
    if case.layout == PIPELINE:
        return [2, 3]
    if case.layout in UNSHARDED or case.number % 3 == 0:
        return [*range(NUM_RANKS)]
    return [case.rank, (case.rank + 1) % NUM_RANKS]


def losses_of(saved: Any) -> list[float]:
    """What the one SkipSpike in a saved state remembers of losses; fewer than its window."""
    while "values" not in saved:
        saved = saved.get("groups") or saved.get("first") or next(iter(saved.values()))
    losses = saved["values"][1]
    return losses[losses.isfinite()].tolist()
