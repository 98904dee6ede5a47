"""What `DistClip` remembers from one fit to the next, and between optimizers of one fit."""

from __future__ import annotations

import copy
import importlib.util
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import distclip
from tests.support import lightning_runs as runs
from tests.support import reference
from tests.support.lightning_runs import LIMIT, LR, quietly
from tests.support.ranks import Ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="needs lightning"
)


def num_steps(clip: Any, index: int = 0) -> int:
    (state,) = clip.state_dict()["optimizers"][index]["groups"]["all"].values()
    return int(state["num_steps"])


def given_states(folder: str) -> None:
    """The states of a checkpoint count, not older ones that the callback was given."""
    modules = runs.modules()
    from lightning.pytorch.callbacks import BackboneFinetuning

    path = f"{folder}/{dist.get_rank()}.ckpt"
    policy = distclip.AutoClip(50.0)

    class Tuned(modules.Net):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = self.net[:2]

        def configure_optimizers(self) -> Any:
            trained = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.SGD(trained, lr=LR)

    with quietly():
        older = modules.Run("single", policy).fit(5).clip.state_dict()
        first = modules.Run("single", policy)
        first.save_to = path
        first.fit(2)

        clip = modules.DistClip(policy)
        clip.load_state_dict(older)
        clip = pickle.loads(pickle.dumps(clip))  # as `ddp_spawn` does
        modules.Run("single", clip, max_epochs=2).fit(2, ckpt_path=path)
        assert num_steps(clip) == 4

        clip = modules.DistClip(policy)
        clip.load_state_dict(older)
        tuning = BackboneFinetuning(0, verbose=False)  # attached again, with the layers it adds
        modules.Run("single", clip, tuning).fit(2, Tuned())
        assert num_steps(clip) == 7


def test_a_checkpoint_comes_before_what_was_given(
    two_lightning_ranks: Ranks, tmp_path: Path
) -> None:
    two_lightning_ranks.run(given_states, str(tmp_path))


def other_policies(folder: str) -> None:
    """A policy that remembers nothing leaves nothing to go on with; another one does."""
    modules = runs.modules()

    def path(policy: distclip.policies.Policy[Any]) -> str:
        return f"{folder}/{type(policy).__name__}-{dist.get_rank()}.ckpt"

    def saved(policy: distclip.policies.Policy[Any]) -> str:
        run = modules.Run("single", policy)
        run.save_to = path(policy)
        run.fit(2)
        return run.save_to

    with quietly():
        constant, learning = saved(distclip.ClipNorm(LIMIT)), saved(distclip.ZClip())
        run = modules.Run("single", distclip.ZClip(), max_epochs=2).fit(3, ckpt_path=constant)
        assert num_steps(run.clip) == 3
        run = modules.Run("single", distclip.ClipNorm(LIMIT), max_epochs=2)
        with pytest.raises(ValueError, match=r"\['ZClip'\] .*\[\"distclip\.DistClip\"\]`: delete"):
            run.fit(3, ckpt_path=learning)
        assert run.clip.clippers == []


def test_a_run_with_another_policy_goes_on_where_nothing_was_remembered(
    two_lightning_ranks: Ranks, tmp_path: Path
) -> None:
    two_lightning_ranks.run(other_policies, str(tmp_path))


def more_parameters() -> None:
    modules = runs.modules()

    class Unfreezes(modules.Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net[2:].parameters(), lr=LR)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                optimizer = torch.optim.SGD(self.parameters(), lr=LR)
                self.trainer.strategy.optimizers = [optimizer]

    with quietly():
        run = modules.Run("single", distclip.AdaGC(warmup_steps=1), max_epochs=2)
        run.fit(2, Unfreezes())
    assert num_steps(run.clip) == 4
    (saved,) = run.clip.state_dict()["optimizers"]
    assert len(saved["groups"]["all"]["AdaGC"]["gamma"]) == 6


def test_an_optimizer_of_more_parameters_takes_the_place_of_another(
    two_lightning_ranks: Ranks,
) -> None:
    two_lightning_ranks.run(more_parameters)


def raw_optimizers() -> None:
    """Steps without Lightning's wrapper call none of its hooks; the second's are left out."""
    modules = runs.modules()
    seen: list[bool] = []

    class Raw(modules.Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            halves = (self.net[:2], self.net[2:])
            return [torch.optim.SGD(half.parameters(), lr=LR) for half in halves]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers(use_pl_optimizer=False)
            for optimizer, factor in ((first, 1.0), (first, 1.0), (second, math.nan)):
                self.zero_grad()
                self.manual_backward(runs.loss_of(self.net, *batch) * factor)
                grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
                norm = reference.total_norm(grads).item()
                optimizer.step()
                report = run.clip.report
                assert report is run.clip.reports[optimizer is second]
                assert report.total_norm.item() == pytest.approx(norm, rel=1e-6, nan_ok=True)
                seen.append(bool(report.finite))

    with quietly():
        clip = modules.DistClip(distclip.AutoClip(50.0), on_nonfinite="skip")
        run = modules.Run("ddp_unused", clip)
        run.fit(2, Raw())
    assert seen == [True, True, False] * 2
    assert [num_steps(clip, index) for index in (0, 1)] == [4, 0]


def test_the_report_is_that_of_the_latest_step_of_any_optimizer(
    two_lightning_ranks: Ranks,
) -> None:
    two_lightning_ranks.run(raw_optimizers)


def copies_and_arguments() -> None:
    modules = runs.modules()

    class Half(modules.DistClip):
        """With arguments of its own."""

        def __init__(self, limit: float) -> None:
            self.half = limit / 2
            super().__init__(distclip.ClipNorm(self.half))

    copied = copy.deepcopy(Half(8.0))
    assert copied.half == 4.0
    assert copied.policy == distclip.ClipNorm(4.0)
    with pytest.raises(ValueError, match="on_nonfinite='ignore': no behaviour"):
        modules.DistClip(on_nonfinite="ignore")
    with pytest.raises(ValueError, match="max_consecutive_skips=-1"):
        modules.DistClip(max_consecutive_skips=-1)


def test_copies_of_subclasses_and_early_errors(two_lightning_ranks: Ranks) -> None:
    two_lightning_ranks.run(copies_and_arguments)
