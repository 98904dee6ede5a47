"""Every policy on real DeepSpeed engines, ZeRO 0 to 3, clips as one process with the whole model does.

Many engines run in one process a rank. What an engine is about to apply is read by `safe_get_full_grad`, and what it
did apply from the float32 weights before and after a step of SGD: both are DeepSpeed's, and know nothing of distclip.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from tests.support import engines, reference
from tests.support.engines import Applied, config, engine, norm_of
from tests.support.ranks import Ranks, same_bits_everywhere

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
attach = distclip.adapters.deepspeed.attach

# The whole model's norm: rounding of float32 sums; of gradients in bf16 and fp16, which are computed so.
WHOLE = {"fp32": 1e-6, "bf16": 1e-2, "fp16": 2e-3}
# A weight minus its successor, over the learning rate: half a unit in the last place of a weight below 1.
APPLIED = {"rtol": 2e-6, "atol": 0.5 * 2**-23 / engines.LR}
SCALE = {"fp32": 1.0, "bf16": 1.0, "fp16": 256.0}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


def has_fp16() -> bool:
    try:
        engines.make_model().half()(torch.zeros(1, 7, dtype=torch.float16)).sum().backward()
    except RuntimeError:
        return False
    return True


@contextmanager
def collectives() -> Iterator[list[int]]:
    """Of each decision from now on, the collectives that distclip makes."""
    counts: list[int] = []
    decide = distclip.step.decide

    def watched(*args: Any, **kwargs: Any) -> Any:
        with CommDebugMode() as comms:
            decision = decide(*args, **kwargs)
        counts.append(comms.get_total_counts())
        return decision

    with mock.patch.object(distclip.step, "decide", watched):
        yield counts


def check_applied(update: dict[str, Tensor], expected: list[Tensor]) -> None:
    for (name, found), want in zip(update.items(), expected, strict=True):
        torch.testing.assert_close(found, want, **APPLIED, msg=lambda text, name=name: f"{name}: {text}")


# --- the matrix: stages, dtypes, accumulation, offload, optimizers ---------------------------------------------------


def one_row(stage: int, dtype: str, gas: int, offload: bool, make_optimizer: Any, **more: Any) -> str:
    whole = engines.norm_of(engines.whole_gradients(0, gas))
    limit = 0.3 * whole
    with engine(config(stage, dtype, gas, offload, **more), make_optimizer=make_optimizer) as made:
        handle = attach(made, distclip.ClipNorm(limit))
        counts = counted(handle)
        step = Applied(made, 0, dtype, gas, SCALE[dtype])
        norm, coefficient = handle.report.total_norm, limit / norm_of(step.grads)
        assert counts == [0 if stage == 0 else 1]
        assert same_bits_everywhere(norm)
        assert norm.item() == pytest.approx(norm_of(step.grads), rel=2e-7)
        assert norm.item() == pytest.approx(whole, rel=WHOLE[dtype])
        assert handle.report.clipped
        if make_optimizer is engines.sgd:
            check_applied(step.update, [grad * coefficient for grad in step.grads.values()])
        else:  # AdamW hides a coefficient in the weights, but not in its first moment
            assert first_moment(made, partitioned=stage > 0) == pytest.approx(0.1 * limit, rel=1e-6)
        return type(made.optimizer).__name__


def first_moment(made: Any, partitioned: bool) -> float:
    inner = getattr(made.optimizer, "optimizer", made.optimizer)
    total = torch.stack([state["exp_avg"].double().square().sum() for state in inner.state.values()]).sum()
    if partitioned:
        dist.all_reduce(total)
    return total.sqrt().item()


def rows(stage: int, dtype: str) -> set[str]:
    offloads = (False,) if stage == 0 else (False, True)
    return {one_row(stage, dtype, *row) for row in itertools.product((1, 2), offloads, (engines.sgd, engines.adamw))}


@pytest.mark.parametrize(
    ("stage", "dtype", "classes"),
    [
        (0, "fp32", {"SGD", "AdamW"}),
        (0, "bf16", {"FP16_UnfusedOptimizer"}),
        *((stage, dtype, {"DeepSpeedZeroOptimizer"}) for stage in (1, 2) for dtype in engines.DTYPES),
        *((3, dtype, {"DeepSpeedZeroOptimizer_Stage3"}) for dtype in engines.DTYPES),
    ],
)
def test_every_stage_dtype_and_way_to_accumulate(two_ranks: Ranks, stage: int, dtype: str, classes: set[str]) -> None:
    # Stage 0 with fp16 is left out: DeepSpeed 0.19.8 does not scale its loss, but unscales its gradients.
    if dtype == "fp16" and not all(two_ranks.run(has_fp16)):
        pytest.skip("torch computes nothing in fp16 on this CPU")
    assert two_ranks.run(rows, stage, dtype) == [classes, classes]


def other_classes() -> None:
    fp32_sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    for make_optimizer, gas in itertools.product((engines.sgd, engines.adamw), (1, 2)):
        assert one_row(1, "bf16", gas, False, make_optimizer, **fp32_sums) == "BF16_Optimizer"
        assert one_row(2, "bf16", gas, False, make_optimizer, **fp32_sums) == "DeepSpeedZeroOptimizer"
        assert one_row(3, "bf16", gas, False, make_optimizer, **fp32_sums) == "DeepSpeedZeroOptimizer_Stage3"
    assert one_row(0, "bf16", 1, False, fused_adam) == "FP16_Optimizer"


def fused_adam(groups: Any) -> torch.optim.Optimizer:
    """Taken for DeepSpeed's FusedAdam, whose kernels would have to be compiled; steps as torch's."""
    from deepspeed.ops.adam import FusedAdam

    class Fused(FusedAdam, torch.optim.AdamW):
        def __init__(self, params: Any) -> None:
            torch.optim.AdamW.__init__(self, params, lr=0.01)

        step = torch.optim.AdamW.step
        zero_grad = torch.optim.AdamW.zero_grad

    return Fused(groups)


def test_classes_for_float32_sums_and_for_fused_adam(two_ranks: Ranks) -> None:
    two_ranks.run(other_classes)


def sub_groups() -> None:
    with engine(config(3)) as made:
        handle = attach(made, distclip.ClipNorm(1.0))
        counts = counted(handle)
        Applied(made, 0)
        sizes = [sum(p.partition_numel() for p in group) for group in made.optimizer.fp16_groups]
        assert len(sizes) >= 3
        assert all(p.ds_tensor.numel() < p.ds_numel for p in made.module.parameters())
        assert counts == [1]


def test_zero_3_really_partitions_into_several_sub_groups(two_ranks: Ranks) -> None:
    two_ranks.run(sub_groups)


# --- every policy ----------------------------------------------------------------------------------------------------

Oracle = Callable[[list[Tensor], list[Tensor], float], "list[Tensor]"]

PLAIN: list[tuple[Any, Oracle]] = [
    *(
        (lambda norm, p=p: distclip.ClipNorm(0.5 * norm(p), p), lambda g, w, n, p=p: halved(g, p))
        for p in (1.0, 2.0, 3.0, 8.0, math.inf)
    ),
    (lambda norm: distclip.ClipTensorNorm(1.0), lambda g, w, n: reference.clip_tensor_norm(g, 1.0)),
    (lambda norm: distclip.ClipTensorNorm(1.0, 3.0), lambda g, w, n: reference.clip_tensor_norm(g, 1.0, 3.0)),
    (lambda norm: distclip.ClipTensorNorm(0.5, math.inf), lambda g, w, n: reference.clip_tensor_norm(g, 0.5, math.inf)),
    (lambda norm: distclip.ClipBlockRMS(0.1), lambda g, w, n: reference.clip_block_rms(g, 0.1)),
    (lambda norm: distclip.ClipValue(0.05), lambda g, w, n: reference.clip_value(g, 0.05)),
    (lambda norm: distclip.AGC(0.1), lambda g, w, n: reference.agc(w, g, 0.1)),
    (lambda norm: distclip.AGC(0.1, unit_dim=-1), lambda g, w, n: reference.agc(w, g, 0.1, unit_dim=-1)),
    (lambda norm: distclip.AGC(0.1, norm_type=3.0), lambda g, w, n: reference.agc(w, g, 0.1, norm_type=3.0)),
    (lambda norm: distclip.AGC(0.1, exclude=("4.*",)), lambda g, w, n: [*reference.agc(w, g, 0.1)[:4], *g[4:]]),
]


def halved(grads: list[Tensor], norm_type: float) -> list[Tensor]:
    return reference.clip_norm(grads, 0.5 * reference.total_norm(grads, norm_type).item(), norm_type)


def all_policies(stage: int, dtype: str, offload: bool, more: dict[str, Any]) -> None:
    with engine(config(stage, dtype, offload=offload, **more)) as made:
        for index, (make_policy, oracle) in enumerate(PLAIN):
            engines.backward(made, index, dtype)
            grads, weights = engines.gradients(made), engines.masters(made)
            policy = make_policy(lambda p, grads=grads: norm_of(grads, p))
            handle = attach(made, policy)
            counts = counted(handle)
            made.step()
            update = {name: (weights[name] - after) / engines.LR for name, after in engines.masters(made).items()}
            expected = oracle(list(grads.values()), list(weights.values()), norm_of(grads))
            assert any((e - g).abs().max() > 0.01 for e, g in zip(expected, grads.values(), strict=True)), policy
            try:
                check_applied(update, expected)
            except AssertionError as e:
                raise AssertionError(f"{policy}: {e}") from None
            assert counts == [0 if stage == 0 else 1]
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
def test_every_policy(two_ranks: Ranks, stage: int, dtype: str, offload: bool, more: dict[str, Any]) -> None:
    two_ranks.run(all_policies, stage, dtype, offload, more)


ADAPTIVE = {
    "autoclip": distclip.AutoClip(50.0, 3),
    "zclip": distclip.ZClip(z_thresh=0.5, warmup_steps=2, max_norm=8.0),
    "adagc": distclip.AdaGC(ratio=0.9, max_norm=2.0, beta=0.9, warmup_steps=2),
}
STEPS = 5


def adaptive_oracle(name: str, steps: list[Applied]) -> list[list[float]]:
    """What is left of the norm, or of the norm of every tensor, in each step."""
    norms = [norm_of(step.grads) for step in steps]
    if name == "autoclip":
        return [[n] for n in reference.autoclip(norms, 50.0, 3)]
    if name == "zclip":
        return [[n] for n in reference.zclip(norms, 0.5, 0.97, 2, 8.0)]
    each = [[g.norm().item() for g in step.grads.values()] for step in steps]
    return reference.adagc(each, 0.9, 2.0, 0.9, 2).tolist()


def adaptive(stage: int, name: str) -> dict[str, Any]:
    with engine(config(stage)) as made:
        handle = attach(made, ADAPTIVE[name])
        steps = [Applied(made, step) for step in range(STEPS)]
        left = adaptive_oracle(name, steps)
        found = [
            [u.norm().item() for u in step.update.values()] if name == "adagc" else [norm_of(step.update)]
            for step in steps
        ]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(left).float(), rtol=1e-5, atol=1e-5)
        before = torch.tensor([norm_of(step.grads) for step in steps])
        assert (torch.tensor([norm_of(step.update) for step in steps]) < 0.99 * before).sum() >= 2  # it did clip
        return handle.state_dict()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_policies_that_remember(two_ranks: Ranks, stage: int, name: str) -> None:
    first, second = two_ranks.run(adaptive, stage, name)
    kept = first["groups"]["all"]
    assert str(first) == str(second)  # the same on every rank
    if name == "adagc":
        assert list(kept["AdaGC"]["gamma"]) == [n for n, _ in engines.make_model().named_parameters()]


# --- the same norm as other wrappers ---------------------------------------------------------------------------------


def other_wrappers() -> list[float]:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    found: list[float] = []
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for wrap in (DistributedDataParallel, lambda m: fully_shard(m, mesh=mesh)):
        model = wrap(engines.make_model())
        engines.loss_of(model, *engines.batch(0, dist.get_rank())).backward()
        found.append(distclip.clip_grad_norm_(model, 1.0).item())
    for stage in range(4):
        with engine(config(stage)) as made:
            handle = attach(made, distclip.ClipNorm(1.0))
            Applied(made, 0)
            found.append(handle.report.total_norm.item())
    return found


def test_the_norm_is_that_of_ddp_and_fsdp2(two_ranks: Ranks) -> None:
    for found in two_ranks.run(other_wrappers):
        assert found == pytest.approx([norm_of(engines.whole_gradients(0))] * 6, rel=1e-6)


# --- loss scale, overflow, what is not finite ------------------------------------------------------------------------


def growth(stage: int, gas: int) -> None:
    """The scale doubles on every step, before the engine divides by it: by itself it halves the update."""
    scaling = {"enabled": True, "loss_scale": 0, "initial_scale_power": 8, "loss_scale_window": 1, "hysteresis": 1}
    for policy in (distclip.ClipNorm(1e9), distclip.ClipNorm(1.0), distclip.ClipValue(0.05), distclip.AGC(0.1)):
        with engine(config(stage, "bf16", gas) | {"bf16": {"enabled": False}, "fp16": scaling}) as made:
            handle = attach(made, policy)
            scales = []
            for index in range(3):
                scale = made.optimizer.loss_scale
                step = Applied(made, index, "fp16", gas, scale)
                scales.append(made.optimizer.loss_scale / scale)
                grads, weights = list(step.grads.values()), list(step.weights.values())
                if isinstance(policy, distclip.ClipValue):
                    expected = reference.clip_value(grads, 0.05)
                elif isinstance(policy, distclip.AGC):
                    expected = reference.agc(weights, grads, 0.1)
                else:
                    expected = reference.clip_norm(grads, policy.max_norm)
                check_applied(step.update, expected)
                assert handle.report.total_norm.item() == pytest.approx(norm_of(step.grads, policy.norm_type), rel=2e-7)
            assert 2.0 in scales


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_step_on_which_the_loss_scale_grows(two_ranks: Ranks, stage: int) -> None:
    if not all(two_ranks.run(has_fp16)):
        pytest.skip("torch computes nothing in fp16 on this CPU")
    two_ranks.run(growth, stage, 1)


def overflow(stage: int) -> None:
    scaling = {"enabled": True, "loss_scale": 0, "initial_scale_power": 20, "hysteresis": 1}
    with engine(config(stage) | {"fp16": scaling}) as made:
        handle = attach(made, distclip.AutoClip(50.0))
        start = str(handle.state_dict())
        skipped = 0
        while True:
            weights = engines.masters(made)
            scale = made.optimizer.loss_scale
            engines.train_step(made, 0, "fp16")
            if not made.optimizer.overflow:
                break
            skipped += 1
            assert made.optimizer.loss_scale == scale / 2
            assert not handle.report.finite
            assert str(handle.state_dict()) == start
            assert all(torch.equal(weights[n], after) for n, after in engines.masters(made).items())
        assert skipped >= 2
        assert handle.report.finite
        assert str(handle.state_dict()) != start


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_overflow_is_the_engines_and_leaves_the_state_alone(two_ranks: Ranks, stage: int) -> None:
    if not all(two_ranks.run(has_fp16)):
        pytest.skip("torch computes nothing in fp16 on this CPU")
    two_ranks.run(overflow, stage)


def poisoned(made: Any, dtype: str) -> None:
    """A step in which a NaN comes from the batch of rank 1."""
    inputs, targets = engines.batch(0, dist.get_rank())
    targets[0, 0] = math.nan if dist.get_rank() == 1 else 0.0
    made.backward(engines.loss_of(made, inputs, targets, engines.DTYPES[dtype]))
    made.step()


def nonfinite(stage: int, dtype: str, checks: bool) -> None:
    for offload in (False, True) if stage else (False,):
        for rule in ("raise", "skip", "zero"):
            settings = config(stage, dtype, offload=offload)
            if not checks:
                settings["bf16"]["check_grad_overflow"] = False
            with engine(settings) as made:
                handle = attach(made, distclip.AutoClip(), on_nonfinite=rule)
                engines.train_step(made, 1, dtype)
                before, state = engines.masters(made), str(handle.state_dict())
                if rule == "raise":
                    with pytest.raises(distclip.NonFiniteGradientError, match=r"the worst gradient"):
                        poisoned(made, dtype)
                else:
                    poisoned(made, dtype)
                    assert sorted(handle.report.nonfinite_parameters()) == sorted(
                        n for n, _ in made.module.named_parameters()
                    )
                assert str(handle.state_dict()) == state
                assert all(torch.equal(before[n], after) for n, after in engines.masters(made).items())
                if rule != "raise":
                    engines.train_step(made, 2, dtype)
                    assert handle.report.finite
                    assert any(not torch.equal(before[n], after) for n, after in engines.masters(made).items())


@pytest.mark.parametrize(
    ("stage", "dtype", "checks"),
    [
        (0, "fp32", True),
        (0, "bf16", True),
        (1, "fp32", True),
        (1, "bf16", False),  # DeepSpeed itself would apply a NaN
        (2, "bf16", False),
        (2, "bf16", True),
        (3, "bf16", True),
    ],
)
def test_a_nan_on_one_rank(two_ranks: Ranks, stage: int, dtype: str, checks: bool) -> None:
    two_ranks.run(nonfinite, stage, dtype, checks)


# --- attach, detach, bad input ---------------------------------------------------------------------------------------


def own_rule_comes_back(stage: int, dtype: str) -> None:
    settings = config(stage, dtype, gradient_clipping=0.5)
    with engine(settings) as made:
        step = Applied(made, 0, dtype)
        own = norm_of(step.update)
        assert own == pytest.approx(0.5, rel=1e-2)
        if dist.get_rank() == 0:
            with pytest.warns(UserWarning, match=r"gradient_clipping=0\.5.*the policy holds"):
                handle = attach(made, distclip.ClipNorm(0.25))
        else:
            handle = attach(made, distclip.ClipNorm(0.25))
        assert norm_of(Applied(made, 0, dtype).update) == pytest.approx(0.25, rel=1e-5)
        handle.detach()
        assert norm_of(Applied(made, 0, dtype).update) == pytest.approx(0.5, rel=1e-2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            handle = attach(made, distclip.ClipNorm(0.125))
        assert norm_of(Applied(made, 0, dtype).update) == pytest.approx(0.125, rel=1e-5)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_the_engines_own_rule_is_off_and_comes_back(two_ranks: Ranks, stage: int, dtype: str) -> None:
    two_ranks.run(own_rule_comes_back, stage, dtype)


def state_of(made: Any) -> tuple[Any, ...]:
    inner = getattr(made.optimizer, "optimizer", made.optimizer)
    hooks = (len(inner._optimizer_step_pre_hooks), len(inner._optimizer_step_post_hooks))
    own = (vars(made.optimizer).get("step"), getattr(made.optimizer, "clip_grad", None))
    return hooks, own, made._config.gradient_clipping


def bad_input() -> None:
    deepspeed = engines.load()
    with pytest.raises(ValueError, match=r"cannot attach to a Sequential: it is no engine.*deepspeed\.initialize"):
        attach(engines.make_model())
    with pytest.raises(ValueError, match="cannot attach to a NoneType"):
        attach(None)
    with (
        engine(config(0), make_optimizer=None) as made,
        pytest.raises(ValueError, match=r"it has no optimizer.*attach afterwards"),
    ):
        attach(made)
    with engine(config(2)) as made:
        before = state_of(made)
        with pytest.raises(ValueError, match=r"no behaviour has that name"):
            attach(made, on_nonfinite="ignore")
        with pytest.raises(ValueError, match=r"cannot exclude 'nothing'"):
            attach(made, distclip.AGC(exclude=("nothing",)))
        known = type(made.optimizer)
        made.optimizer.__class__ = type("NewZeroOptimizer", (known,), {})
        with pytest.raises(ValueError, match=r"cannot clip what NewZeroOptimizer steps.*DeepSpeedZeroOptimizer_Stage3"):
            attach(made)
        made.optimizer.__class__ = known
        made.optimizer.swap_optimizer = True
        with pytest.raises(ValueError, match="NVMe offload keeps gradients in files"):
            attach(made)
        made.optimizer.swap_optimizer = False
        assert state_of(made) == before
        handle = attach(made)
        attached = state_of(made)
        with pytest.raises(ValueError, match=r"it has a handle already.*detach"):
            attach(made)
        assert state_of(made) == attached != before
        handle.detach()
        assert state_of(made) == before
        for version in ("0.14.5", "0.20.0", "1.0"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(deepspeed, "__version__", version)
                with pytest.warns(UserWarning, match=rf"tested with DeepSpeed 0\.16\.9 to 0\.19\.8.*{version}"):
                    handle = attach(made)
                handle.detach()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attach(made).detach()  # one that is not set in the config is not worth a word


def test_bad_input_leaves_the_engine_as_it_was(two_ranks: Ranks) -> None:
    two_ranks.run(bad_input)
