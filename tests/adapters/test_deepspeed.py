"""On real DeepSpeed engines, ZeRO 0 to 3, gradients are clipped as one process would clip them.

Many engines run in one process per rank. `safe_get_full_grad` shows what an engine is about to
apply, and the float32 weights before and after a step of SGD what it did apply: both are
DeepSpeed's, and independent of distclip.
"""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip.adapters.deepspeed import attach
from tests.support import engines, reference
from tests.support.engines import Applied, config, engine, norm_of
from tests.support.ranks import Ranks, mesh, same_bits_everywhere

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)

# The whole model's norm: rounding of float32 sums; of gradients computed in bf16 and fp16.
WHOLE = {"fp32": 1e-6, "bf16": 1e-2, "fp16": 2e-3}
SCALE = {"fp32": 1.0, "bf16": 1.0, "fp16": 256.0}


def clips_as_one_process(
    stage: int, dtype: str, gas: int, offload: bool, make_optimizer: Any, **more: Any
) -> str:
    whole = norm_of(engines.whole_gradients(0, gas))
    limit = 0.3 * whole
    settings = config(stage, dtype, gas, offload, **more)
    with engine(settings, make_optimizer=make_optimizer) as made, engines.collectives() as counts:
        handle = attach(made, distclip.ClipNorm(limit), tensor_norms=True)
        step = Applied(made, 0, dtype, gas, SCALE[dtype])
        norm, coefficient = handle.report.total_norm, limit / norm_of(step.grads)
        assert counts == [0 if stage == 0 else 1]
        assert same_bits_everywhere(norm)
        assert norm.item() == pytest.approx(norm_of(step.grads), rel=2e-7)
        assert norm.item() == pytest.approx(whole, rel=WHOLE[dtype])
        assert handle.report.clipped
        expected = {name: norm_of({name: grad}) for name, grad in step.grads.items()}
        assert handle.report.tensor_norms() == pytest.approx(expected, rel=4e-7)
        if make_optimizer is engines.sgd:
            engines.check_applied(step.update, [g * coefficient for g in step.grads.values()])
        else:  # AdamW hides a coefficient in the weights, but not in its first moment
            assert first_moment(made, partitioned=stage > 0) == pytest.approx(0.1 * limit, rel=1e-6)
        return type(made.optimizer).__name__


def first_moment(made: Any, partitioned: bool) -> float:
    inner = getattr(made.optimizer, "optimizer", made.optimizer)
    moments = [state["exp_avg"].double() for state in inner.state.values()]
    total = torch.stack([moment.square().sum() for moment in moments]).sum()
    if partitioned:
        dist.all_reduce(total)
    return total.sqrt().item()


def accumulated_and_offloaded(stage: int, dtype: str) -> set[str]:
    offloads = (False,) if stage == 0 else (False, True)
    rows = itertools.product((1, 2), offloads, (engines.sgd, engines.adamw))
    return {clips_as_one_process(stage, dtype, *row) for row in rows}


@pytest.mark.parametrize(
    ("stage", "dtype"),
    # DeepSpeed 0.19.8 does not scale the loss in fp16 at stage 0, but unscales the gradients.
    [row for row in itertools.product(range(4), engines.DTYPES) if row != (0, "fp16")],
)
def test_every_stage_dtype_and_way_to_accumulate(
    two_engine_ranks: Ranks, stage: int, dtype: str
) -> None:
    if dtype == "fp16":
        engines.skip_without_fp16()
    zero_0 = {"SGD", "AdamW"} if dtype == "fp32" else {"FP16_UnfusedOptimizer"}
    zero_1_2 = {"DeepSpeedZeroOptimizer"}
    classes = [zero_0, zero_1_2, zero_1_2, {"DeepSpeedZeroOptimizer_Stage3"}][stage]
    assert two_engine_ranks.run(accumulated_and_offloaded, stage, dtype) == [classes, classes]


def other_classes() -> None:
    fp32_sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    by_stage = {
        1: "BF16_Optimizer",
        2: "DeepSpeedZeroOptimizer",
        3: "DeepSpeedZeroOptimizer_Stage3",
    }
    for stage, gas, optimizer in itertools.product(by_stage, (1, 2), (engines.sgd, engines.adamw)):
        name = clips_as_one_process(stage, "bf16", gas, False, optimizer, **fp32_sums)
        assert name == by_stage[stage]
    assert clips_as_one_process(0, "bf16", 1, False, fused_adam) == "FP16_Optimizer"


def fused_adam(groups: Any) -> torch.optim.Optimizer:
    """Passes for DeepSpeed's FusedAdam, whose kernels would be compiled; steps as torch's."""
    from deepspeed.ops.adam import FusedAdam

    class Fused(FusedAdam, torch.optim.AdamW):
        def __init__(self, params: Any) -> None:
            torch.optim.AdamW.__init__(self, params, lr=0.01)

        step = torch.optim.AdamW.step
        zero_grad = torch.optim.AdamW.zero_grad

    return Fused(groups)


def test_classes_for_float32_sums_and_for_fused_adam(two_engine_ranks: Ranks) -> None:
    two_engine_ranks.run(other_classes)


def sub_groups() -> None:
    with engine(config(3)) as made, engines.collectives() as counts:
        attach(made, distclip.ClipNorm(1.0))
        Applied(made, 0)
        sizes = [sum(p.partition_numel() for p in group) for group in made.optimizer.fp16_groups]
        assert len(sizes) >= 3
        assert all(p.ds_tensor.numel() < p.ds_numel for p in made.module.parameters())
        assert counts == [1]


def test_zero_3_really_partitions_into_several_sub_groups(two_engine_ranks: Ranks) -> None:
    two_engine_ranks.run(sub_groups)


def norms_under_wrappers() -> list[float]:
    found: list[float] = []
    for wrap in (DistributedDataParallel, lambda m: fully_shard(m, mesh=mesh((2,), ("dp",)))):
        model = wrap(engines.make_model())
        engines.loss_of(model, *engines.batch(0, dist.get_rank())).backward()
        found.append(distclip.clip_grad_norm_(model, 1.0).item())
    for stage in range(4):
        with engine(config(stage)) as made:
            handle = attach(made, distclip.ClipNorm(1.0))
            Applied(made, 0)
            found.append(handle.report.total_norm.item())
    return found


def test_the_norm_is_that_of_ddp_and_fsdp2(two_engine_ranks: Ranks) -> None:
    for found in two_engine_ranks.run(norms_under_wrappers):
        assert found == pytest.approx([norm_of(engines.whole_gradients(0))] * 6, rel=1e-6)


def one_rank_alone() -> None:
    for stage in range(4):
        with engine(config(stage)) as made:
            handle = attach(made, distclip.ClipNorm(0.5))
            step = Applied(made, 0)
            engines.check_applied(step.update, reference.clip_norm(list(step.grads.values()), 0.5))
            handle.detach()
            attach(made, distclip.AGC(0.02))
            step = Applied(made, 0)
            grads, weights = list(step.grads.values()), list(step.weights.values())
            engines.check_applied(step.update, reference.agc(weights, grads, 0.02))


def test_one_rank_alone() -> None:
    ranks = Ranks(1)
    try:
        ranks.run(one_rank_alone)
    finally:
        ranks.stop()
