"""Policies on engines whose ranks hold different layers, parts of layers, or experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import distclip
from tests.support import reference
from tests.support.engines import APPLIED, norm_of


class Case(NamedTuple):
    """A policy, and what it leaves of gradients, given them and the weights."""

    policy: Any
    left_of: Callable[[list[Tensor], list[Tensor]], list[Tensor]]

    def expected(self, grads: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is left by name; less than there was."""
        left = self.left_of(list(grads.values()), [weights[name] for name in grads])
        by_name = dict(zip(grads, left, strict=True))
        assert norm_of(by_name) < 0.99 * norm_of(grads)
        return by_name


NORM = Case(distclip.ClipNorm(0.5), lambda g, w: reference.clip_norm(g, 0.5))
AGC = Case(distclip.AGC(0.02), lambda g, w: reference.agc(w, g, 0.02))
ADAGC = Case(distclip.AdaGC(max_norm=0.5), NORM.left_of)  # in its first step

WITHOUT_UNITS = [
    NORM,
    Case(distclip.ClipNorm(0.5, 1.0), lambda g, w: reference.clip_norm(g, 0.5, 1.0)),
    Case(distclip.ClipNorm(0.05, math.inf), lambda g, w: reference.clip_norm(g, 0.05, math.inf)),
    Case(distclip.ClipTensorNorm(0.1), lambda g, w: reference.clip_tensor_norm(g, 0.1)),
    Case(distclip.ClipBlockRMS(0.02), lambda g, w: reference.clip_block_rms(g, 0.02)),
    Case(distclip.ClipValue(0.01), lambda g, w: reference.clip_value(g, 0.01)),
]


def check(update: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """What this rank applied of the tensors that it holds."""
    assert update
    for name, found in update.items():
        torch.testing.assert_close(
            found, expected[name], **APPLIED, msg=lambda text, n=name: f"{n}: {text}"
        )


def of_all_ranks(mine: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    dist.all_gather_object(found := [{}] * dist.get_world_size(), mine)
    return found


def same_everywhere(states: list[str]) -> bool:
    dist.all_gather_object(found := [None] * dist.get_world_size(), states)
    return all(other == states for other in found)
