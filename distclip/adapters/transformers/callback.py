"""`DistClip`, the callback that users give to a Trainer."""

from __future__ import annotations

import functools
import math
import os
import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from distclip import nonfinite
from distclip.adapters.frameworks import TRANSFORMERS, import_framework
from distclip.adapters.transformers import checkpoints
from distclip.adapters.transformers.clipping import Clipping, InEngine, InOptimizer
from distclip.arguments import as_interval
from distclip.clipper import Clipper
from distclip.nonfinite import OnNonFinite
from distclip.policies import ClipNorm, Policy, StatelessPolicy, check_policy
from distclip.report import Report
from distclip.sharding.layout import LayoutFunction
from distclip.training.wrappers import unwrapped

import_framework(TRANSFORMERS, "transformers", stacklevel=4)

from transformers import trainer_utils  # noqa: E402

from distclip.adapters.transformers.train_calls import FollowsTrain, wrap_train  # noqa: E402

DEFAULT_SKIPS = 20
# Of TrainingArguments, which do not say whether somebody chose it.
DEFAULT_MAX_GRAD_NORM = 1.0
# The Trainer's own clipping, and its measuring where it does not clip, which it calls on itself in
# each step. No public name comes between: `Accelerator.clip_grad_norm_` is not reached where
# gradients lie on several meshes, and there some ranks wait for others that have no gradient.
OWN_NORM = ("_clip_grad_norm", "_get_grad_norm")


class DistClip(FollowsTrain):
    """Clips in every step of a Trainer: `Trainer(..., callbacks=[DistClip(policy)])`.

    The policy holds: while `train()` runs, the Trainer neither clips nor measures, whatever
    `max_grad_norm` is, and `grad_norm` in its logs is the norm that distclip found. Gradients are
    clipped inside the optimizer's step, which takes the coefficient if it is fused; under a
    GradScaler before the step, in the pass that unscales them; under DeepSpeed by
    `distclip.adapters.deepspeed`. What the policy remembers is in each checkpoint folder, in
    "distclip.pt", and `resume_from_checkpoint` restores it. A second `train()` goes on with it if
    it goes on with the same optimizer.

    Where on_nonfinite="skip" leaves a step out, the Trainer counts the step, and its scheduler goes
    on. Where a GradScaler leaves it out, the scheduler waits, unless the optimizer is fused.

    Args:
        policy: how large the gradients may be. If omitted, `ClipNorm(args.max_grad_norm)`, which
            only measures where that is 0 or None, and follows callbacks that change it between
            steps.
        on_nonfinite, max_consecutive_skips, mesh, layouts, tensor_norms: as `Clipper` has them.
            Under DeepSpeed only `on_nonfinite` and `tensor_norms`.

    Attributes:
        report: of the latest step; None before the first.

    Raises:
        ValueError: in `train()`: the Trainer has two of these, something else clips the gradients
            of its optimizer, or a checkpoint holds the state of another policy.
        RuntimeError: in `train()`: the trainer is not known, see `DistClipMixin`; or the callback
            was added while it ran.

    Collective: each step as `Clipper.clip_`. As `train()` begins, what `Clipper` does at
        construction, and with `resume_from_checkpoint` a broadcast of the state from rank 0.
    """

    report: Report | None = None

    def __init__(
        self,
        policy: Policy[Any] | None = None,
        *,
        on_nonfinite: OnNonFinite = "propagate",
        max_consecutive_skips: int = DEFAULT_SKIPS,
        mesh: DeviceMesh | None = None,
        layouts: LayoutFunction | None = None,
        tensor_norms: bool | int = False,
    ) -> None:
        super().__init__()
        nonfinite.check_mode(on_nonfinite, max_consecutive_skips)
        if policy is not None:
            check_policy(policy)
        self.policy = policy
        self._on_nonfinite: OnNonFinite = on_nonfinite
        self._max_skips, self._mesh, self._layouts = max_consecutive_skips, mesh, layouts
        self._tensor_norms = as_interval("tensor_norms", tensor_norms)
        self._clipping: Clipping | None = None
        self._limit = math.inf  # without a policy
        self._ends = ExitStack()
        self._args_with_none: Any = None
        self._kept: list[_Kept] = []
        self._has_warned = False
        wrap_train()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer is None:
            raise RuntimeError(
                "cannot clip for this trainer: its `train` does not call that of "
                "`transformers.Trainer`, by which DistClip knows whose training begins. Derive a "
                "class, `class MyTrainer(DistClipMixin, ThatTrainer)`, and use it instead. If the "
                "DistClip was added after `train()` had begun, add it before."
            )
        self.end()  # with auto_find_batch_size, training begins again in the same `train()`
        try:
            self._begin(self.trainer, kwargs["optimizer"])
        except BaseException:
            self.end()
            raise

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._clipping is None:
            raise RuntimeError(
                "cannot clip in this training: it began without this DistClip, and the Trainer "
                "clips by its own `max_grad_norm`. Add it to the callbacks before `train()`."
            )
        if self.policy is None and _limit_of(args) != self._limit:
            self.end()
            self._begin(self.trainer, kwargs["optimizer"], resumes=False)
        if args.max_grad_norm is None:
            args.max_grad_norm = 0.0  # the Trainer asks whether it is greater than 0
            self._args_with_none = args

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._put_none_back()  # before anything is saved
        if self._clipping is not None:
            self._clipping.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._clipping is not None:
            self.report = self._clipping.after_step()

    def _begin(self, trainer: Any, optimizer: Optimizer, resumes: bool = True) -> None:
        policy = self.policy
        if policy is None:
            self._limit = _limit_of(trainer.args)
            policy = ClipNorm(self._limit)
        self._warn_if_chosen(trainer.args)
        self._clipping = clipping = self._make_clipping(trainer, optimizer, policy)
        self._ends.callback(clipping.end)
        if self.checkpoint is not None and resumes:
            remembers = not isinstance(policy, StatelessPolicy)
            checkpoints.load(clipping, self.checkpoint, remembers)
        elif kept := [each for each in self._kept if each.is_of(optimizer)]:
            clipping.load_state_dict(kept[0].state)
        self._ends.callback(self._keep, clipping, optimizer)
        self._replace_norm(trainer, clipping)
        self._save_with(trainer, clipping)

    def _make_clipping(self, trainer: Any, optimizer: Optimizer, policy: Policy[Any]) -> Clipping:
        if trainer.is_deepspeed_enabled:
            self._check_options_of_engine()
            engine, args = trainer.model_wrapped, trainer.args
            with warnings.catch_warnings():
                if engine.gradient_clipping() == args.max_grad_norm:  # "auto": see _warn_if_chosen
                    warnings.filterwarnings("ignore", "The config of DeepSpeed has gradient_clip")
                return InEngine(engine, policy, self._on_nonfinite, self._tensor_norms)
        clipper = Clipper(
            trainer.model_wrapped,
            policy,
            mesh=self._mesh,
            layouts=self._layouts,
            on_nonfinite=self._on_nonfinite,
            max_consecutive_skips=self._max_skips,
            tensor_norms=self._tensor_norms or False,
        )
        return InOptimizer(clipper, optimizer, trainer.accelerator)

    def _replace_norm(self, trainer: Any, clipping: Clipping) -> None:
        for name in OWN_NORM:
            if not hasattr(trainer, name):
                raise RuntimeError(
                    f"cannot clip for a {type(trainer).__qualname__}: it has no `{name}`, in whose "
                    f"place distclip puts its norm, and would clip a second time. distclip is "
                    f"tested with transformers {TRANSFORMERS.lowest} to {TRANSFORMERS.highest}."
                )
            self._put(trainer, name, self._norm_instead_of(trainer, name, clipping))

    def _norm_instead_of(self, trainer: Any, name: str, clipping: Clipping) -> Callable[..., Any]:
        def norm(*args: Any, **kwargs: Any) -> Any:
            if not any(each is self for each in trainer.callback_handler.callbacks):
                self.end()  # it was removed: from here on the Trainer clips by itself
                return getattr(trainer, name)(*args, **kwargs)
            return clipping.norm_to_log(*args, **kwargs)

        return norm

    def _save_with(self, trainer: Any, clipping: Clipping) -> None:
        """Saves in each checkpoint folder: the event `on_save` does not say which it is."""
        save_model = trainer.save_model

        @functools.wraps(save_model)
        def save_both(output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
            saved = save_model(output_dir, *args, **kwargs)
            folder = os.path.basename(os.path.normpath(output_dir or ""))
            if folder.startswith(trainer_utils.PREFIX_CHECKPOINT_DIR) and trainer.args.should_save:
                checkpoints.save(clipping, cast(str, output_dir))
            return saved

        self._put(trainer, "save_model", save_both)

    def _put(self, trainer: Any, name: str, function: Callable[..., Any]) -> None:
        attributes = cast("dict[str, Any]", vars(trainer))
        if name in attributes:
            self._ends.callback(attributes.__setitem__, name, attributes[name])
        else:
            self._ends.callback(attributes.pop, name, None)
        attributes[name] = function

    def end(self) -> None:
        """Leaves the trainer, its arguments and its optimizer as they were."""
        self._put_none_back()
        self._clipping = None
        self._ends.close()

    def _put_none_back(self) -> None:
        if self._args_with_none is not None:
            if self._args_with_none.max_grad_norm == 0:  # nobody else has changed it
                self._args_with_none.max_grad_norm = None
            self._args_with_none = None

    def _keep(self, clipping: Clipping, optimizer: Optimizer) -> None:
        inner = [weakref.ref(each) for each in unwrapped([optimizer])]
        others = [each for each in self._kept if each.is_alive() and not each.is_of(optimizer)]
        self._kept = [*others, _Kept(inner, clipping.state_dict())]

    def __getstate__(self) -> dict[str, Any]:
        """Without the references to optimizers, which cannot be pickled (Ray Tune does so)."""
        return {**vars(self), "_kept": []}

    def _check_options_of_engine(self) -> None:
        given = {
            "mesh": self._mesh is not None,
            "layouts": self._layouts is not None,
            "max_consecutive_skips": self._max_skips != DEFAULT_SKIPS,
        }
        if names := ", ".join(name for name, is_given in given.items() if is_given):
            raise ValueError(
                f"cannot clip under DeepSpeed with {names}: its engine says which ranks hold what, "
                f"and skips steps by a rule of its own. Leave out {names}."
            )

    def _warn_if_chosen(self, args: Any) -> None:
        is_chosen = args.max_grad_norm not in (None, 0, DEFAULT_MAX_GRAD_NORM)
        if is_chosen and self.policy is not None and not self._has_warned:
            self._has_warned = True
            if args.process_index == 0:
                warnings.warn(
                    f"TrainingArguments has max_grad_norm={args.max_grad_norm} beside the policy "
                    f"{self.policy}: the policy holds, and the Trainer does not clip while it "
                    f"trains.",
                    stacklevel=2,
                )


class _Kept(NamedTuple):
    """What a policy remembered as `train()` ended, for these optimizers."""

    optimizers: list[weakref.ref[Optimizer]]
    state: dict[str, Any]

    def is_of(self, optimizer: Optimizer) -> bool:
        inner = unwrapped([optimizer])
        return len(inner) == len(self.optimizers) and all(
            ref() is each for ref, each in zip(self.optimizers, inner, strict=True)
        )

    def is_alive(self) -> bool:
        return all(ref() is not None for ref in self.optimizers)


def _limit_of(args: Any) -> float:
    return args.max_grad_norm or math.inf
