"""Megatron-core's own optimizers clip by distclip, whatever they shard."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from distclip import AGC, ClipNorm, ClipTensorNorm
from distclip.adapters.megatron import attach
from tests.conftest import pool
from tests.support import reference
from tests.support.megatron_models import Case, Run, running, sizes
from tests.support.ranks import same_bits_everywhere

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None,
    reason="megatron-core is not installed (tests/peers.txt)",
)

BUCKETS = {"overlap_grad_reduce": True, "bucket_size": 150}
EXPERTS = {"expert_model_parallel_size": 2}
CASES = {
    "float32, tp x pp, tied": Case(sizes(2, 2)),
    "float32, pp x dp": Case(sizes(1, 2), tied=False),
    "bfloat16, tp x dp": Case(sizes(2), torch.bfloat16, config={"log_num_zeros_in_grad": True}),
    "float16, cp x dp": Case(sizes(context_parallel_size=2), torch.float16),
    "distributed bfloat16, tp x dp, buckets": Case(sizes(2), torch.bfloat16, True, ddp=BUCKETS),
    "distributed float32, pp x dp, tied": Case(sizes(1, 2), torch.float32, True),
    "distributed float16, dp": Case(sizes(), torch.float16, True),
    "distributed bfloat16, two instances": Case(
        sizes(num_distributed_optimizer_instances=2),
        torch.bfloat16,
        True,
        ddp={"num_distributed_optimizer_instances": 2},
    ),
    "experts in float32, tp x ep x etp": Case(sizes(2, **EXPERTS), num_experts=4),
    "experts in float32, tp x ep": Case(
        sizes(2, **EXPERTS, expert_tensor_parallel_size=1), num_experts=4
    ),
    "experts in distributed bfloat16, pp x ep": Case(
        sizes(1, 2, **EXPERTS), torch.bfloat16, True, num_experts=4
    ),
}


def clips_by(run: Run, policy: Any, clipped: list[Tensor], seed: int) -> None:
    """One step with `policy` leaves what `clipped` has, of all tensors."""
    total = reference.total_norm(run.grads)
    handle = attach(run.optimizer, policy, model=run.model)
    run.stepped_with.clear()
    success, norm, _ = run.optimizer.step()
    assert success is True
    assert isinstance(norm, float)
    torch.testing.assert_close(torch.tensor(norm).double(), total, rtol=1e-7, atol=0)
    assert handle.report is not None
    assert handle.report.clipped
    assert same_bits_everywhere(handle.report.total_norm)
    expected = run.expected_steps(dict(zip(run.wholes, clipped, strict=True)))
    assert set(expected) == set(run.stepped_with)
    for stepped, grad in run.stepped_with.items():
        torch.testing.assert_close(grad.double(), expected[stepped], rtol=2.5e-7, atol=1e-12)
    handle.detach()


def every_policy_is_right(name: str) -> None:
    with running(CASES[name]) as run:
        run.record()
        scale = float(run.optimizer.get_loss_scale())
        for index, kind in enumerate(("AGC", "ClipNorm", "ClipTensorNorm")):
            run.fill(index, scale)
            run.wholes = {k: w._replace(grad=w.grad / scale) for k, w in run.wholes.items()}
            grads = run.grads
            limit = 0.3 * reference.total_norm(grads).item()
            if kind == "ClipNorm":
                clips_by(run, ClipNorm(limit), reference.clip_norm(grads, limit), index)
            elif kind == "ClipTensorNorm":
                clipped = reference.clip_tensor_norm(grads, limit / 10)
                clips_by(run, ClipTensorNorm(limit / 10), clipped, index)
            else:
                clips_by(run, AGC(0.3), reference.agc(run.weights, grads, 0.3), index)


@pytest.mark.parametrize("name", CASES)
def test_every_policy_is_right(name: str) -> None:
    pool(4).run(every_policy_is_right, name)
