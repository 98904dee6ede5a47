"""`DistClip` in one process: what the Trainer does around the steps that it clips in."""

from __future__ import annotations

import importlib.util
import math
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip import AdaGC, AutoClip, ClipNorm, NonFiniteGradientError, SkipSpike, ZClip
from distclip.adapters.frameworks import claim, release
from distclip.monitoring.records import read_run
from tests.support import reference, trainers
from tests.support.trainers import LR, MAX_NORM, Net, norms_of, trainer, whole

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers"
)

POLICIES = {
    "zclip": ZClip(z_thresh=0.5, warmup_steps=2, max_norm=1e3),
    "autoclip": AutoClip(percentile=30),
    "adagc": AdaGC(warmup_steps=1),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with trainers.quiet():
        yield


def dist_clip(*args: Any, **kwargs: Any) -> Any:
    from distclip.adapters.transformers import DistClip

    return DistClip(*args, **kwargs)


def weights(made: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


class At:
    """A callback that calls a function before the step with that number, counted from 0."""

    def __new__(cls, step: int, act: Any, event: str = "on_pre_optimizer_step") -> Any:
        from transformers import TrainerCallback

        def run(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                act(kwargs["model"])

        return type("At", (TrainerCallback,), {event: run})()


def make_infinite(model: nn.Module) -> None:
    next(model.parameters()).grad.view(-1)[0] = math.inf


def is_untouched(made: Any) -> bool:
    inner = made.optimizer.optimizer
    hooks = [*inner._optimizer_step_pre_hooks, *inner._optimizer_step_post_hooks]
    names = {"_clip_grad_norm", "_get_grad_norm", "save_model"}
    clips = {"clip_grad_norm_", "clip_grad_value_"} & set(vars(made.accelerator))
    return not (hooks or clips or names & set(vars(made)) or "grad_scale" in vars(inner))


@pytest.mark.parametrize("max_grad_norm", [0, None, 1.0, 1e-3])
def test_the_trainer_neither_clips_nor_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_grad_norm: float | None
) -> None:
    from accelerate import Accelerator

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the Trainer measures")

    for name in ("clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_"):
        monkeypatch.setattr(torch.nn.utils, name, refuse)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", refuse)
    model = Net()
    made = trainer(
        str(tmp_path),
        [dist_clip(ClipNorm(MAX_NORM))],
        model,
        max_grad_norm=max_grad_norm,
        save_strategy="steps",
        save_steps=2,
    )
    made.train()
    expected, norms = whole([model.seen], [1] * 4)
    assert min(norms) > MAX_NORM
    assert norms_of(made) == pytest.approx(norms, rel=2e-6)
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-7)
    saved = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert saved.max_grad_norm == made.args.max_grad_norm == max_grad_norm
    assert is_untouched(made)


def test_the_norms_of_tensors_in_a_history(tmp_path: Path) -> None:
    clip = dist_clip(ClipNorm(MAX_NORM), tensor_norms=2)
    with distclip.History(tmp_path / "run") as history:
        keep = [At(i, lambda _: history.append(clip.report), "on_step_end") for i in range(1, 5)]
        made = trainer(str(tmp_path), [clip, *keep])
        made.train()
    run = read_run(history.path)
    assert run.steps.tolist() == [1, 2, 3, 4]
    assert run.tensors.rows.tolist() == [0, 2]
    assert run.tensors.names == tuple(name for name, _ in Net().named_parameters())
    together = np.linalg.norm(run.tensors.norms, axis=1)
    np.testing.assert_allclose(together, run.columns["total_norm"][[0, 2]], rtol=1e-6)
    with pytest.raises(ValueError, match="tensor_norms=0"):
        dist_clip(tensor_norms=0)


def test_one_warning_where_max_grad_norm_was_chosen(tmp_path: Path) -> None:
    made = trainer(str(tmp_path), [dist_clip(ClipNorm(MAX_NORM))], max_grad_norm=0.3)
    with pytest.warns(UserWarning, match=r"max_grad_norm=0.3 beside the policy ClipNorm"):
        made.train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*beside the policy")
        made.train()  # once is enough
    for chosen, policy in ((1.0, ClipNorm(MAX_NORM)), (0, ClipNorm(MAX_NORM)), (0.3, None)):
        made = trainer(str(tmp_path), [dist_clip(policy)], max_grad_norm=chosen, max_steps=1)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            made.train()
        assert not [each for each in seen if "beside the policy" in str(each.message)]


@pytest.mark.parametrize(("max_grad_norm", "limit"), [(0.3, 0.3), (0, math.inf), (None, math.inf)])
def test_without_a_policy_it_is_max_grad_norm(
    tmp_path: Path, max_grad_norm: float | None, limit: float
) -> None:
    clip = dist_clip()
    made = trainer(str(tmp_path), [clip], max_grad_norm=max_grad_norm, max_steps=1)
    made.train()
    assert clip.report.limit.item() == pytest.approx(limit)
    assert norms_of(made) == [clip.report.total_norm.item()]


def test_a_max_grad_norm_that_a_callback_changes(tmp_path: Path) -> None:
    limits: list[float] = []
    changes = [
        At(step, lambda _, to=to: setattr(made.args, "max_grad_norm", to), event)
        for step, to, event in (
            (0, 0.25, "on_substep_end"),
            (2, None, "on_step_end"),
            (2, 0.125, "on_substep_end"),
        )
    ]
    seen = [
        At(step, lambda _: limits.append(clip.report.limit.item()), "on_optimizer_step")
        for step in range(4)
    ]
    clip = dist_clip()
    made = trainer(
        str(tmp_path),
        [clip, *changes, *seen],
        num=16,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
    )
    made.train()
    assert limits == [0.5, 0.25, math.inf, 0.125]  # between two steps
    assert made.args.max_grad_norm == 0.125
    assert len(norms_of(made)) == 4
    assert is_untouched(made)


def test_added_or_removed_while_it_trains(tmp_path: Path) -> None:
    clip, model = dist_clip(ClipNorm(MAX_NORM)), Net()
    late = At(1, lambda _: made.add_callback(clip), "on_step_end")
    made = trainer(str(tmp_path), [late], model)
    with pytest.raises(RuntimeError, match=r"it began without this DistClip"):
        made.train()
    removing = At(2, lambda _: made.remove_callback(clip), "on_step_end")
    model = Net()
    made = trainer(str(tmp_path), [removing, clip], model, max_grad_norm=MAX_NORM)
    made.train()
    expected, norms = whole([model.seen], [1] * 4)
    assert norms_of(made) == pytest.approx(norms, rel=2e-6)  # the Trainer clipped the last ones
    assert clip.report.total_norm.item() == norms_of(made)[1]
    end = nn.utils.parameters_to_vector(expected.parameters()).detach()
    torch.testing.assert_close(weights(made).double(), end, rtol=1e-6, atol=1e-6)
    assert is_untouched(made)


def test_a_fused_optimizer_takes_the_coefficient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for optim in ("adamw_torch", "adamw_torch_fused"):
        clip = dist_clip(ClipNorm(MAX_NORM))
        made = trainer(str(tmp_path), [clip], optim=optim, max_steps=3)
        if optim == "adamw_torch_fused":

            def refuse(*_: Any, **__: Any) -> None:
                raise AssertionError("the gradients are written before the step")

            monkeypatch.setattr(distclip.Decision, "apply_", refuse)
        made.train()
        assert clip.report.clipped
        ends.append(weights(made))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", POLICIES)
def test_a_resumed_policy_has_the_same_bits(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "num": 12, "max_steps": 4}
    clip = dist_clip(POLICIES[name])
    made = trainer(str(tmp_path), [clip], **options)
    made.train()
    assert clip.report.clipped
    again = dist_clip(POLICIES[name])
    resumed = trainer(str(tmp_path), [again], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(made), weights(resumed))
    assert norms_of(made) == norms_of(resumed)
    assert torch.equal(clip.report.limit, again.report.limit)
    # Without the file the limit is another: the file is what made it the same.
    (tmp_path / "checkpoint-3" / "distclip.pt").unlink()
    anew = dist_clip(POLICIES[name])
    without = trainer(str(tmp_path), [anew], **options)
    with pytest.warns(UserWarning, match=r"There is no distclip.pt in "):
        without.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not torch.equal(clip.report.limit, anew.report.limit)


def test_resuming_from_the_last_checkpoint_and_from_a_broken_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trainer(str(tmp_path), [dist_clip(ZClip(warmup_steps=1))], **options).train()
    clip = dist_clip(ZClip(warmup_steps=1))
    trainer(str(tmp_path), [clip], num_train_epochs=2, num=8).train(resume_from_checkpoint=True)
    assert clip.report.limit < math.inf  # the first steps after a warm-up have one
    with pytest.raises(ValueError, match=r"cannot resume from .*distclip.pt: .*AdaGC"):
        trainer(str(tmp_path), [dist_clip(AdaGC())]).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-4" / "distclip.pt").write_bytes(b"no zip file")
    with pytest.raises(ValueError, match=r"cannot resume: .*distclip.pt cannot be read"):
        trainer(str(tmp_path), [dist_clip(ZClip())]).train(resume_from_checkpoint=True)


def test_a_second_train_goes_on_with_the_same_optimizer(tmp_path: Path) -> None:
    policy = AutoClip(percentile=10)
    clip = dist_clip(policy)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    made = trainer(str(tmp_path), [clip], model, optimizers=(optimizer, scheduler))
    made.train()
    first = norms_of(made)
    made.train()
    norms = [*first, *norms_of(made)]
    assert len(norms) == 8
    limits = reference.autoclip(norms, 10, policy.history)
    assert clip.report.limit.item() == pytest.approx(limits[-1], rel=1e-5)
    assert limits[-1] != pytest.approx(reference.autoclip(norms[4:], 10, 100)[-1], rel=1e-3)
    # Another Trainer has another optimizer, and begins anew.
    other = trainer(str(tmp_path), [clip], max_steps=1)
    other.train()
    assert clip.report.limit.item() == pytest.approx(norms_of(other)[0])


def test_two_trainers_in_turn(tmp_path: Path) -> None:
    clip = dist_clip(AutoClip(percentile=10))
    made = [trainer(str(tmp_path), [clip]) for _ in range(2)]
    norms: list[list[float]] = [[], []]
    for turn in (0, 1, 0, 1):
        made[turn].train()
        norms[turn] += norms_of(made[turn])
        limits = reference.autoclip(norms[turn], 10, clip.policy.history)
        assert clip.report.limit.item() == pytest.approx(limits[-1], rel=1e-5)
    assert len(norms[1]) == 8
    assert pickle.loads(pickle.dumps(clip)).policy == clip.policy


def test_model_init_begins_anew(tmp_path: Path) -> None:
    clip = dist_clip(AutoClip(percentile=10))
    made = trainer(str(tmp_path), [clip], model_init=Net, max_steps=1)
    for _ in range(2):
        made.train()
        assert clip.report.limit.item() == pytest.approx(norms_of(made)[0])


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_training_after_an_exception(tmp_path: Path, max_grad_norm: float | None) -> None:
    def stop(_: nn.Module) -> None:
        raise KeyError("stop")

    for event in ("on_substep_end", "on_pre_optimizer_step", "on_optimizer_step"):
        stopping = At(1, stop, event)
        clip, model = dist_clip(ClipNorm(MAX_NORM)), Net()
        made = trainer(
            str(tmp_path),
            [clip, stopping],
            model,
            max_grad_norm=max_grad_norm,
            gradient_accumulation_steps=2,
        )
        with pytest.raises(KeyError, match="stop"):
            made.train()
        assert is_untouched(made)
        assert made.args.max_grad_norm == max_grad_norm
        made.remove_callback(stopping)
        start, model.seen = weights(made).clone(), []
        again = Net()
        nn.utils.vector_to_parameters(start, again.parameters())
        made.train()
        expected, norms = whole([model.seen], [2, 2], model=again)
        assert norms_of(made) == pytest.approx(norms, rel=2e-6)
        end = nn.utils.parameters_to_vector(expected.parameters())
        torch.testing.assert_close(weights(made).double(), end.detach(), rtol=1e-6, atol=1e-7)
        # A new Trainer with the same optimizer, while the first is still there.
        new = trainer(
            str(tmp_path),
            [dist_clip(ClipNorm(MAX_NORM))],
            model,
            optimizers=(made.optimizer.optimizer, None),
        )
        new.train()


def test_something_else_that_clips(tmp_path: Path) -> None:
    two = [dist_clip(ClipNorm(MAX_NORM)), dist_clip(ZClip())]
    made = trainer(str(tmp_path), two)
    before = weights(made)
    with pytest.raises(ValueError, match=r"cannot train with 2 DistClip"):
        made.train()
    assert torch.equal(weights(made), before)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    claim(optimizer, "distclip.adapters.accelerate")
    made = trainer(str(tmp_path), two[:1], model, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=r"this SGD with distclip.adapters.transformers: distclip"):
        made.train()
    assert is_untouched(made)
    release(optimizer)
    made.train()
    assert two[0].report.clipped


def test_a_trainer_that_clips_in_its_own_steps(tmp_path: Path) -> None:
    from transformers import Trainer

    class Old(Trainer):
        max_norm = 1.0

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            norms.append(self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_norm))
            return loss

    norms: list[Tensor] = []
    clip = dist_clip(ClipNorm(MAX_NORM))
    made = trainer(str(tmp_path), [clip], make=Old)
    with pytest.raises(ValueError, match=r"transformers clips .* twice. Leave out this call in"):
        made.train()
    assert is_untouched(made)
    made.max_norm = math.inf  # only measures
    made.train()
    assert norms_of(made) == pytest.approx([norm.item() for norm in norms])
    made.remove_callback(clip)
    made.max_norm = 1.0
    made.train()
    assert norms_of(made) == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch_fused"])
def test_a_policy_vetoes_every_step(tmp_path: Path, optim: str) -> None:
    clip = dist_clip(SkipSpike(max_norm=0.0))
    made = trainer(str(tmp_path), [clip], optim=optim, max_steps=3)
    made.train()
    assert is_untouched(made)
    assert made.state.global_step == 3
    assert clip.report.skipped


@pytest.mark.parametrize("mode", ["skip", "zero", "raise", "propagate"])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch_fused"])
def test_a_gradient_that_is_not_finite(tmp_path: Path, mode: Any, optim: str) -> None:
    seen: list[Tensor] = []
    watch = [
        At(1, lambda model: seen.append(trainers.flat(model))),
        At(1, lambda model: seen.append(trainers.flat(model)), "on_optimizer_step"),
    ]
    clip = dist_clip(ClipNorm(MAX_NORM), on_nonfinite=mode)
    made = trainer(str(tmp_path), [At(1, make_infinite), clip, *watch], optim=optim, max_steps=3)
    if mode == "raise":
        with pytest.raises(NonFiniteGradientError, match=r"first.weight"):
            made.train()
        assert is_untouched(made)
        return
    made.train()
    assert norms_of(made)[1] == math.inf
    assert made.state.global_step == 3
    before, after = seen
    assert torch.equal(before, after) == (mode == "skip" or (mode, optim) == ("zero", "sgd"))
    assert weights(made).isfinite().all() == (mode != "propagate")
    assert made.lr_scheduler.last_epoch == 3  # the Trainer's scheduler goes on


def test_too_many_skips_in_a_row(tmp_path: Path) -> None:
    clip = dist_clip(ClipNorm(1.0), on_nonfinite="skip", max_consecutive_skips=1)
    spoil = [At(step, make_infinite) for step in range(3)]
    with pytest.raises(NonFiniteGradientError):
        trainer(str(tmp_path), [*spoil, clip]).train()


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch_fused"])
def test_under_a_grad_scaler(tmp_path: Path, optim: str) -> None:
    """accelerate makes one on accelerators only: here the same with one for the CPU."""
    from transformers import Trainer

    class Scaled(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    ends, models = [], []
    for make in (Scaled, Trainer):
        clip, model = dist_clip(ClipNorm(MAX_NORM)), Net()
        made = trainer(str(tmp_path), [clip], model, make=make, optim=optim)
        made.train()
        ends.append(weights(made))
        models.append(made)
        assert clip.report.clipped
    assert norms_of(models[0]) == pytest.approx(norms_of(models[1]), rel=1e-6)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)
    seen: list[Tensor] = []
    watch = [
        At(1, lambda model: seen.append(trainers.flat(model))),
        At(1, lambda model: seen.append(trainers.flat(model)), "on_optimizer_step"),
    ]
    spoiled = trainer(
        str(tmp_path),
        [At(1, make_infinite), dist_clip(ClipNorm(MAX_NORM)), *watch],
        make=Scaled,
        optim=optim,
    )
    spoiled.train()
    assert torch.equal(*seen)
    assert spoiled.accelerator.scaler.get_scale() == 512.0
    assert spoiled.lr_scheduler.last_epoch == (3 if optim == "sgd" else 4)
    assert is_untouched(spoiled)


def test_bf16(tmp_path: Path) -> None:
    model = Net()
    made = trainer(str(tmp_path), [dist_clip(ClipNorm(MAX_NORM))], model, bf16=True)
    made.train()
    _, norms = whole([model.seen], [1] * 4)
    assert norms_of(made) == pytest.approx(norms, rel=3e-2)
    assert norms_of(made) != pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize("own_optimizer", [False, True])
def test_a_smaller_batch_after_an_out_of_memory_error(tmp_path: Path, own_optimizer: bool) -> None:
    class Hungry(Net):
        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            if self.training and len(self.seen) == 1 and len(inputs) == 8:
                self.seen.clear()
                raise RuntimeError("CUDA out of memory.")
            return super().forward(inputs, labels)

    clip, model = dist_clip(ClipNorm(MAX_NORM)), Hungry()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)  # the same before and after the error
    made = trainer(
        str(tmp_path),
        [clip],
        model,
        num=16,
        optimizers=(sgd if own_optimizer else None, None),
        auto_find_batch_size=True,
        per_device_train_batch_size=8,
    )
    made.train()
    assert len(model.seen) > 2
    assert len(model.seen[0][0]) < 8
    assert clip.report.clipped
    assert is_untouched(made)


def test_evaluation_between_and_an_incomplete_accumulation(tmp_path: Path) -> None:
    model = Net()
    made = trainer(
        str(tmp_path),
        [dist_clip(ClipNorm(MAX_NORM))],
        model,
        num=10,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=trainers.samples(2),
        gradient_accumulation_steps=2,
    )
    made.train()
    made.evaluate()
    _, norms = whole([model.seen], [2, 2, 1])
    assert norms_of(made) == pytest.approx(norms, rel=2e-6)


def test_a_loss_over_the_items_of_all_micro_batches(tmp_path: Path) -> None:
    class Outputs(Net):
        def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            self.seen.append((inputs, inputs))
            return {"logits": self.second(self.first(inputs).tanh())}

    targets: list[Tensor] = []
    items: list[float] = []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        targets.append(labels)
        items.append(float(num_items_in_batch))
        return (10 * outputs["logits"] - labels).square().sum() / num_items_in_batch

    model = Outputs()
    made = trainer(
        str(tmp_path),
        [dist_clip(ClipNorm(MAX_NORM))],
        model,
        num=10,
        compute_loss_func=loss,
        gradient_accumulation_steps=2,
    )
    made.train()
    assert items == [12, 12, 12, 12, 6]
    seen = [(x, t) for (x, _), t in zip(model.seen, targets, strict=True)]
    # A mean over 6 elements in Net's loss, and 1 / 12 here: the same, where two are accumulated.
    _, norms = whole([seen], [2, 2, 1])
    assert norms_of(made) == pytest.approx(norms, rel=2e-6)


def test_create_optimizer_of_a_subclass(tmp_path: Path) -> None:
    from transformers import Trainer

    class Own(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            if self.optimizer is None:
                self.optimizer = torch.optim.SGD(self.model.second.parameters(), lr=LR)
            return self.optimizer

    clip = dist_clip(ClipNorm(MAX_NORM))
    made = trainer(str(tmp_path), [clip], make=Own)
    made.train()
    assert clip.report.clipped
    assert is_untouched(made)


def test_frozen_int8_weights(tmp_path: Path) -> None:
    model = Net()
    model.quantized = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    made = trainer(str(tmp_path), [dist_clip(ClipNorm(MAX_NORM))], model)
    made.train()
    _, norms = whole([model.seen], [1] * 4)
    assert norms_of(made) == pytest.approx(norms, rel=2e-6)


def test_a_trainer_with_a_train_of_its_own(tmp_path: Path) -> None:
    from transformers import Trainer

    from distclip.adapters.transformers import DistClipMixin

    class Own(Trainer):
        def train(self, resume_from_checkpoint: Any = None) -> Any:
            return self._inner_training_loop(self._train_batch_size, self.args)

    class Known(DistClipMixin, Own):
        pass

    with pytest.raises(RuntimeError, match=r"Derive a class, `class MyTrainer\(DistClipMixin"):
        trainer(str(tmp_path), [dist_clip(ClipNorm(MAX_NORM))], make=Own).train()

    class Both(DistClipMixin, Trainer):
        pass

    for make in (Known, Both):
        model = Net()
        made = trainer(str(tmp_path), [dist_clip(ClipNorm(MAX_NORM))], model, make=make)
        made.train()
        _, norms = whole([model.seen], [1] * 4)
        assert norms_of(made) == pytest.approx(norms, rel=2e-6)
        assert is_untouched(made)


def test_a_checkpoint_that_the_mixin_cannot_see(tmp_path: Path) -> None:
    """Among the keywords of a `train`, or chosen by one that calls the Trainer's."""
    from transformers import Trainer

    from distclip.adapters.transformers import DistClipMixin

    class Keywords(Trainer):
        def train(self, **kwargs: Any) -> Any:
            start = kwargs["resume_from_checkpoint"]
            return self._inner_training_loop(self._train_batch_size, self.args, start)

    class Chosen(Trainer):
        def train(self) -> Any:
            return super().train(self.args.resume_from_checkpoint)

    options: dict[str, Any] = {"save_strategy": "epoch"}
    trainer(str(tmp_path), [dist_clip(ZClip())], **options).train()
    last = str(tmp_path / "checkpoint-4")
    for base, given, chosen in (
        (Keywords, {"resume_from_checkpoint": last}, None),
        (Chosen, {}, last),
    ):
        made = trainer(
            str(tmp_path / base.__name__),
            [dist_clip(ZClip())],
            make=type(base.__name__, (DistClipMixin, base), {}),
            resume_from_checkpoint=chosen,
            num_train_epochs=2,
            **options,
        )
        made.train(**given)
        saved = torch.load(tmp_path / base.__name__ / "checkpoint-8" / "distclip.pt")
        assert saved["groups"]["all"]["ZClip"]["num_steps"] == 8


def test_trainers_without_it_are_as_before(tmp_path: Path) -> None:
    model = Net()
    made = trainer(str(tmp_path), [], model, max_grad_norm=MAX_NORM)
    made.train()
    expected, norms = whole([model.seen], [1] * 4)
    assert norms_of(made) == pytest.approx(norms, rel=2e-6)
    end = nn.utils.parameters_to_vector(expected.parameters()).detach()
    torch.testing.assert_close(weights(made).double(), end, rtol=1e-5, atol=1e-6)


def test_an_optimizer_that_steps_during_backward(tmp_path: Path) -> None:
    from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

    model = Net()
    layerwise = {p: torch.optim.SGD([p], lr=LR) for p in model.parameters()}
    dummy = LayerWiseDummyOptimizer(optimizer_dict=layerwise)
    made = trainer(str(tmp_path), [dist_clip(ClipNorm(MAX_NORM))], model, optimizers=(dummy, None))
    with pytest.raises(ValueError, match=r"cannot clip in the step of a AcceleratedOptimizer"):
        made.train()
    assert is_untouched(made)


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0))


class Measured:
    """A callback that measures before each step, in float64."""

    def __new__(cls, norms: list[float]) -> Any:
        from transformers import TrainerCallback

        def run(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
            norms.append(reference.total_norm(grads).item())

        return type("Measured", (TrainerCallback,), {"on_pre_optimizer_step": run})()


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_lora_and_gradient_checkpointing(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    norms: list[float] = []
    clip = dist_clip(AdaGC(max_norm=1e-3))
    made = Trainer(
        model,
        trainers.arguments(
            str(tmp_path),
            gradient_checkpointing=True,
            gradient_accumulation_steps=2,
            optim="adamw_torch_fused",
        ),
        train_dataset=[{"input_ids": t, "labels": t} for t in torch.randint(1, 32, (8, 6))],
        callbacks=[clip, Measured(norms)],
    )
    made.train()
    assert norms_of(made) == pytest.approx(norms, rel=1e-6)
    assert clip.report.clipped
    assert len(norms) == 2


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_the_sft_trainer_of_trl(tmp_path: Path) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = ["<pad>", "<eos>", "<unk>", *"abcdefgh"]
    rules = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rules, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    norms: list[float] = []
    clip = dist_clip(ClipNorm(0.01))
    made = SFTTrainer(
        tiny_llama(),
        SFTConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            per_device_train_batch_size=2,
            max_steps=2,
            max_length=8,
            save_strategy="no",
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"text": ["a b c d", "e f g h"] * 4}),
        processing_class=tokenizer,
        callbacks=[clip, Measured(norms)],
    )
    made.train()
    assert norms_of(made) == pytest.approx(norms, rel=1e-6)
    assert min(norms) > 0.01
    assert clip.report.clipped
