"""What happens around a step of Megatron's optimizers: overflow, skips, other callers, the end."""

from __future__ import annotations

import functools
import importlib.util
import math
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

from distclip import (
    AGC,
    AdaGC,
    AutoClip,
    ClipNorm,
    ClipTensorNorm,
    NonFiniteGradientError,
    SkipSpike,
)
from distclip.adapters.megatron import attach
from tests.support import reference
from tests.support.megatron_models import ETP, Case, Run, running, sizes
from tests.support.ranks import Ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None,
    reason="megatron-core is not installed (tests/peers.txt)",
)

SHARDED = Case(sizes(2), torch.bfloat16, True)
PLAIN = Case(sizes(2, 2))
EXPERTS = Case(sizes(2, expert_model_parallel_size=2, **{ETP: 1}), num_experts=4)


def main_weights(run: Run) -> list[Tensor]:
    return [p.detach().clone() for member in run.members() for p in member.get_parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def poison(run: Run, number: float) -> None:
    """One element of a gradient that the last stage and the last tensor-parallel rank hold."""
    state = run.state
    if state.is_pipeline_last_stage() and (
        state.get_tensor_model_parallel_rank() == state.get_tensor_model_parallel_world_size() - 1
    ):
        run.chunks[0].buffers[0].grad_data[0] = number


def total(run: Run) -> float:
    return reference.total_norm(run.grads).item()


def history(handle: Any) -> int:
    (group,) = handle.state_dict()["groups"].values()
    return int(group["AutoClip"]["num_steps"])


def an_overflow_leaves_all_as_it_was() -> None:
    scaled = {"initial_loss_scale": 4.0, "hysteresis": 1}
    for distributed in (False, True):
        with running(Case(sizes(2), torch.float16, distributed, config=scaled)) as run:
            handle = attach(run.optimizer, AutoClip(50.0, history=8))
            for seed in (0, 1):
                run.fill(seed, scale=4.0)
                assert run.optimizer.step()[0] is True
            report, state, weights = handle.report, handle.state_dict(), main_weights(run)
            run.fill(2, scale=4.0)
            poison(run, math.inf)
            assert run.optimizer.step() == (False, None, None)
            assert handle.report is report
            assert str(handle.state_dict()) == str(state)
            assert same(main_weights(run), weights)
            assert float(run.optimizer.get_loss_scale()) == 2.0
            run.fill(3, scale=2.0)
            success, norm, _ = run.optimizer.step()
            assert success is True
            assert norm == pytest.approx(total(run) / 2, rel=1e-7)
            assert not same(main_weights(run), weights)


def test_an_overflow_leaves_all_as_it_was(four_megatron_ranks: Ranks) -> None:
    four_megatron_ranks.run(an_overflow_leaves_all_as_it_was)


def norms_that_are_not_finite_are_handled() -> None:
    for case, modes in ((SHARDED, ("skip", "raise", "propagate", "zero")), (EXPERTS, ("skip",))):
        with running(case) as run:
            handle, weights = attach(run.optimizer, SkipSpike(max_norm=0.0)), main_weights(run)
            run.fill(0)
            assert run.optimizer.step() == (False, None, None)
            assert handle.report is not None
            assert handle.report.skipped
            assert same(main_weights(run), weights)
            handle.detach()
            for mode in modes:
                handle = attach(run.optimizer, AutoClip(50.0, history=8), mode)
                run.fill(0)
                assert run.optimizer.step()[0] is True
                state, weights = handle.state_dict(), main_weights(run)
                run.fill(1)
                poison(run, math.nan)
                if mode == "raise":
                    with pytest.raises(NonFiniteGradientError):
                        run.optimizer.step()
                    assert same(main_weights(run), weights)
                elif mode == "skip":
                    assert run.optimizer.step() == (False, None, None)
                    assert same(main_weights(run), weights)
                elif mode == "zero":
                    success, norm, _ = run.optimizer.step()
                    assert success
                    assert math.isnan(norm)
                    finite = [weight.isfinite().all() for weight in main_weights(run)]
                    assert all(finite)
                assert run.optimizer.config.clip_grad == 1.0
                if mode != "propagate":
                    assert str(handle.state_dict()) == str(state)
                    run.fill(2)
                    success, norm, _ = run.optimizer.step()  # it goes on
                    assert success is True
                    assert norm == pytest.approx(total(run), rel=1e-7)
                handle.detach()
                if mode == "propagate":
                    attach(run.optimizer).detach()


def test_norms_that_are_not_finite_are_handled(four_megatron_ranks: Ranks) -> None:
    four_megatron_ranks.run(norms_that_are_not_finite_are_handled)


def a_norm_in_between_is_no_step() -> None:
    for case in (SHARDED, EXPERTS):
        with running(case) as run:
            handle = attach(run.optimizer, AutoClip(50.0, history=8))
            for seed in range(2):
                run.fill(seed)
                assert run.optimizer.prepare_grads() is False
                norm = run.optimizer.get_grad_norm()
                assert isinstance(norm, float)
                assert norm == pytest.approx(total(run), rel=1e-7)
                assert run.optimizer.get_grad_norm() == norm
                assert run.optimizer.step()[1] == norm
                clipped = run.optimizer.get_grad_norm()
                assert handle.report is not None
                expected = norm * float(handle.report.coefficient)
                assert clipped == pytest.approx(expected, rel=1e-6)
                assert history(handle) == seed + 1


def test_a_norm_in_between_is_no_step(four_megatron_ranks: Ranks) -> None:
    four_megatron_ranks.run(a_norm_in_between_is_no_step)


def the_policy_alone_clips() -> None:
    for own in (0.0, 0.5):
        case = Case(sizes(2), config={"clip_grad": own, "log_num_zeros_in_grad": True})
        with running(case) as run:
            run.record()
            run.fill(0)
            for buffer in run.chunks[0].buffers:
                buffer.grad_data[:5] = 0.0
            assert run.optimizer.prepare_grads() is False
            zeros = run.optimizer.count_zeros()
            assert zeros >= 5
            handle = attach(run.optimizer, ClipNorm(2.0), model=run.chunks)
            norm = run.optimizer.get_grad_norm()
            assert norm > 4
            assert run.optimizer.step() == (True, norm, zeros)
            assert run.optimizer.config.clip_grad == own
            assert run.optimizer.get_grad_norm() == pytest.approx(2.0, rel=1e-6)
            handle.detach()
            # A chain of one, and the one itself; they return other things where nothing is clipped.
            (member,) = run.members()
            handle = attach(member, ClipNorm(2.0))
            run.fill(1)
            assert member.step()[1] == pytest.approx(total(run), rel=1e-7)
            assert member.get_grad_norm() == pytest.approx(2.0, rel=1e-6)
            handle.detach()


@pytest.mark.filterwarnings("ignore:The config of the optimizer has clip_grad")
def test_the_policy_alone_clips(four_megatron_ranks: Ranks) -> None:
    four_megatron_ranks.run(the_policy_alone_clips)


def detached_it_is_as_before() -> None:
    with running(EXPERTS) as run:
        before = dict(vars(run.optimizer))
        handle = attach(run.optimizer, ClipNorm(2.0))
        with pytest.raises(ValueError, match=r"again: distclip\.adapters.megatron does already"):
            attach(run.optimizer)
        with pytest.raises(ValueError, match=r"FP32Optimizer again"):
            attach(run.members()[1])
        handle.detach()
        handle.detach()
        assert vars(run.optimizer) == before
        run.fill(0)
        _, norm, _ = run.optimizer.step()
        run.optimizer.config.clip_grad = 0.0
        assert run.optimizer.get_grad_norm() == pytest.approx(1.0, rel=1e-4)
        assert norm == pytest.approx(total(run), rel=0.01)
        # Somebody wraps the step, and goes on calling it.
        handle = attach(run.optimizer, ClipNorm(2.0))
        run.optimizer.step = functools.partial(run.optimizer.step)
        handle.detach()
        run.optimizer.config.clip_grad = 1.5
        run.fill(1)
        assert run.optimizer.step()[0] is True
        assert run.optimizer.get_grad_norm() == pytest.approx(1.5, rel=1e-4)
        del run.optimizer.step


def test_detached_it_is_as_before(four_megatron_ranks: Ranks) -> None:
    four_megatron_ranks.run(detached_it_is_as_before)


def one_all_reduce_and_no_new_group() -> None:
    with running(EXPERTS) as run:
        groups = len(dist.distributed_c10d._world.pg_map)
        attach(run.optimizer, ClipNorm(2.0))
        assert len(dist.distributed_c10d._world.pg_map) == groups
        run.fill(0)
        with CommDebugMode() as comms:
            run.optimizer.step()
        assert comms.get_total_counts() == 1


def test_dense_and_expert_optimizers_share_one_all_reduce(four_megatron_ranks: Ranks) -> None:
    four_megatron_ranks.run(one_all_reduce_and_no_new_group)


def megatrons_norm_lacks_biases_of_experts() -> None:
    """On tensor-parallel ranks other than the first, that hold other experts."""
    with running(EXPERTS) as run:
        run.fill(0)
        assert run.optimizer.prepare_grads() is False
        lacking = run.optimizer.get_grad_norm()
        left_out = [
            one.grad
            for key, one in run.wholes.items()
            if re.search(r"local_experts\.[23]\.linear_fc2\.bias", key)
        ]
        assert len(left_out) == 4
        expected = math.sqrt(total(run) ** 2 - reference.total_norm(left_out).item() ** 2)
        assert lacking == pytest.approx(expected, rel=1e-6)
        assert lacking < total(run) * 0.9999
        attach(run.optimizer)
        assert run.optimizer.get_grad_norm() == pytest.approx(total(run), rel=1e-7)


def test_megatrons_norm_lacks_biases_of_experts(four_megatron_ranks: Ranks) -> None:
    four_megatron_ranks.run(megatrons_norm_lacks_biases_of_experts)


RESUMED = (
    Case(sizes(2, 2)),
    Case(sizes(1, 2), torch.bfloat16, True),
    Case(sizes(2), torch.bfloat16, True),
    Case(sizes(4)),
)


def a_state_moves_between_layouts() -> None:
    """AdaGC's norms of tensors, saved and loaded on another layout after every step."""
    saved, clipped, steps = None, [], []
    names: list[str] = []
    for step, case in enumerate(RESUMED):
        with running(case) as run:
            handle = attach(run.optimizer, AdaGC(1.01, 10.0, 0.9, 2), model=run.chunks)
            if saved is not None:
                handle.load_state_dict(saved)
            run.fill(0, 1.0 + step % 3)
            _, norm, _ = run.optimizer.step()
            assert norm == pytest.approx(total(run), rel=1e-7)
            saved = handle.state_dict()
            names = names or sorted(run.wholes)
            assert sorted(run.wholes) == names
            steps.append([reference.total_norm([run.wholes[k].grad]).item() for k in names])
            clipped.append(run.optimizer.get_grad_norm())
    expected = reference.adagc(steps, 1.01, 10.0, 0.9, 2).norm(dim=1)
    assert expected[3] < 0.9 * torch.tensor(steps[3]).norm()  # limits per tensor were met
    torch.testing.assert_close(torch.tensor(clipped).double(), expected, rtol=1e-6, atol=0)


def test_a_state_moves_between_layouts(four_megatron_ranks: Ranks) -> None:
    four_megatron_ranks.run(a_state_moves_between_layouts)


def modules_are_excluded_on_every_rank() -> None:
    """Each stage has other modules, and what is stepped may be copies of their parameters."""
    for case, inside in ((PLAIN, "layers."), (SHARDED, "layers.0.")):
        with running(case) as run:
            run.record()
            modules = run.chunks[0].named_modules()
            layer = next(module for name, module in modules if name.endswith("layers.0"))
            excluding = AGC(0.3, exclude=(layer,)) & AGC(0.4, exclude=(layer,))
            for step, policy in enumerate((excluding, AGC(0.3, exclude=(f"*{inside}*",)))):
                named = None if policy is excluding else run.chunks
                handle = attach(run.optimizer, policy, model=named)
                run.fill(step)
                assert run.optimizer.step()[0] is True
                whole = zip(run.wholes, run.grads, strict=True)
                agc = reference.agc(run.weights, run.grads, 0.3)
                clipped = [
                    grad if inside in name else by_agc
                    for (name, grad), by_agc in zip(whole, agc, strict=True)
                ]
                if step == 0:  # later the weights are others
                    run.check_steps(clipped)
                handle.detach()
            if case is PLAIN:
                with pytest.raises(ValueError, match=r"no names here.*`model=`"):
                    attach(run.optimizer, AGC(0.3, exclude=("*.bias",)))


def test_modules_are_excluded_on_every_rank(four_megatron_ranks: Ranks) -> None:
    four_megatron_ranks.run(modules_are_excluded_on_every_rank)


def the_precision_aware_optimizer_is_clipped() -> None:
    """Its gradients are in `.decoupled_grad`. Its inner optimizer is Transformer Engine's."""
    with running(Case(sizes(2), torch.bfloat16, True)) as run:
        run.optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        member = run.members()[0]
        for group, parts in zip(member.param_groups, member.shard_float16_groups, strict=True):
            group["params"] = list(parts)
        run.record()
        run.fill(0)
        limit = 0.3 * total(run)
        handle = attach(run.optimizer, ClipNorm(limit))
        success, norm, _ = run.optimizer.step()
        assert success
        assert norm == pytest.approx(total(run), rel=1e-7)
        run.check_steps(reference.clip_norm(run.grads, limit))
        handle.detach()


def test_the_precision_aware_optimizer_is_clipped(four_megatron_ranks: Ranks) -> None:
    four_megatron_ranks.run(the_precision_aware_optimizer_is_clipped)


def without_layer_numbers(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "layer_number"):
            module.layer_number = None


def tensors_of_one_name_are_distinct() -> None:
    """Layers whose numbers are unknown are all number 0, on each stage and in each chunk."""
    for chunks in (1, 2):
        virtual = {"virtual_pipeline_model_parallel_size": 2} if chunks == 2 else {}
        case = Case(sizes(1, 2, **virtual), num_chunks=chunks)
        with running(case, without_layer_numbers) as run:
            run.record()
            run.fill(0)
            limit = 0.05 * total(run)
            attach(run.optimizer, ClipTensorNorm(limit), model=run.chunks)
            assert run.optimizer.step()[0]
            run.check_steps(reference.clip_tensor_norm(run.grads, limit))


def test_tensors_of_one_name_are_distinct(four_megatron_ranks: Ranks) -> None:
    four_megatron_ranks.run(tensors_of_one_name_are_distinct)


def freeze_second_stage(model: nn.Module) -> None:
    if getattr(model, "pre_process", True) is False:
        model.requires_grad_(False)


def ranks_that_train_nothing_take_part() -> None:
    for distributed in (False, True):
        with running(
            Case(sizes(1, 2), torch.float32, distributed, tied=False), freeze_second_stage
        ) as run:
            run.fill(0)
            attach(run.optimizer, ClipNorm(2.0))
            success, norm, _ = run.optimizer.step()
            assert success
            assert norm == pytest.approx(total(run), rel=1e-7)
            assert run.optimizer.get_grad_norm() == pytest.approx(2.0, rel=1e-6)


def test_ranks_that_train_nothing_take_part(four_megatron_ranks: Ranks) -> None:
    four_megatron_ranks.run(ranks_that_train_nothing_take_part)


def the_layer_wise_optimizer_is_clipped() -> None:
    """Each data-parallel rank steps some of the parameters."""
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    for case in (PLAIN._replace(sizes=sizes(2)), EXPERTS):
        with running(case) as run:
            groups = ProcessGroupCollection.use_mpu_process_groups(["dp_cp", "expt_dp"])
            config = run.optimizer.config
            run.optimizer = LayerWiseDistributedOptimizer(run.members(), config, groups)
            run.optimizer.allgather_params = lambda: None  # gloo gathers equal sizes alone
            run.record()
            run.fill(0)
            mine = {param for member in run.members() for param in member.get_parameters()}
            assert len(mine) < len(list(run.named_parameters()))
            limit = 0.1 * total(run)
            handle = attach(run.optimizer, ClipTensorNorm(limit), model=run.chunks)
            success, norm, _ = run.optimizer.step()
            assert success
            assert norm == pytest.approx(total(run), rel=1e-7)
            run.check_steps(reference.clip_tensor_norm(run.grads, limit))
            handle.detach()


def test_the_layer_wise_optimizer_is_clipped(four_megatron_ranks: Ranks) -> None:
    four_megatron_ranks.run(the_layer_wise_optimizer_is_clipped)


def what_cannot_be_clipped_is_refused() -> None:
    weight = torch.zeros(2, requires_grad=True)
    for wrong in (torch.optim.SGD([weight]), None, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="it is no optimizer of Megatron-core"):
            attach(wrong)
    with running(SHARDED) as run:
        (member,) = run.members()
        with pytest.raises(TypeError):
            attach(run.optimizer, 1.0)
        with pytest.raises(TypeError, match="from model=3: it is no model"):
            attach(run.optimizer, model=3)
        with pytest.raises(ValueError, match="cannot find 28 of the 28 parameters"):
            attach(run.optimizer, model=nn.Linear(2, 2))
        own, member.tp_group = member.tp_group, run.state.get_data_parallel_group()
        with pytest.raises(ValueError, match="its groups were passed by hand"):
            attach(run.optimizer)
        member.tp_group = own
        member.ddp_config.use_megatron_fsdp = True
        with pytest.raises(ValueError, match="over FSDP inside Megatron"):
            attach(run.optimizer)
        member.ddp_config.use_megatron_fsdp = False
        groups = member.model_fp32_groups
        del member.model_fp32_groups  # in another version it may have another name
        with pytest.raises(ValueError, match=r"model_fp32_groups.*Use megatron-core 0.15.3"):
            attach(run.optimizer)
        member.model_fp32_groups = groups
        with pytest.raises(ValueError, match="cannot clip what Unknown steps"):
            attach(unknown_optimizer(run.optimizer.config))
        attach(run.optimizer).detach()  # nothing was claimed
    with pytest.raises(ValueError, match="its parallel state is not initialized"):
        attach(run.optimizer)


def unknown_optimizer(config: Any) -> Any:
    from megatron.core.optimizer import MegatronOptimizer

    abstract = MegatronOptimizer.__abstractmethods__
    unknown = type("Unknown", (MegatronOptimizer,), dict.fromkeys(abstract, lambda *_: None))
    return unknown(torch.optim.SGD([torch.zeros(2)]), config)


def test_what_cannot_be_clipped_is_refused(four_megatron_ranks: Ranks) -> None:
    four_megatron_ranks.run(what_cannot_be_clipped_is_refused)
