"""`DistClip` in real Trainers on two ranks, against one process in float64."""

from __future__ import annotations

import importlib.util
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from distclip.adapters import frameworks
from tests.support import lightning_runs as runs
from tests.support import reference
from tests.support.lightning_runs import LIMIT, LR, quietly, train_whole
from tests.support.ranks import Ranks, same_bits_everywhere

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="needs lightning"
)

CLOSE = {"rel": 3e-6}  # float32 weights after some steps, against float64


def clips_as_one_process(layouts: list[str], options: dict[str, Any]) -> None:
    modules = runs.modules()
    accumulate = options.get("accumulate_grad_batches", 1)
    for layout in layouts:
        whole = train_whole(3, modules.world_of(layout), accumulate)
        assert min(whole) > LIMIT
        with quietly():
            run = modules.Run(layout, **options).fit(3)
        assert run.norms == pytest.approx(whole, **CLOSE), layout
        assert run.logged == run.norms
        assert run.trainer.logged_metrics["grad_norm"].item() == run.norms[-1]
        assert same_bits_everywhere(run.reports[-1].total_norm)
        assert run.clip.clippers == []
        assert run.clip.report is run.reports[-1]


def test_every_strategy_clips_as_one_process(two_lightning_ranks: Ranks) -> None:
    layouts = ["single", "ddp", "fsdp", "fsdp_flat", "fsdp2", "tp"]
    two_lightning_ranks.run(clips_as_one_process, layouts, {"log_every_n_steps": 1})


def test_gradients_are_accumulated_first(two_lightning_ranks: Ranks) -> None:
    options = {"log_every_n_steps": 1, "accumulate_grad_batches": 2, "gradient_clip_val": 0}
    two_lightning_ranks.run(clips_as_one_process, ["ddp", "fsdp", "fsdp2"], options)


def incomplete_batches() -> None:
    """Five batches, two of which make a step: the last step has one."""
    modules = runs.modules()
    net = runs.make_net(torch.float64)
    batches = [batch for (batch,) in runs.whole_batches(5)]
    wanted = []
    for accumulated in (batches[:2], batches[2:4], batches[4:]):
        net.zero_grad()
        for batch in accumulated:
            inputs, targets = (torch.stack(each).double() for each in zip(*batch, strict=True))
            (runs.loss_of(net, inputs, targets) / 2).backward()
        grads = [p.grad for p in net.parameters()]
        wanted.append(reference.total_norm(grads).item())
        with torch.no_grad():
            for p, clipped in zip(net.parameters(), reference.clip_norm(grads, LIMIT), strict=True):
                p.sub_(LR * clipped)
    assert min(wanted) > LIMIT
    for layout in ("ddp", "fsdp2"):
        with quietly():
            run = modules.Run(layout, accumulate_grad_batches=2)
            run.trainer.fit(modules.net_for(layout), modules.loader(layout, 5))
        assert run.norms == pytest.approx(wanted, **CLOSE)


def test_the_last_step_accumulates_what_is_left(two_lightning_ranks: Ranks) -> None:
    two_lightning_ranks.run(incomplete_batches)


def scaled(fused: bool, layout: str) -> None:
    modules = runs.modules()
    whole = train_whole(3)
    with quietly():
        run = modules.Run(layout, plugins=[modules.amp()])
        run.fit(3, modules.Net(fused=fused))
    assert run.norms == pytest.approx(whole, rel=5e-3)
    assert run.trainer.precision_plugin.scaler.get_scale() == 1024
    assert same_bits_everywhere(run.reports[-1].total_norm)
    clipped = [report.coefficient.item() * report.total_norm.item() for report in run.reports]
    assert clipped == pytest.approx([LIMIT] * 3, rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_are_clipped_where_they_are_unscaled(
    two_lightning_ranks: Ranks, fused: bool
) -> None:
    two_lightning_ranks.run(scaled, fused, "ddp")


def overflow(fused: bool) -> None:
    """A step with an overflow on one rank is skipped on all, and the scale halves."""
    modules = runs.modules()

    class Overflows(modules.Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * math.inf if batch_idx == 1 and dist.get_rank() == 1 else loss

    with quietly():
        run = modules.Run("ddp", distclip.AutoClip(50.0), plugins=[modules.amp()])
        run.fit(3, Overflows(fused=fused))
        once = modules.Run("ddp", plugins=[modules.amp()]).fit(1, modules.Net(fused=fused))
    assert run.trainer.precision_plugin.scaler.get_scale() == 512
    finite = [norm for norm in run.norms if math.isfinite(norm)]
    assert len(finite) == 2
    assert finite[0] == once.norms[0]
    (saved,) = run.clip.state_dict()["optimizers"]
    assert saved["groups"]["all"]["AutoClip"]["num_steps"] == 2


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_is_skipped_on_every_rank(two_lightning_ranks: Ranks, fused: bool) -> None:
    two_lightning_ranks.run(overflow, fused)


def gan() -> None:
    """Two optimizers in manual optimization: each step clips its own gradients, and no other."""
    modules = runs.modules()
    seen: list[tuple[float, float, float]] = []

    class Gan(modules.Net):
        def __init__(self, closures: bool = False) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.closures = closures

        def configure_optimizers(self) -> Any:
            first = torch.optim.SGD(self.net[:2].parameters(), lr=LR)
            return first, torch.optim.SGD(self.net[2:].parameters(), lr=LR)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for index, optimizer in enumerate(self.optimizers()):
                self.toggle_optimizer(optimizer)
                params = [p for group in optimizer.param_groups for p in group["params"]]
                before = [p.detach().clone() for p in params]

                def closure(optimizer: Any = optimizer) -> None:
                    optimizer.zero_grad()
                    self.manual_backward(runs.loss_of(self.net, *batch))

                others = [p for p in self.parameters() if all(p is not q for q in params)]
                kept = [None if p.grad is None else p.grad.clone() for p in others]
                if self.closures:
                    optimizer.step(closure)
                else:
                    closure()
                    raw = reference.total_norm([p.grad for p in params]).item()
                    optimizer.step()
                    assert run.clip.report is run.clip.reports[index]
                    assert run.clip.report.total_norm.item() == pytest.approx(raw, rel=1e-6)
                moved = [(old - p.detach()) / LR for old, p in zip(before, params, strict=True)]
                limit = (0.25, 0.125)[index]
                norm = reference.total_norm(moved).item()
                assert run.clip.report.total_norm.item() > limit
                assert norm == pytest.approx(limit, rel=1e-4)
                for p, old in zip(others, kept, strict=True):
                    assert p.grad is old or torch.equal(p.grad, old)
                self.untoggle_optimizer(optimizer)
                seen.append(norm)

    for closures in (False, True):
        policies = [distclip.ClipNorm(0.25), distclip.ClipNorm(0.125)]
        with quietly():
            run = modules.Run("ddp_unused", distclip.adapters.lightning.DistClip(policies))
            run.fit(2, Gan(closures))
        logged = run.trainer.callback_metrics
        assert {"grad_norm/0", "grad_norm/1"} == set(logged)
        assert logged["grad_norm/1"].item() == run.clip.report.total_norm.item()
    assert len(seen) == 8


def test_each_of_two_optimizers_has_its_own_norm(two_lightning_ranks: Ranks) -> None:
    two_lightning_ranks.run(gan)


POLICIES = {
    "zclip": distclip.ZClip(warmup_steps=2, max_norm=5.0),
    "adagc": distclip.AdaGC(warmup_steps=2),
}


def resumed(layout: str, policy: str, folder: str) -> None:
    """Steps after a resume from a checkpoint are those of a run that was not interrupted."""
    modules = runs.modules()
    made = POLICIES[policy]
    path = f"{folder}/{layout}-{policy}.ckpt"

    def net() -> Any:  # Lightning cannot load a sharded state of an optimizer that has none
        return modules.net_for(layout, momentum=0.5)

    with quietly():
        whole = modules.Run(layout, made, max_epochs=2).fit(3, net())
        first = modules.Run(layout, made)
        first.save_to = path
        first.fit(3, net())
        rest = modules.Run(layout, made, max_epochs=2).fit(3, net(), ckpt_path=path)
    # Matrix products may depend on where in memory a tensor begins.
    assert first.norms + rest.norms == pytest.approx(whole.norms, rel=1e-6)
    assert len(rest.norms) == 3
    ended, wanted = numbers(rest.clip.state_dict()), numbers(whole.clip.state_dict())
    assert ended == pytest.approx(wanted, rel=1e-6)
    assert numbers(first.clip.state_dict()) != pytest.approx(wanted, rel=1e-3)


def numbers(state: Any, path: str = "") -> dict[str, float]:
    """Every number of a state, by where it is."""
    if isinstance(state, dict | list):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, part in items for k, v in numbers(part, f"{path}.{key}").items()}
    return {path: state.item() if isinstance(state, Tensor) else state}


def resumed_in_all(folder: str) -> None:
    # Not FSDP1 with `state_dict_type="full"`: torch 2.13 reads freed memory there on a CPU.
    for layout in ("ddp", "fsdp_sharded", "fsdp2"):
        for policy in POLICIES:
            resumed(layout, policy, folder)


def test_a_resumed_run_goes_on_as_if_it_had_not_ended(
    two_lightning_ranks: Ranks, tmp_path: Path
) -> None:
    two_lightning_ranks.run(resumed_in_all, str(tmp_path))


def refusals() -> None:
    """What would clip twice, or with an unclear policy, is an error on every rank."""
    modules = runs.modules()

    def fails(match: str, net: Any = None, clip: Any = None, **options: Any) -> None:
        run = modules.Run("ddp", clip, **options)
        with quietly(), pytest.raises(ValueError, match=match):
            run.fit(1, net)
        assert run.clip.clippers == []
        assert "clip_gradients" not in vars(run.trainer.precision_plugin)

    fails(r"cannot clip with DistClip and Trainer\(gradient_clip_val=0\.5\)", gradient_clip_val=0.5)

    class Own(modules.Net):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    fails(r"Own has its own `configure_gradient_clipping`", Own())

    class ByHand(modules.Net):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=0.0)
            self.clip_gradients(optimizer, gradient_clip_val=0.5)

    fails(r"`self\.clip_gradients\(\.\.\., gradient_clip_val=0\.5\)`.*clipped twice", ByHand())
    policies = [distclip.ClipNorm(1.0)] * 2
    fails(r"cannot clip with 2 policies: .*returned 1 optimizers", clip=modules.DistClip(policies))
    excluding = modules.DistClip(distclip.AGC(exclude=("haed",)))
    fails("cannot exclude 'haed'", clip=excluding)

    class Attached(modules.Net):
        def configure_optimizers(self) -> Any:
            made = super().configure_optimizers()
            frameworks.claim(made, "another adapter")
            return made

    fails("another adapter does already", Attached())
    with quietly(), pytest.raises(RuntimeError, match="more than one stateful callback"):
        modules.trainer("ddp", modules.DistClip(), modules.DistClip(distclip.AutoClip()))
    with pytest.raises(TypeError, match=r"cannot clip with gradient=: it is none of Clipper's"):
        modules.DistClip(gradient=lambda p: p.grad)
    with pytest.raises(TypeError):
        modules.DistClip(1.0)
    with pytest.raises(TypeError, match="cannot log the norm as 3"):
        modules.DistClip(metric=3)


def test_clipping_twice_is_an_error(two_lightning_ranks: Ranks) -> None:
    two_lightning_ranks.run(refusals)


class Stop(Exception):
    pass


def fits_again() -> None:
    """A second `fit` goes on, also after an exception; another model begins anew."""
    modules = runs.modules()
    policy = distclip.AutoClip(50.0)

    class Raises(modules.Net):
        at: int | None = 1

        def configure_optimizers(self) -> Any:
            self.kept = getattr(self, "kept", None) or super().configure_optimizers()
            return self.kept

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == self.at:
                raise Stop
            return super().training_step(batch, batch_idx)

    def steps_counted() -> int:
        (saved,) = run.clip.state_dict()["optimizers"]
        return int(saved["groups"]["all"]["AutoClip"]["num_steps"])

    net = Raises()
    with quietly():
        run = modules.Run("ddp", policy)
        with pytest.raises(Stop):
            run.fit(3, net)
        (optimizer,) = run.trainer.optimizers
        assert "step" not in vars(optimizer)
        assert "clip_gradients" not in vars(run.trainer.precision_plugin)
        assert steps_counted() == 1
        assert len(run.norms) == 1
        net.at = None
        run.fit(3, net)
        assert steps_counted() == 4
        run.trainer.test(net, modules.loader("ddp", 1), verbose=False)
        run.trainer.fit_loop.max_epochs += 1
        run.fit(3, net)
        assert steps_counted() == 7
        first = run.norms[0]
        run.trainer.fit_loop.max_epochs += 1
        run.fit(2, modules.Net())
        assert steps_counted() == 2
        assert run.norms[-2] == first
        run.trainer.fit_loop.max_epochs += 1
        run.fit(1, net)
        assert steps_counted() == 8
        copy = pickle.loads(pickle.dumps(run.clip))
        assert copy.state_dict().keys() == {"optimizers"}
        assert copy.policy == policy


def test_a_callback_serves_several_fits(two_lightning_ranks: Ranks) -> None:
    two_lightning_ranks.run(fits_again)


def nonfinite(mode: str) -> None:
    """An infinite gradient of one rank in the second step."""
    modules = runs.modules()

    class Infinite(modules.Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.before = self.net[0].weight.detach().clone()
            return loss * math.inf if batch_idx == 1 and dist.get_rank() == 1 else loss

    clip = modules.DistClip(on_nonfinite=mode)
    net = Infinite()
    with quietly():
        run = modules.Run("ddp", clip)
        if mode == "raise":
            with pytest.raises(distclip.NonFiniteGradientError, match=r"net\.0\.weight"):
                run.fit(2, net)
            assert len(run.norms) == 1
        else:
            run.fit(2, net)
            assert not run.reports[1].finite
            assert torch.equal(net.before, net.net[0].weight)
    if mode == "skip":
        assert net.net[0].weight.isfinite().all()


def vetoed() -> None:
    modules = runs.modules()
    net = modules.Net()
    before = [p.detach().clone() for p in net.parameters()]
    with quietly():
        run = modules.Run("ddp", modules.DistClip(distclip.SkipSpike(max_norm=0.0)))
        run.fit(2, net)
    assert all(report.skipped for report in run.reports)
    assert all(torch.equal(p, was) for p, was in zip(net.parameters(), before, strict=True))


def test_a_policy_vetoes_every_step(two_lightning_ranks: Ranks) -> None:
    two_lightning_ranks.run(vetoed)


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_on_nonfinite(two_lightning_ranks: Ranks, mode: str) -> None:
    two_lightning_ranks.run(nonfinite, mode)


def changing_optimizers(folder: str) -> None:
    """Layers that are unfrozen, optimizers that are replaced, and what else acts on a fit."""
    modules = runs.modules()
    from lightning.pytorch.callbacks import (
        BackboneFinetuning,
        EarlyStopping,
        ModelCheckpoint,
    )

    class Tuned(modules.Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*self.net)
            self.backbone = self.net[:2]

        def configure_optimizers(self) -> Any:
            trained = [p for p in self.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(trained, lr=LR)
            decay = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            return [optimizer], [decay]

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
            wanted.append(reference.total_norm([g for g in grads if g is not None]).item())

    for unfreeze_at in (0, 1):
        wanted: list[float] = []
        tuning = BackboneFinetuning(unfreeze_at, backbone_initial_lr=0.1, verbose=False)
        stopping = EarlyStopping("grad_norm", patience=5, verbose=False)
        saving = ModelCheckpoint(folder, monitor="grad_norm", every_n_train_steps=1)
        run_options = {"max_epochs": 3, "enable_checkpointing": True}
        with quietly():
            run = modules.Run("ddp", distclip.AdaGC(), tuning, stopping, saving, **run_options).fit(
                1, Tuned()
            )
        assert run.norms == pytest.approx(wanted, rel=1e-6)
        assert len(wanted) == 3
        (saved,) = run.clip.state_dict()["optimizers"]
        tensors = saved["groups"]["all"]["AdaGC"]["gamma"]
        assert set(tensors) == {f"net.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}


def test_parameters_and_optimizers_that_come_later(
    two_lightning_ranks: Ranks, tmp_path: Path
) -> None:
    two_lightning_ranks.run(changing_optimizers, str(tmp_path))


def optimizers_of_other_kinds() -> None:
    modules = runs.modules()

    class Closing(modules.Net):
        """LBFGS evaluates its closure several times, and sees clipped gradients each time."""

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            norms.append(reference.total_norm([p.grad for p in self.parameters()]).item())

    class Late(modules.Net):
        """No optimizer at first, and then another in each step."""

        def __init__(self, automatic: bool = False) -> None:
            super().__init__()
            self.automatic_optimization = automatic

        def configure_optimizers(self) -> list[Any]:
            return []

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.trainer.strategy.optimizers = [torch.optim.SGD(self.parameters(), lr=LR)]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            if self.automatic_optimization:
                return super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(runs.loss_of(self.net, *batch))
            norms.append(reference.total_norm([p.grad for p in self.parameters()]).item())
            optimizer.step()
            return None

    class Rarely(Late):
        """Steps with the second of three batches."""

        def configure_optimizers(self) -> Any:
            return modules.Net.configure_optimizers(self)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None: ...

        def training_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                super().training_step(batch, batch_idx)

    class Skips(modules.Net):
        """Leaves out a batch, which is a step without gradients, or none under a scaler."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    class Nothing(modules.Net):
        """Only runs its training steps."""

        def configure_optimizers(self) -> None: ...

    norms: list[float] = []
    with quietly():
        run = modules.Run("ddp").fit(2, Nothing())
        assert (run.trainer.global_step, run.norms, run.trainer.callback_metrics) == (2, [], {})
        run = modules.Run("ddp").fit(2, Closing())
        assert len(norms) == 6
        assert run.norms == [pytest.approx(norms[2], rel=1e-6), pytest.approx(norms[5], rel=1e-6)]
        norms.clear()
        run = modules.Run("ddp").fit(2, Late())
        assert run.norms == pytest.approx(norms, rel=1e-6)
        assert min(norms) > LIMIT
        with pytest.raises(ValueError, match=r"this step of SGD: when the batch began"):
            modules.Run("ddp").fit(1, Late(automatic=True))
        log = modules.Log()
        run = modules.Run("ddp", None, logger=log, log_every_n_steps=1, max_epochs=2)
        first, second = run.fit(3, Rarely()).norms
        assert log.norms == [
            first,
            first,
            second,
            second,
        ]  # Lightning keeps it until the epoch ends
        for plugins in ([], [modules.amp()]):
            run = modules.Run("single", distclip.AutoClip(50.0), plugins=plugins).fit(3, Skips())
            assert [norm for norm in run.norms if norm] == pytest.approx(
                [run.norms[0], run.norms[-1]]
            )
            (saved,) = run.clip.state_dict()["optimizers"]
            assert saved["groups"]["all"]["AutoClip"]["num_steps"] == 2
        tuned = modules.Run("ddp", None, overfit_batches=2, max_epochs=2, barebones=False)
        assert len(tuned.fit(4).norms) == 4
        bare = modules.Run("ddp", modules.DistClip(metric=None), barebones=False).fit(1)
        assert "grad_norm" not in bare.trainer.callback_metrics
    options: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing"))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        bare = modules.Run("single", None, barebones=True, **options).fit(1)
    assert len(bare.norms) == 1
    assert not [each for each in warned if "self.log" in str(each.message)]


def test_other_optimizers_and_options(two_lightning_ranks: Ranks) -> None:
    two_lightning_ranks.run(optimizers_of_other_kinds)


def lightning_itself() -> None:
    """What DistClip is in the place of, in Lightning 2.6.6: these raise, or are not offered."""
    modules = runs.modules()
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    def own(layout: str, net: Any = None, **options: Any) -> Any:
        made = modules.trainer(layout, **options)
        made.fit(net or modules.net_for(layout), modules.loader(layout, 2))
        return made

    with quietly():
        with pytest.raises(MisconfigurationException, match="'norm'` is currently not supported"):
            own("fsdp", gradient_clip_val=0.5)
        fused = modules.Net(fused=True)
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            own("ddp", fused, gradient_clip_val=0.5, plugins=[modules.amp()])
        manual = modules.Net()
        manual.automatic_optimization = False
        with pytest.raises(MisconfigurationException, match="not supported for manual"):
            own("ddp", manual, gradient_clip_val=0.5)
        weights = {}
        for layout in ("single", "ddp", "fsdp"):  # element by element: shards change nothing
            net = modules.net_for(layout)
            own(layout, net, gradient_clip_val=0.01, gradient_clip_algorithm="value")
            weights[layout] = sum(p.detach().double().sum() for p in net.parameters())
            if layout == "fsdp":
                dist.all_reduce(weights[layout])
        assert weights["fsdp"].item() == pytest.approx(weights["ddp"].item(), rel=1e-6)


def test_what_lightning_itself_clips(two_lightning_ranks: Ranks) -> None:
    two_lightning_ranks.run(lightning_itself)


def pytorch_lightning_users() -> None:
    """`import pytorch_lightning` has classes of its own, whose Trainer takes the same callback."""
    with quietly():
        import pytorch_lightning as pl

        modules = runs.modules()

        class Net(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = runs.make_net()

            training_step = modules.Net.training_step

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=LR)

        class Own(Net):
            def configure_gradient_clipping(self, *_: Any, **__: Any) -> None: ...

        def fit(net: Any, clip: Any, **options: Any) -> Any:
            made = pl.Trainer(
                accelerator="cpu",
                devices=2,
                strategy="ddp",
                callbacks=[clip],
                max_epochs=1,
                logger=False,
                use_distributed_sampler=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
                **options,
            )
            made.fit(net, modules.loader("ddp", 3))
            return made

        clip = modules.DistClip(distclip.ClipNorm(LIMIT))
        made = fit(Net(), clip)
        assert clip.report.total_norm.item() == pytest.approx(train_whole(3)[-1], **CLOSE)
        assert made.callback_metrics["grad_norm"] == clip.report.total_norm
        with pytest.raises(ValueError, match="Own has its own `configure_gradient_clipping`"):
            fit(Own(), modules.DistClip())
        with pytest.raises(ValueError, match=r"Trainer\(gradient_clip_val=1\.0\)"):
            fit(Net(), modules.DistClip(), gradient_clip_val=1.0)


def test_pytorch_lightning(two_lightning_ranks: Ranks) -> None:
    two_lightning_ranks.run(pytorch_lightning_users)


def resumed_with_a_backbone(folder: str) -> None:
    """States of layers that a callback adds in `on_fit_start`, after DistClip's, are restored."""
    modules = runs.modules()
    from lightning.pytorch.callbacks import BackboneFinetuning
    from lightning.pytorch.tuner import Tuner

    class Tuned(modules.Net):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = self.net[:2]

        def configure_optimizers(self) -> Any:
            trained = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.SGD(trained, lr=LR)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch:  # Lightning 2.6.6 leaves it frozen in a run that is resumed
                self.backbone.requires_grad_(True)

    policy = distclip.AdaGC(warmup_steps=1, beta=0.5)

    def tuned(max_epochs: int) -> Any:
        tuning = BackboneFinetuning(1, backbone_initial_lr=0.1, verbose=False)
        # Not DDP, which reduces no gradient of a layer that was frozen when it was made.
        return modules.Run("single", policy, tuning, max_epochs=max_epochs)

    path = f"{folder}/backbone-{dist.get_rank()}.ckpt"
    with quietly():
        whole = tuned(4).fit(2, Tuned())
        first = tuned(2)
        first.save_to = path
        first.fit(2, Tuned())
        rest = tuned(4).fit(2, Tuned(), ckpt_path=path)
    assert first.norms + rest.norms == pytest.approx(whole.norms, rel=1e-6)
    assert numbers(rest.clip.state_dict()) == pytest.approx(
        numbers(whole.clip.state_dict()), rel=1e-6
    )

    class Searched(modules.Net):
        learning_rate = LR

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    with quietly():  # a search of the learning rate counts no step
        run = modules.Run("single", distclip.AutoClip(50.0), default_root_dir=folder)
        net, dealt = Searched(), modules.loader("single", 3)
        Tuner(run.trainer).lr_find(net, dealt, num_training=3, update_attr=False)
        run.fit(3, net)
    assert run.norms[0] == pytest.approx(train_whole(1, 1)[0], **CLOSE)
    (saved,) = run.clip.state_dict()["optimizers"]
    assert saved["groups"]["all"]["AutoClip"]["num_steps"] == 3


def test_states_of_layers_that_other_callbacks_add(
    two_lightning_ranks: Ranks, tmp_path: Path
) -> None:
    two_lightning_ranks.run(resumed_with_a_backbone, str(tmp_path))


def manual_by_layout() -> None:
    """Two optimizers in manual optimization of shards, and of scaled gradients."""
    modules = runs.modules()

    class Two(modules.Net):
        def __init__(self, fused: bool, **options: Any) -> None:
            super().__init__(**options)
            self.automatic_optimization, self.fused = False, fused

        def configure_optimizers(self) -> Any:
            halves = (self.net[:2].parameters(), self.net[2:].parameters())
            return [torch.optim.SGD(half, lr=LR, fused=self.fused) for half in halves]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                self.zero_grad()
                self.manual_backward(runs.loss_of(self.net, *batch))
                optimizer.step()

    def norms(layout: str, fused: bool, *plugins: Any) -> list[float]:
        net = Two(fused, shard="fsdp2" if layout == "fsdp2" else "")
        with quietly():
            run = modules.Run(layout, distclip.ClipNorm(LIMIT), plugins=list(plugins)).fit(2, net)
        kept.append([report.total_norm.item() for report in run.clip.reports or run.reports])
        logged = run.trainer.callback_metrics
        return [logged["grad_norm/0"].item(), logged["grad_norm/1"].item()]

    kept: list[list[float]] = []
    wanted = norms("ddp", False)
    assert min(wanted) > LIMIT
    assert norms("ddp", True) == pytest.approx(wanted, rel=1e-5)
    assert norms("fsdp2", False) == pytest.approx(wanted, rel=1e-5)
    for fused in (False, True):
        assert norms("ddp", fused, modules.amp()) == pytest.approx(wanted, rel=1e-2)


def test_two_optimizers_on_shards_and_under_a_loss_scale(two_lightning_ranks: Ranks) -> None:
    two_lightning_ranks.run(manual_by_layout)
