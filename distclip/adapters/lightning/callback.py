"""`DistClip`, the callback that users give to a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from distclip.adapters.frameworks import LIGHTNING, import_framework
from distclip.adapters.lightning.checks import check_clips_alone, check_options, refuse_to_clip
from distclip.adapters.lightning.clipped_optimizer import (
    ClippedOptimizer,
    clip_in_steps,
    optimizers_of,
)
from distclip.adapters.lightning.remembered import (
    Remembered,
    States,
    load_into,
    remembers_nothing,
)
from distclip.policies import ClipNorm, Policy, check_policy
from distclip.report import Report

PYTORCH_LIGHTNING = LIGHTNING._replace(name="pytorch-lightning")

_FROM_A_MODEL = ("log", "log_dict")  # which the Trainer sets on every callback, in each `fit`
Policies: TypeAlias = "Policy[Any] | Sequence[Policy[Any]]"

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Callback
elif find_spec("lightning") is None and find_spec("pytorch_lightning") is not None:
    _Callback = import_framework(PYTORCH_LIGHTNING, "pytorch_lightning", stacklevel=4).Callback
else:
    _Callback = import_framework(LIGHTNING, "lightning.pytorch", stacklevel=4).Callback


class DistClip(_Callback):
    """Clips inside every step of the optimizers that a Trainer trains with.

    `Trainer(callbacks=[DistClip(policy)])`, without `gradient_clip_val`. Each optimizer has a norm
    of its own, over the parameters that it steps, also in manual optimization. The gradients are
    clipped where the optimizer's step begins: after `on_before_optimizer_step`, and after each
    evaluation of a closure. What the policies remember is saved in checkpoints, and goes on in
    another `fit` of the same model.

    Args:
        policy: how large the gradients may be; `ClipNorm(1.0)` if omitted. A list has one for each
            optimizer, in the order of `configure_optimizers`.
        metric: the name under which the norm before clipping is logged after each step. It is the
            same on every rank, and needs no `sync_dist`. With several optimizers the second is
            logged as "grad_norm/1". None logs nothing.
        **options: those of `Clipper`, such as `on_nonfinite`. With DeepSpeed only that one and
            `tensor_norms`.

    Attributes:
        clippers: while `fit` runs, those of the optimizers.

    Raises:
        TypeError: an option that `Clipper` does not have.
        ValueError: in `fit`: the Trainer or the model clips as well; `policy` is a list of another
            length than there are optimizers; what `Clipper` raises.

    Collective: all ranks must have the callback. Each step of an optimizer makes one all-reduce of
        a few numbers; none where nothing is sharded.
    """

    def __init__(
        self, policy: Policies | None = None, *, metric: str | None = "grad_norm", **options: Any
    ) -> None:
        self.policy = ClipNorm(1.0) if policy is None else policy
        for each in self._policies(1):
            check_policy(each)
        check_options(options)
        if metric is not None and not isinstance(cast(object, metric), str):
            raise TypeError(f"cannot log the norm as {metric!r}: pass a name, or None.")
        self.metric, self.options = metric, options
        self._clipped: list[ClippedOptimizer] = []
        self._stepping: ClippedOptimizer | None = None
        self._latest: Report | None = None
        self._plugin: Any = None
        self._remembered = Remembered(None)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, such as that of `ddp_spawn`, begins anew: what it clips is in another process."""
        anew: dict[str, Any] = {"_clipped": [], "_stepping": None, "_latest": None, "_plugin": None}
        own = {name: value for name, value in vars(self).items() if name not in _FROM_A_MODEL}
        return {**own, **anew, "_remembered": self._states()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "_remembered": Remembered(state["_remembered"])})

    @property
    def state_key(self) -> str:
        return "distclip.DistClip"

    @property
    def report(self) -> Report | None:
        """Of the latest step, whichever optimizer's; None before the first."""
        latest = self._stepping or (self._clipped[0] if len(self._clipped) == 1 else None)
        return self._latest if latest is None else latest.handle.report or self._latest

    @property
    def reports(self) -> list[Report | None]:
        """Of the latest step of each optimizer, while `fit` runs."""
        return [each.handle.report for each in self._clipped]

    @property
    def clippers(self) -> list[Any]:
        return [each.clipper for each in self._clipped]

    def state_dict(self) -> dict[str, Any]:
        """What the policies remember; the same on every rank."""
        states = self._states()
        return {} if states is None else {"optimizers": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, on any number of ranks.

        Raises:
            ValueError: a state of other policies, parameters or optimizers; in `fit`, where it is
                not yet known which these are.
        """
        self._remembered.set(states := state_dict["optimizers"])
        if self._clipped:
            self._load(states)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._remembered.follow(pl_module, fits=stage == "fit")
        if stage == "fit":
            check_clips_alone(trainer, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._attach(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # What other callbacks have added in `on_fit_start` has states in the checkpoint, too.
        if any(each.has_changed() for each in self._clipped):
            self._detach()
            self._attach(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._follow(trainer, pl_module)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if not pl_module.automatic_optimization:  # else a step of the optimizer has begun
            self._follow(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        stepping = next((each for each in self._clipped if each.steps(optimizer)), None)
        if stepping is None and optimizer.param_groups:
            raise ValueError(
                f"cannot clip in this step of {type(optimizer).__qualname__}: when the batch "
                f"began, it was none of `trainer.optimizers`. Return it from "
                f"`configure_optimizers`, or set `trainer.strategy.optimizers` before the epoch."
            )
        if stepping is not None and not stepping.tells_of_steps:
            self._stepping = stepping

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for index, each in enumerate(self._clipped):
            report = each.handle.report
            if report is None or report is each.logged:
                continue  # no step: gradients are accumulated, or a scaler has left it out
            each.logged = report
            if self.metric is not None and not trainer.barebones:
                name = self.metric if len(self._clipped) == 1 else f"{self.metric}/{index}"
                pl_module.log(name, report.total_norm, on_step=True, on_epoch=False, batch_size=1)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._keep()
            self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._keep()
        self._detach()

    def _policies(self, num_optimizers: int) -> list[Policy[Any]]:
        if isinstance(self.policy, list | tuple):
            return list(cast("Sequence[Policy[Any]]", self.policy))
        return [cast("Policy[Any]", self.policy)] * num_optimizers

    def _follow(self, trainer: Any, pl_module: Any) -> None:
        """Clips in the steps of the optimizers that the Trainer has now."""
        if [id(each.given) for each in self._clipped] != [*map(id, optimizers_of(trainer))]:
            self._keep()
            self._detach()
            self._attach(trainer, pl_module, goes_on=True)

    def _attach(self, trainer: Any, pl_module: Any, goes_on: bool = False) -> None:
        self._remembered.follow(pl_module, fits=True)
        optimizers = optimizers_of(trainer)
        policies = self._policies(len(optimizers))
        if len(policies) != len(optimizers):
            raise ValueError(
                f"cannot clip with {len(policies)} policies: `configure_optimizers` returned "
                f"{len(optimizers)} optimizers, and it is unclear which policy is for "
                f"which. Pass one policy for each, or one for all."
            )
        try:
            for optimizer, policy in zip(optimizers, policies, strict=True):
                clipped = clip_in_steps(
                    trainer, optimizer, policy, self.options, self._set_stepping
                )
                self._clipped.append(clipped)
            if (states := self._remembered.get()) is not None:
                self._load(states, goes_on)
        except BaseException:
            self._detach()
            raise
        self._plugin = trainer.precision_plugin
        refuse_to_clip(self._plugin)

    def _set_stepping(self, stepping: ClippedOptimizer) -> None:
        self._stepping = stepping

    def _detach(self) -> None:
        self._latest = self.report
        for each in self._clipped:
            each.remove()
        self._clipped, self._stepping = [], None
        if self._plugin is not None:
            vars(self._plugin).pop("clip_gradients", None)
            self._plugin = None

    def _keep(self) -> None:
        if self._clipped:
            self._remembered.set([each.clipper.state_dict() for each in self._clipped])

    def _states(self) -> States | None:
        self._keep()
        return self._remembered.get()

    def _load(self, states: States, goes_on: bool = False) -> None:
        """Loads states; `goes_on`: those of this run, with optimizers of other parameters."""
        if all(map(remembers_nothing, states)):  # a run with another policy may go on from it
            return
        if len(states) != len(self._clipped):
            raise ValueError(
                f"cannot load the state of DistClip: it was saved for {len(states)} optimizers, "
                f"and `configure_optimizers` returned {len(self._clipped)}. Train with the same "
                f"optimizers, or begin anew without the state."
            )
        for each, state in zip(self._clipped, states, strict=True):
            load_into(each.clipper, state, self.state_key, goes_on)
