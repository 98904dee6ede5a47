"""Every policy on DeepSpeed engines does to the applied gradients what its reference says."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import distclip
from distclip.adapters.deepspeed import attach
from tests.support import engines, reference
from tests.support.engines import Applied, config, engine, norm_of
from tests.support.ranks import Ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)


class Case(NamedTuple):
    """A policy and what it leaves of gradients, given them and the weights."""

    policy: Any
    reference: Callable[[list[Tensor], list[Tensor]], list[Tensor]]


def stateless(grads: dict[str, Tensor]) -> list[Case]:
    halves = [(p, 0.5 * norm_of(grads, p)) for p in (1.0, 2.0, 3.0, 8.0, math.inf)]
    return [
        *(
            Case(distclip.ClipNorm(h, p), lambda g, w, h=h, p=p: reference.clip_norm(g, h, p))
            for p, h in halves
        ),
        *(
            Case(
                distclip.ClipTensorNorm(limit, p),
                lambda g, w, limit=limit, p=p: reference.clip_tensor_norm(g, limit, p),
            )
            for limit, p in ((1.0, 2.0), (1.0, 3.0), (0.5, math.inf))
        ),
        Case(distclip.ClipBlockRMS(0.1), lambda g, w: reference.clip_block_rms(g, 0.1)),
        Case(distclip.ClipValue(0.05), lambda g, w: reference.clip_value(g, 0.05)),
        Case(distclip.AGC(0.1), lambda g, w: reference.agc(w, g, 0.1)),
        Case(distclip.AGC(0.1, unit_dim=-1), lambda g, w: reference.agc(w, g, 0.1, unit_dim=-1)),
        Case(
            distclip.AGC(0.1, norm_type=3.0), lambda g, w: reference.agc(w, g, 0.1, norm_type=3.0)
        ),
        Case(
            distclip.AGC(0.1, exclude=("4.*",)),
            lambda g, w: [*reference.agc(w, g, 0.1)[:4], *g[4:]],
        ),
    ]


def every_stateless_policy(stage: int, dtype: str, offload: bool, more: dict[str, Any]) -> None:
    num_cases = len(stateless(engines.whole_gradients(0)))
    with engine(config(stage, dtype, offload=offload, **more)) as made:
        for index in range(num_cases):
            engines.backward(made, index, dtype)
            grads, weights = engines.gradients(made), engines.masters(made)
            policy, left_by = stateless(grads)[index]
            handle = attach(made, policy)
            with engines.collectives() as counts:
                made.step()
            assert counts == [0 if stage == 0 else 1]
            expected = left_by(list(grads.values()), list(weights.values()))
            changes = [(e - g).abs().max() for e, g in zip(expected, grads.values(), strict=True)]
            assert max(changes) > 0.01, policy
            try:
                engines.check_applied(engines.updates(made, weights), expected)
            except AssertionError as e:
                raise AssertionError(f"{policy}: {e}") from None
            handle.detach()


@pytest.mark.parametrize(
    ("stage", "dtype", "offload", "more"),
    [
        (0, "fp32", False, {}),
        (0, "bf16", False, {}),
        (1, "fp32", False, {}),
        (1, "bf16", False, {"data_types": {"grad_accum_dtype": "fp32"}}),
        (2, "fp32", True, {}),
        (2, "bf16", False, {}),
        (3, "fp32", False, {}),
        (3, "bf16", True, {}),
    ],
)
def test_every_policy(
    two_engine_ranks: Ranks, stage: int, dtype: str, offload: bool, more: dict[str, Any]
) -> None:
    two_engine_ranks.run(every_stateless_policy, stage, dtype, offload, more)


def modules_are_excluded() -> None:
    with engine(config(2)) as made:
        last = made.module[4]
        for policy in (
            distclip.AGC(0.1, exclude=(last,)),
            distclip.AGC(0.1, exclude=(last,)) & distclip.AGC(0.2, exclude=(last,)),
        ):
            handle = attach(made, policy)
            step = Applied(made, 0)
            grads, weights = list(step.grads.values()), list(step.weights.values())
            expected = [*reference.agc(weights, grads, 0.1)[:4], *grads[4:]]
            assert norm_of(step.update) < 0.99 * norm_of(step.grads)
            engines.check_applied(step.update, expected)
            handle.detach()


def test_modules_of_the_model_can_be_excluded(two_engine_ranks: Ranks) -> None:
    two_engine_ranks.run(modules_are_excluded)


def weights_that_moved() -> None:
    with engine(config(2)) as made:
        attach(made, distclip.AGC(0.1))
        (master, *_) = made.optimizer.single_partition_of_fp32_groups
        before = master.data_ptr()
        made.offload_states()
        made.reload_states()
        assert master.data_ptr() != before
        for index in range(2):  # in the first step the memory that was left has the same values
            step = Applied(made, index)
            grads, weights = list(step.grads.values()), list(step.weights.values())
            engines.check_applied(step.update, reference.agc(weights, grads, 0.1))


def test_weights_are_read_where_offloading_states_has_moved_them(two_engine_ranks: Ranks) -> None:
    two_engine_ranks.run(weights_that_moved)


ADAPTIVE = {
    "autoclip": distclip.AutoClip(50.0, 3),
    "zclip": distclip.ZClip(z_thresh=0.5, warmup_steps=2, max_norm=8.0),
    "adagc": distclip.AdaGC(ratio=0.9, max_norm=2.0, beta=0.9, warmup_steps=2),
}
STEPS = 5


def left_by_adaptive(name: str, steps: list[Applied]) -> list[list[float]]:
    """What is left of the norm, or of the norm of every tensor, in each step."""
    norms = [norm_of(step.grads) for step in steps]
    if name == "autoclip":
        return [[n] for n in reference.autoclip(norms, 50.0, 3)]
    if name == "zclip":
        return [[n] for n in reference.zclip(norms, 0.5, 0.97, 2, 8.0)]
    per_tensor = [[g.norm().item() for g in step.grads.values()] for step in steps]
    return reference.adagc(per_tensor, 0.9, 2.0, 0.9, 2).tolist()


def applied_norms(step: Applied, name: str) -> list[float]:
    if name == "adagc":
        return [u.norm().item() for u in step.update.values()]
    return [norm_of(step.update)]


def adaptive(stage: int, name: str) -> dict[str, Any]:
    with engine(config(stage)) as made:
        handle = attach(made, ADAPTIVE[name])
        steps = [Applied(made, step) for step in range(STEPS)]
        expected = torch.tensor(left_by_adaptive(name, steps)).float()
        found = torch.tensor([applied_norms(step, name) for step in steps])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        num_clipped = sum(norm_of(step.update) < 0.99 * norm_of(step.grads) for step in steps)
        assert num_clipped >= 2
        return handle.state_dict()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_policies_that_remember(two_engine_ranks: Ranks, stage: int, name: str) -> None:
    first, second = two_engine_ranks.run(adaptive, stage, name)
    assert str(first) == str(second)  # the same on every rank
    if name == "adagc":
        names = [n for n, _ in engines.make_model().named_parameters()]
        assert list(first["groups"]["all"]["AdaGC"]["gamma"]) == names
