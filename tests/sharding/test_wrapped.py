"""DDP, FSDP1, FSDP2, HSDP and tensor parallelism clip as the whole model in one process."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from tests.support import reference
from tests.support.ranks import Ranks, same_bits_everywhere
from tests.support.wrapped import (
    HAS_PARTIAL,
    UNSHARDED,
    WRAPPERS,
    is_partial,
    local,
    whole_gradients,
    with_gradients,
)


def reduce_partial(grad: Tensor | None) -> Tensor | None:
    if grad is None or not is_partial(grad):
        return grad
    return grad.redistribute(
        placements=[Replicate() if p.is_partial() else p for p in grad.placements]
    )


def clips_as_the_whole_model(kind: str, device: str) -> None:
    for norm_type in (2.0, 1.0, torch.inf):
        expected = reference.total_norm(whole_gradients(), norm_type)
        max_norm = 0.3 * expected.item()
        model = with_gradients(kind, device)
        partial = [is_partial(p.grad) for p in model.parameters()]
        assert any(partial) == (kind in HAS_PARTIAL)
        reduced = [reduce_partial(p.grad) for p in model.parameters()]
        before = [None if g is None else local(g).clone() for g in reduced]

        with CommDebugMode() as comms:
            norm = distclip.clip_grad_norm_(model, max_norm, norm_type)

        # A Partial gradient has no values until it is reduced, once; the ranks first say that they
        # have such gradients, beside their sums. Weights that are no part of tensor parallelism are
        # compared over its axis when the plan is made: sizes and numbers.
        compared = 2 if kind in ("tp", "fsdp2 x tp") else 0
        summed = (kind not in UNSHARDED) + any(partial)
        assert comms.get_total_counts() == summed + sum(partial) + compared
        torch.testing.assert_close(norm.cpu().double(), expected, rtol=1e-5, atol=0)
        assert same_bits_everywhere(norm)
        coefficient = max_norm / (norm.item() + 1e-6)
        assert coefficient < 0.31  # it did clip
        for param, was in zip(model.parameters(), before, strict=True):
            assert (was is None) == (param.grad is None)
            if was is not None:
                torch.testing.assert_close(
                    local(param.grad), was * coefficient, rtol=2e-7, atol=1e-12
                )


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrapped_models_clip_as_the_whole_model(four_ranks: Ranks, kind: str) -> None:
    four_ranks.run(clips_as_the_whole_model, kind, four_ranks.device)


def bare_lists_are_refused(kind: str, device: str) -> None:
    model = with_gradients(kind, device)
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    for call in (
        lambda: distclip.clip_grad_norm_(list(model.parameters()), 1.0),
        lambda: distclip.clip_grad_norm_((p for p in model.parameters()), 1.0),
        lambda: distclip.Clipper(list(model.parameters())),
    ):
        with pytest.raises(distclip.LayoutError, match=r"Pass the wrapped module"):
            call()
    for param, was in zip(model.parameters(), before, strict=True):
        assert (was is None and param.grad is None) or torch.equal(param.grad, was)


@pytest.mark.parametrize("kind", [kind for kind in WRAPPERS if kind.startswith("fsdp1")])
def test_a_list_of_fsdp1_parameters_is_refused(four_ranks: Ranks, kind: str) -> None:
    four_ranks.run(bare_lists_are_refused, kind, four_ranks.device)


def every_rank_sees_it(kind: str, device: str) -> None:
    model = with_gradients(kind, device)
    clean = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    last = [name for name, grad in clean.items() if local(grad).numel()][-1]
    for value, rank, norm_type in itertools.product(
        (math.nan, math.inf), range(4), (1.0, 2.0, 8.0, math.inf)
    ):
        here = dist.get_rank() == rank
        for name, param in model.named_parameters():
            param.grad = clean[name].clone() if name in clean else None
            if here and name == last:
                local(param.grad).view(-1)[0] = value
        named = re.escape(last.replace("_fsdp_wrapped_module.", "")) if here else ".*"
        with pytest.raises(
            distclip.NonFiniteGradientError, match=rf"'{named}'.*rank {rank} is {value}"
        ):
            distclip.clip_grad_norm_(model, 1.0, norm_type, error_if_nonfinite=True)
        norm = distclip.clip_grad_norm_(model, 1.0, norm_type)
        assert same_bits_everywhere(norm)
        assert norm.isnan() if math.isnan(value) else norm.isposinf()


@pytest.mark.parametrize("kind", ["fsdp1 FULL_SHARD original", "fsdp2", "hsdp", "tp", "fsdp2 x tp"])
def test_nan_and_inf_on_any_rank_raise_on_every_rank(four_ranks: Ranks, kind: str) -> None:
    four_ranks.run(every_rank_sees_it, kind, four_ranks.device)
