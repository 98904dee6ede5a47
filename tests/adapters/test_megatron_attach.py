"""Megatron-core's own optimizers clip by distclip, whatever they shard."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distclip import AGC, AdaGC, ClipNorm, ClipTensorNorm
from distclip.adapters.megatron import attach
from tests.support import reference
from tests.support.megatron_models import Case, Run, running, sizes
from tests.support.ranks import Ranks, same_bits_everywhere

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
    "distributed bfloat16, pp x dp, two chunks": Case(
        sizes(1, 2, virtual_pipeline_model_parallel_size=2), torch.bfloat16, True, num_chunks=2
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
    # Without the model, parameters of optimizers that are not distributed have no names.
    handle = attach(
        run.optimizer, policy, model=run.chunks if seed else None, tensor_norms=bool(seed)
    )
    success, norm, _ = run.optimizer.step()
    assert success is True
    assert isinstance(norm, float)
    torch.testing.assert_close(torch.tensor(norm).double(), total, rtol=1e-7, atol=0)
    assert handle.report is not None
    assert handle.report.clipped
    assert same_bits_everywhere(handle.report.total_norm)
    if seed:
        norms = sorted(reference.total_norm([grad]).item() for grad in run.grads)
        assert sorted(handle.report.tensor_norms().values()) == pytest.approx(norms, rel=3e-7)
    run.check_steps(clipped)
    handle.detach()


def every_policy_is_right(name: str) -> None:
    with running(CASES[name]) as run:
        if CASES[name].distributed:  # else AGC would be right wherever parts begin
            dist.all_gather_object(cut := [False] * 4, run.cuts_rows())
            assert any(cut)
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
def test_every_policy_is_right(four_megatron_ranks: Ranks, name: str) -> None:
    four_megatron_ranks.run(every_policy_is_right, name)


# Adam makes steps of equal size of gradients that are rounding errors, but for this.
ADAM: dict[str, Any] = {"config": {"adam_eps": 1e-2, "lr": 0.1}}
LAYOUTS = {
    "whole": Case(sizes(), **ADAM),
    "tp x dp": Case(sizes(2), **ADAM),
    "distributed, tp x dp, buckets": Case(sizes(2), distributed=True, ddp=BUCKETS, **ADAM),
    "distributed, dp": Case(sizes(), distributed=True, **ADAM),
}


def train(case: Case) -> tuple[list[float], dict[str, Tensor]]:
    """The norms and the weights, gathered, of steps on Megatron's own backward."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    # There is no dropout, and no generator of CUDA's for it.
    no_fork = mock.patch.object(CudaRNGStatesTracker, "fork", return_value=nullcontext())
    with running(case) as run, no_fork:
        handle = attach(run.optimizer, AdaGC(1.0, 0.5, 0.5, 1))
        ranks = run.state.get_data_parallel_world_size()
        norms = []
        for step in range(3):
            run.optimizer.zero_grad()
            run.chunks[0].zero_grad_buffer()
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(12, (4, 9), generator=generator)
            mine = tokens.chunk(ranks)[run.state.get_data_parallel_rank()]
            positions = torch.arange(8).expand(len(mine), 8)
            mask = torch.ones(8, 8).triu(1).bool()[None, None]
            loss = run.chunks[0](mine[:, :-1], positions, mask, labels=mine[:, 1:].contiguous())
            loss.mean().backward()
            finalize_model_grads(run.chunks)
            success, norm, _ = run.optimizer.step()
            assert success
            assert handle.report is not None
            assert handle.report.clipped
            norms.append(norm)
        weights = {}
        for name, param in run.named_parameters():
            parts = [torch.empty_like(param) for _ in range(run.num_parts(param))]
            if len(parts) > 1:
                group = run.state.get_tensor_model_parallel_group()
                dist.all_gather(parts, param.detach(), group=group)
            else:
                parts = [param.detach()]
            weights[name] = torch.cat(parts, param.partition_dim if len(parts) > 1 else 0)
        return norms, weights


def training_is_as_on_whole_models() -> None:
    norms, weights = train(LAYOUTS["whole"])
    for case in list(LAYOUTS.values())[1:]:
        sharded_norms, sharded_weights = train(case)
        assert sharded_norms == pytest.approx(norms, rel=1e-5)
        assert sharded_weights.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(sharded_weights[name], weight, rtol=1e-4, atol=1e-5)


def test_training_is_as_on_whole_models(four_megatron_ranks: Ranks) -> None:
    four_megatron_ranks.run(training_is_as_on_whole_models)
