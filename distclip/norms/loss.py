"""The mean of the ranks' losses, for policies that judge a step by it too.

It travels in the all-reduce of the norms, as a sum and the number of ranks that gave one: not all
need have a loss.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.errors import LayoutError
from distclip.norms.plan import LOSS_SIZE, Plan


def loss_slots(loss: Tensor | None, device: torch.device) -> Tensor:
    """What a rank sends.

    A loss that is not finite is sent as infinity, because NaN is the mean of no loss.

    Args:
        loss: a float64 scalar on `device`; None where this rank has none.

    Shapes: the result: [LOSS_SIZE]; float64.
    """
    if loss is None:
        return torch.zeros(LOSS_SIZE, dtype=torch.float64, device=device)
    return torch.stack([torch.where(loss.isfinite(), loss, math.inf), torch.ones_like(loss)])


def mean_loss(slots: Tensor) -> Tensor:
    """Of slots that were added up over the ranks; NaN where none gave a loss."""
    return slots[0] / slots[1]


def average_loss(loss: Tensor, plan: Plan) -> Tensor:
    """The mean where nothing is sharded, and no sums are reduced.

    Raises:
        LayoutError: it is unknown which ranks train together.

    Collective: one all-reduce of two numbers, in which all ranks take part that have a loss or not.
    """
    slots = loss_slots(loss, plan.device)
    if plan.ranks is not None:
        plan.ranks.all_reduce_(slots, doing="averaging loss=")
    elif dist.is_initialized() and dist.get_world_size() > 1:
        raise LayoutError(
            "cannot average loss=: nothing is sharded, and nothing says which ranks train "
            "together. Each would judge its own loss, and some might skip a step that others take. "
            "Make the Clipper from the wrapped model, as it is trained, or pass `mesh=`."
        )
    return mean_loss(slots)
