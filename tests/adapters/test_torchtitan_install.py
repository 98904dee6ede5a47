"""What may happen before, between and after `install`, in torchtitan's own Trainer."""

from __future__ import annotations

import gc
import importlib.util
import math
import sys
import types
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

import distclip
from distclip import LayoutError, NonFiniteGradientError
from tests.adapters.test_torchtitan_trainer import (
    LAYOUTS,
    ONE_ULP,
    check_scaled,
    norms_of_all_stages,
    watched,
    whole_parameters,
)
from tests.support import reference
from tests.support.ranks import Ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None,
    reason="torchtitan is not installed (tests/peers.txt)",
)


def names_are_replaced() -> None:
    from tests.support import titan

    utils, Trainer = titan.dist_utils, titan.Trainer
    own, init = utils.clip_grad_norm_, Trainer.__init__
    early, late = types.ModuleType("early"), types.ModuleType("late")
    early.clip, sys.modules["early"] = own, early  # `from ... import clip_grad_norm_ as clip`
    installed = titan.install()
    late.clip = utils.clip_grad_norm_
    assert early.clip is utils.clip_grad_norm_ is not own
    with pytest.raises(ValueError, match=r"again: distclip\.adapters\.torchtitan does already"):
        titan.install(distclip.ZClip())
    assert early.clip is utils.clip_grad_norm_ is late.clip
    installed.remove()
    installed.remove()
    assert early.clip is utils.clip_grad_norm_ is own
    assert Trainer.__init__ is init

    # Who has imported it meanwhile gets torchtitan's own answer afterwards.
    weight = nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 2.0)
    assert late.clip([weight], 1.0).item() == 4.0
    torch.testing.assert_close(weight.grad, torch.full((4,), 0.5))
    # A module that was imported meanwhile follows a second `install`, too.
    with titan.install():
        late.clip, sys.modules["late"] = utils.clip_grad_norm_, late
    assert late.clip is own
    with titan.install():
        assert late.clip is utils.clip_grad_norm_ is not own
    del sys.modules["early"], sys.modules["late"]

    with pytest.raises(RuntimeError), titan.install():
        raise RuntimeError
    assert utils.clip_grad_norm_ is own
    for wrong in (
        lambda: titan.install(1.0),
        lambda: titan.install(on_nonfinite="stop"),
        lambda: titan.install(max_consecutive_skips=-1),
    ):
        with pytest.raises((TypeError, ValueError), match="cannot"):
            wrong()
        assert utils.clip_grad_norm_ is own
    titan.install().remove()  # the wrong ones claimed nothing


def test_its_function_is_replaced_under_every_name(four_titan_ranks: Ranks) -> None:
    four_titan_ranks.run(names_are_replaced)


def trainers_of_any_age() -> None:
    from tests.support import titan

    utils = titan.dist_utils

    with titan.trainer(titan.config()) as trained:
        trained.config.training.max_norm = 0.05
        titan.run_steps(trained)  # by its own rule

        with titan.install() as installed, watched(trained) as calls:
            titan.run_steps(trained)  # no policy: it need not know the trainer
            norm = math.hypot(*norms_of_all_stages(calls[0].before).values())
            torch.testing.assert_close(calls[0].norm.double().item(), norm, **ONE_ULP)
            check_scaled(calls[0], 0.05 / (norm + 1e-6))
            assert installed.report is None

        with titan.install(distclip.ClipTensorNorm(0.01)) as installed:
            with pytest.raises(ValueError, match=r"not those of a trainer .*`add\(trainer\)`"):
                titan.run_steps(trained)
            with pytest.raises(TypeError, match=r"cannot add .*without \['model_parts'"):
                installed.add(trained.model_parts[0])
            clipper = installed.add(trained)
            assert installed.add(trained) is clipper
            with watched(trained) as calls:
                titan.run_steps(trained)
            for name, before in calls[0].before.items():
                (expected,) = reference.clip_tensor_norm([before], 0.01)
                torch.testing.assert_close(calls[0].after[name], expected, rtol=3e-7, atol=0)
            assert installed.report is not None
            assert installed.report.clipped
            with pytest.raises(ValueError, match="this OptimizersContainer with another"):
                distclip.adapters.frameworks.claim(trained.optimizers, "another")
            some = list(trained.model_parts[0].parameters())[:2]
            with pytest.raises(ValueError, match="cannot clip these 2 parameters"):
                utils.clip_grad_norm_(some, 1.0)
            with pytest.raises(ValueError, match=r"norm_type=3.0: the policy .* ClipTensorNorm"):
                utils.clip_grad_norm_(trained.model_parts[0].parameters(), 1.0, 3.0)

        with titan.install() as installed, watched(trained) as calls:  # released before
            installed.add(trained)
            for max_norm in (math.inf, 0.0, 0.02, 0.01):
                trained.config.training.max_norm = max_norm
                titan.run_steps(trained)
                norm = math.hypot(*norms_of_all_stages(calls[-1].before).values())
                torch.testing.assert_close(calls[-1].norm.double().item(), norm, **ONE_ULP)
                check_scaled(calls[-1], min(1.0, max_norm / (norm + 1e-6)))
                assert installed.report is not None
                assert bool(installed.report.clipped) is (max_norm != math.inf)
            for max_norm in (-1.0, math.nan):
                trained.config.training.max_norm = max_norm
                with pytest.raises(ValueError, match="cannot clip with max_norm="):
                    titan.run_steps(trained)

        class OptimizersInBackwardContainer(type(trained.optimizers)):  # type: ignore[misc]
            """As torchtitan had it before 0.3."""

        trained.config.training.max_norm = 1.0
        trained.optimizers.__class__ = OptimizersInBackwardContainer
        with titan.install() as installed, pytest.raises(ValueError, match="during backward"):
            installed.add(trained)


def test_trainers_that_were_built_before(four_titan_ranks: Ranks) -> None:
    four_titan_ranks.run(trainers_of_any_age)


def nan_on_one_rank(trained: Any) -> None:
    if dist.get_rank() == 1:
        first = next(trained.model_parts[0].parameters())
        first.grad.to_local().view(-1)[0] = math.nan


def nonfinite_norms() -> None:
    from tests.support import titan

    def before_and_after(trained: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        before = whole_parameters(trained)
        with watched(trained, nan_on_one_rank):
            titan.run_steps(trained)
        return before, whole_parameters(trained)

    def unchanged(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
        return all(torch.equal(after[name], was) for name, was in before.items())

    with titan.trainer(titan.config()) as trained:
        trained.config.training.max_norm = 0.05
        titan.run_steps(trained)
        for fused in (True, False):
            for optimizer in trained.optimizers:
                for group in optimizer.param_groups:
                    group["fused"] = fused
            with titan.install(on_nonfinite="skip") as installed:
                installed.add(trained)
                assert unchanged(*before_and_after(trained)), f"fused={fused}"
                report = installed.report
                assert report is not None
                assert not report.finite
                before = whole_parameters(trained)
                titan.run_steps(trained)  # the next step is one
                assert not unchanged(before, whole_parameters(trained))
                assert all(p.isfinite().all() for p in whole_parameters(trained).values())
                # A step that raises leaves nothing behind for the next.
                failing = trained.optimizers.optimizers[0].register_step_pre_hook(fail)
                with pytest.raises(ZeroDivisionError):
                    before_and_after(trained)
                failing.remove()
                before = whole_parameters(trained)
                titan.run_steps(trained)
                assert not unchanged(before, whole_parameters(trained))
            with titan.install(distclip.SkipSpike(max_norm=0.0)) as installed:
                installed.add(trained)
                before = whole_parameters(trained)
                titan.run_steps(trained)
                assert unchanged(before, whole_parameters(trained)), f"vetoed, fused={fused}"
                assert installed.report is not None
                assert installed.report.skipped
        with titan.install(on_nonfinite="raise") as installed:
            installed.add(trained)
            with pytest.raises(NonFiniteGradientError, match=r"tok_embeddings\.weight"):
                before_and_after(trained)
        with titan.install(distclip.ZClip(), on_nonfinite="zero") as installed:
            installed.add(trained)
            with watched(trained, nan_on_one_rank) as calls:
                titan.run_steps(trained)
            assert all(not after.any() for after in calls[0].after.values())
        with titan.install() as installed:
            installed.add(trained)
            with watched(trained, nan_on_one_rank) as calls:
                titan.run_steps(trained)
            assert calls[0].norm.isnan()
            assert all(after.isnan().all() for after in calls[0].after.values())


def fail(*_: Any) -> None:
    raise ZeroDivisionError


def test_norms_that_are_not_finite(four_titan_ranks: Ranks) -> None:
    four_titan_ranks.run(nonfinite_norms)


def errors_of_a_call() -> None:
    from tests.support import titan

    clip = titan.dist_utils

    def call(**kwargs: Any) -> Tensor:
        return clip.clip_grad_norm_(list(trained.model_parts[0].parameters()), 0.05, **kwargs)

    installing = titan.install(on_nonfinite="skip", max_consecutive_skips=1)
    with installing as installed, titan.trainer(titan.config()) as trained:
        titan.run_steps(trained)
        assert call(error_if_nonfinite=True) > 0.9
        params = list(trained.model_parts[0].parameters())
        before = [p.grad.to_local().clone() for p in params]
        nan_on_one_rank(trained)
        with pytest.raises(NonFiniteGradientError, match=r"tok_embeddings.*`error_if_nonfinite=Fa"):
            call(error_if_nonfinite=True)
        for p, grad in zip(params[1:], before[1:], strict=True):
            assert torch.equal(p.grad.to_local(), grad)
        for p in params:
            p.grad = torch.ones_like(p)
        assert call().isfinite()

        # The step after the first of these does not come, and the second is an error.
        nan_on_one_rank(trained)
        assert call().isnan()
        with pytest.raises(NonFiniteGradientError, match="after 1 steps in a row"):
            call()
        for p in params:
            p.grad = torch.ones_like(p)
        weights = whole_parameters(trained)
        trained.optimizers.step()
        assert all(not torch.equal(p, weights[n]) for n, p in whole_parameters(trained).items())
        assert installed.report is not None


def test_error_if_nonfinite_and_steps_that_do_not_come(four_titan_ranks: Ranks) -> None:
    four_titan_ranks.run(errors_of_a_call)


def several_optimizers() -> None:
    """Two optimizers in torchtitan's container, and accumulated gradients."""
    from tests.support import titan

    made = titan.config()
    made.training.max_norm = 0.05
    made.training.global_batch_size = 2 * made.training.local_batch_size * dist.get_world_size()
    group = made.optimizer.param_groups[0]
    unfused = {**group.optimizer_kwargs, "fused": False}
    first = replace(group, pattern="attention", optimizer_name="Adam", optimizer_kwargs=unfused)
    made.optimizer.param_groups = [first, group]
    with titan.install(on_nonfinite="skip"), titan.trainer(made) as trained:
        assert [type(each).__name__ for each in trained.optimizers] == ["Adam", "AdamW"]
        with watched(trained) as calls:
            titan.run_steps(trained)
        assert len(calls) == 1
        assert trained.gradient_accumulation_steps == 2
        norm = math.hypot(*norms_of_all_stages(calls[0].before).values())
        torch.testing.assert_close(calls[0].norm.double().item(), norm, **ONE_ULP)
        check_scaled(calls[0], 0.05 / (norm + 1e-6))
        before = whole_parameters(trained)
        with watched(trained, nan_on_one_rank):
            titan.run_steps(trained)
        assert all(torch.equal(p, before[name]) for name, p in whole_parameters(trained).items())
        titan.run_steps(trained)
        assert not any(torch.equal(p, before[n]) for n, p in whole_parameters(trained).items())


def test_several_optimizers_in_its_container(four_titan_ranks: Ranks) -> None:
    four_titan_ranks.run(several_optimizers)


def state_in_checkpoints(folder: Path) -> None:
    from tests.support import titan

    def made() -> Any:
        config = titan.config(**LAYOUTS["pp x fsdp"])
        config.checkpoint.enable = True
        config.checkpoint.interval = 2
        return config

    policy = distclip.AdaGC(ratio=0.5, max_norm=0.05, warmup_steps=1)

    def step(trained: Any) -> dict[str, Tensor]:
        with watched(trained) as calls:
            titan.run_steps(trained)
        assert any(
            after.norm() < 0.9 * calls[0].before[name].norm()
            for name, after in calls[0].after.items()
        )
        return calls[0].after

    with titan.install(policy) as installed:
        with titan.trainer(made(), folder) as trained:
            step(trained), step(trained)
            assert trained.checkpointer.save(2)
            saved = flat(installed.add(trained).state_dict())
            expected = step(trained)
        with titan.trainer(made(), folder) as resumed:
            assert resumed.checkpointer.load()
            loaded = flat(installed.add(resumed).state_dict())
            assert loaded.keys() == saved.keys()
            assert any("layers." in name for name in loaded)
            for name, value in saved.items():
                assert torch.equal(torch.as_tensor(loaded[name]), torch.as_tensor(value)), name
            batches = resumed.batch_generator(resumed.dataloader)
            assert resumed.step == 2
            with watched(resumed) as calls:
                resumed.step += 1
                resumed.train_step(batches)
            for name, after in calls[0].after.items():
                torch.testing.assert_close(after, expected[name], rtol=0, atol=0, msg=name)
    # A run without the policy reads the same checkpoint.
    with titan.trainer(made(), folder) as without:
        assert "distclip" not in without.checkpointer.states
        assert without.checkpointer.load()
        with titan.install() as installed:
            with pytest.raises(LayoutError, match=r"over pipeline stages.*`add\(trainer\)`"):
                titan.run_steps(without)
            installed.add(without)
            assert "distclip" not in without.checkpointer.states  # nothing to remember
            titan.run_steps(without)
            assert installed.report is not None


def begins_without_a_state(folder: Path) -> None:
    from torch.distributed.checkpoint import CheckpointException

    from tests.support import titan

    def made(*excluded: str) -> Any:
        config = titan.config()
        config.checkpoint.enable = True
        config.checkpoint.interval = 2
        config.checkpoint.exclude_from_loading = list(excluded)
        return config

    with titan.trainer(made(), folder) as trained:
        titan.run_steps(trained, 2)
        trained.checkpointer.save(2)
    with titan.install(distclip.ZClip()) as installed:
        with (
            titan.trainer(made(), folder) as trained,
            pytest.raises(CheckpointException, match=r"Missing key.*distclip"),
        ):
            trained.checkpointer.load()
        with titan.trainer(made("distclip"), folder) as trained:
            assert trained.checkpointer.load()
            assert trained.step == 2
            titan.run_steps(trained)
            state = flat(installed.add(trained).state_dict())
            assert state["/groups/all/ZClip/num_steps"] == 1


def test_a_checkpoint_without_a_state_is_loaded_where_it_is_excluded(
    four_titan_ranks: Ranks, tmp_path: Path
) -> None:
    four_titan_ranks.run(begins_without_a_state, tmp_path)


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{path}/{key}").items()}


def test_what_a_policy_remembers_is_in_the_checkpoints(
    four_titan_ranks: Ranks, tmp_path: Path
) -> None:
    four_titan_ranks.run(state_in_checkpoints, tmp_path)


def several_trainers() -> None:
    from tests.support import titan

    with titan.install(distclip.ZClip(warmup_steps=2)) as installed:
        with titan.trainer(titan.config()) as first, titan.trainer(titan.config()) as second:
            titan.run_steps(first, 2)
            titan.run_steps(second)
            counts = [
                next(int(v) for k, v in state.items() if k.endswith("/num_steps"))
                for state in (flat(installed.add(one).state_dict()) for one in (first, second))
            ]
            assert counts == [2, 1]
            seen = [weakref.ref(first), weakref.ref(next(first.model_parts[0].parameters()))]
        del first, second
        gc.collect()  # the trainer
        gc.collect()  # what was kept for it
        assert [each() for each in seen] == [None, None]


def test_several_trainers(four_titan_ranks: Ranks) -> None:
    four_titan_ranks.run(several_trainers)


def container_folds() -> None:
    from tests.support import titan

    with titan.trainer(titan.config()) as trained:
        trained.config.training.max_norm = math.inf  # torchtitan's own rule only measures
        clipper = distclip.Clipper(trained.model_parts[0], distclip.ClipNorm(0.05))
        handle = clipper.attach(trained.optimizers)
        factors: list[Tensor | None] = []
        inner: Optimizer = trained.optimizers.optimizers[0]
        inner.register_step_pre_hook(
            lambda optimizer, *_: factors.append(getattr(optimizer, "grad_scale", None))
        )
        norms = titan.run_steps(trained, 2)
        assert handle.report is not None
        torch.testing.assert_close(handle.report.total_norm.item(), norms[-1], rtol=1e-3, atol=0)
        assert len(factors) == 2
        assert all(factor is not None and factor > 1 for factor in factors)


def test_attach_folds_into_its_container(four_titan_ranks: Ranks) -> None:
    four_titan_ranks.run(container_folds)


def where_its_own_differs() -> None:
    from tests.support import titan

    utils = titan.dist_utils

    own = utils.clip_grad_norm_
    config = titan.config()
    config.training.dtype = "bfloat16"
    config.training.max_norm = math.inf
    with titan.trainer(config) as trained, titan.install() as installed:
        installed.add(trained)
        with watched(trained) as calls:
            titan.run_steps(trained)
        norm = math.hypot(*norms_of_all_stages(calls[0].before).values())
        torch.testing.assert_close(calls[0].norm.double().item(), norm, **ONE_ULP)
        assert calls[0].norm.dtype is torch.float32
        part = trained.model_parts[0]
        theirs = own(part.parameters(), math.inf, foreach=True)
        ours = utils.clip_grad_norm_(part.parameters(), math.inf, foreach=True)
        assert theirs.dtype is torch.bfloat16
        assert abs(theirs.item() / ours.item() - 1) > 1e-4

        # A parameter that nobody sharded, beside those that FSDP2 did.
        part.register_parameter("bias", nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)))
        part.bias.grad = torch.full_like(part.bias, 5.0)
        with pytest.raises(RuntimeError, match="mixed torch"):
            own(part.parameters(), 1.0, foreach=True)
        squares = [ours.item() ** 2, 75.0]
        ours = utils.clip_grad_norm_(part.parameters(), 1.0, foreach=True)
        torch.testing.assert_close(ours.item(), math.sqrt(sum(squares)), rtol=1e-6, atol=0)


def test_where_its_own_function_differs(four_titan_ranks: Ranks) -> None:
    four_titan_ranks.run(where_its_own_differs)
