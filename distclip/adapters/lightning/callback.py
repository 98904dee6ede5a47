"""Any policy in Lightning: a callback of its Trainer, and a function in the place of Fabric's."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from distclip.adapters import deepspeed
from distclip.adapters.frameworks import Framework, claim, import_framework, release
from distclip.clipper import Clipper
from distclip.policies import ClipNorm, Policy, check_policy
from distclip.report import Report
from distclip.training.wrappers import params_of, unwrapped

LIGHTNING = Framework("lightning", "2.6.6", "2.6.6", install="'distclip[lightning]'")
PYTORCH_LIGHTNING = LIGHTNING._replace(name="pytorch-lightning", install="pytorch-lightning")

Policies: TypeAlias = "Policy[Any] | Sequence[Policy[Any]]"
_OWNER = "distclip.adapters.lightning"
# Set by the adapter itself: where the gradients are, and what the parameters are from.
_OPTIONS = inspect.signature(Clipper).parameters.keys() - {
    *("model_or_parameters", "policy", "gradient", "modules"),
}

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Callback
elif find_spec("lightning") is None and find_spec("pytorch_lightning") is not None:
    _Callback = import_framework(PYTORCH_LIGHTNING, "pytorch_lightning").Callback
else:
    _Callback = import_framework(LIGHTNING, "lightning.pytorch").Callback


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
        **options: those of `Clipper`, such as `on_nonfinite`. With DeepSpeed only that one.

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
        _check_options(options)
        if metric is not None and not isinstance(cast(object, metric), str):
            raise TypeError(f"cannot log the norm as {metric!r}: pass a name, or None.")
        self.metric, self.options = metric, options
        self._clipped: list[_Clipped] = []
        self._stepping: _Clipped | None = None
        self._latest: Report | None = None
        self._plugin: Any = None
        self._module: Any = None
        self._saved: MutableMapping[Any, list[Any]] = weakref.WeakKeyDictionary()
        self._given: list[Any] | None = None  # by somebody, before there was a model

    def __reduce__(self) -> Any:
        """A copy, such as that of `ddp_spawn`, begins anew: what it clips is in another process."""
        return _restored, (type(self), self.policy, self.metric, self.options, self.state_dict())

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
        saved = self._snapshot()
        return {} if saved is None else {"optimizers": saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, on any number of ranks.

        Raises:
            ValueError: a state of other policies, parameters or optimizers; in `fit`, where it is
                not yet known which these are.
        """
        saved = state_dict["optimizers"]
        module = None if self._module is None else self._module()
        if module is None:
            self._given = saved
        else:
            self._saved[module] = saved
        if self._clipped:
            self._load(saved)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._module = weakref.ref(pl_module)
        if stage == "fit":
            _check_clips_alone(trainer, pl_module)

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
        self._stepping = next((each for each in self._clipped if each.steps(optimizer)), None)
        if self._stepping is None:
            raise ValueError(
                f"cannot clip in this step of {type(optimizer).__qualname__}: when the batch "
                f"began, it was none of `trainer.optimizers`. Return it from "
                f"`configure_optimizers`, or set `trainer.strategy.optimizers` before the epoch."
            )

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
        if [id(each.given) for each in self._clipped] != [*map(id, trainer.optimizers)]:
            self._keep()
            self._detach()
            self._attach(trainer, pl_module)

    def _attach(self, trainer: Any, pl_module: Any) -> None:
        self._module = weakref.ref(pl_module)
        policies = self._policies(len(trainer.optimizers))
        if len(policies) != len(trainer.optimizers):
            raise ValueError(
                f"cannot clip with {len(policies)} policies: `configure_optimizers` returned "
                f"{len(trainer.optimizers)} optimizers, and it is unclear which policy is for "
                f"which. Pass one policy for each, or one for all."
            )
        try:
            for optimizer, policy in zip(trainer.optimizers, policies, strict=True):
                self._clipped.append(_clip_in_steps(trainer, optimizer, policy, self.options))
            saved = self._saved.get(pl_module) if self._given is None else self._given
            if saved is not None:
                self._load(saved)
        except BaseException:
            self._detach()
            raise
        self._given = None
        self._plugin = trainer.precision_plugin
        _refuse_to_clip(self._plugin)

    def _detach(self) -> None:
        self._latest = self.report
        for each in self._clipped:
            each.remove()
        self._clipped, self._stepping = [], None
        if self._plugin is not None:
            vars(self._plugin).pop("clip_gradients", None)
            self._plugin = None

    def _keep(self) -> None:
        module = None if self._module is None else self._module()
        if self._clipped and module is not None:
            self._saved[module] = cast("list[Any]", self._snapshot())

    def _snapshot(self) -> list[Any] | None:
        if self._clipped:
            return [each.clipper.state_dict() for each in self._clipped]
        module = None if self._module is None else self._module()
        return self._given if module is None else self._saved.get(module, self._given)

    def _load(self, saved: list[Any]) -> None:
        if len(saved) != len(self._clipped):
            raise ValueError(
                f"cannot load the state of DistClip: it was saved for {len(saved)} optimizers, "
                f"and `configure_optimizers` returned {len(self._clipped)}. Train with the same "
                f"optimizers, or begin anew without the state."
            )
        for each, state in zip(self._clipped, saved, strict=True):
            each.clipper.load_state_dict(state)


def clip_gradients(
    fabric: Any,
    module: nn.Module,
    optimizer: Any,
    policy: Policy[Any] | None = None,
    *,
    scale: float | Tensor | None = None,
    **options: Any,
) -> Report:
    """Clips the gradients that an optimizer steps, in the place of `fabric.clip_gradients`.

    Call it after `fabric.backward` and before `optimizer.step()`. Gradients that are still scaled
    are unscaled as well. The first call makes a `Clipper`, which is kept as long as the optimizer;
    see `fabric_clipper`.

    Args:
        fabric: with which the module and the optimizer were set up.
        module, optimizer: what `fabric.setup` returned.
        policy: how large the gradients may be; `ClipNorm(1.0)` if omitted.
        scale: a factor that the gradients still need, as `Clipper.clip_` has it.
        **options: those of `Clipper`, such as `on_nonfinite`.

    Raises:
        ValueError: neither the module nor the optimizer was set up by Fabric; DeepSpeed; something
            else clips what the optimizer steps; what `Clipper` and its `clip_` raise.
        TypeError: `fabric` is none; an option that `Clipper` does not have.

    Collective: as `Clipper` in the first call, then one all-reduce of a few numbers; none where
        nothing is sharded.
    """
    clipper = fabric_clipper(fabric, module, optimizer, policy, **options)
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    return clipper.clip_(optimizer, scaler=scaler, scale=scale)


def fabric_clipper(
    fabric: Any,
    module: nn.Module,
    optimizer: Any,
    policy: Policy[Any] | None = None,
    **options: Any,
) -> Clipper:
    """The `Clipper` that `clip_gradients` uses with these arguments; for checkpoints.

    `fabric.save(path, {"model": model, "optimizer": optimizer, "clipper": clipper})`, and
    `fabric.load` likewise. With another policy or another module than in the call before it is made
    anew; a policy of the same class goes on with what the former one remembers.

    Args, Raises: as `clip_gradients`.

    Collective: as `Clipper`, where it is made.
    """
    _check_options(options)
    policy = ClipNorm(1.0) if policy is None else policy
    wrapped = _check_set_up(fabric, module, optimizer)
    inner = unwrapped([optimizer])[0]
    kept = _kept.get(inner)
    if kept is not None and kept.is_for(wrapped, policy, options):
        return kept.clipper
    made = _with_mesh(fabric.strategy, options)
    clipper = Clipper(params_of([optimizer]), policy, modules=wrapped, **made)
    if kept is None:
        claim(inner, f"{_OWNER}.clip_gradients")
    elif type(kept.policy) is type(policy):
        clipper.load_state_dict(kept.clipper.state_dict())
    _kept[inner] = _Kept(clipper, weakref.ref(wrapped), policy, options)
    return clipper


@dataclass
class _Clipped:
    """One optimizer whose steps clip.

    Attributes:
        given: as the Trainer has it.
        claimed: what `claim` was given: the optimizer, without a wrapper.
        params: what it stepped when it was found.
        clipper: with a state; a `Clipper`, or the handle of DeepSpeed's adapter.
        handle: with a report.
        logged: the latest report of which the norm was logged.
    """

    given: Any
    claimed: Any
    params: list[Tensor]
    clipper: Any
    handle: Any
    logged: Report | None = None

    def steps(self, optimizer: Any) -> bool:
        return optimizer is self.given or optimizer is self.claimed

    def has_changed(self) -> bool:
        now = params_of([self.given])
        return [*map(id, now)] != [*map(id, self.params)]

    def remove(self) -> None:
        if self.handle is self.clipper:
            self.handle.detach()
            return
        self.handle.remove()
        release(self.claimed)


@dataclass
class _Kept:
    """The Clipper of a Fabric optimizer, and the arguments that it was made with."""

    clipper: Clipper
    module: weakref.ref[nn.Module]
    policy: Policy[Any]
    options: dict[str, Any]

    def is_for(self, module: nn.Module, policy: Policy[Any], options: dict[str, Any]) -> bool:
        same = self.module() is module and self.options == options
        return same and type(self.policy) is type(policy) and self.policy == policy


_kept: MutableMapping[Optimizer, _Kept] = weakref.WeakKeyDictionary()


def _clip_in_steps(
    trainer: Any, optimizer: Any, policy: Policy[Any], options: dict[str, Any]
) -> _Clipped:
    model = trainer.model  # as the strategy has wrapped it
    if _is_engine(model):
        if unknown := sorted(options.keys() - {"on_nonfinite"}):
            raise ValueError(
                f"cannot clip with {unknown[0]}= under DeepSpeed: its gradients lie in partitions "
                f"that the adapter reads. Pass only `on_nonfinite`."
            )
        handle = deepspeed.attach(model, policy, **options)
        return _Clipped(optimizer, None, [], handle, handle)
    inner = unwrapped([optimizer])[0]
    params = params_of([optimizer])
    claim(inner, f"{_OWNER}.DistClip")
    try:
        made = _with_mesh(trainer.strategy, options)
        clipper = Clipper(params, policy, modules=model, **made)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return _Clipped(optimizer, inner, params, clipper, clipper.attach(optimizer, scaler))
    except BaseException:
        release(inner)
        raise


def _with_mesh(strategy: Any, options: dict[str, Any]) -> dict[str, Any]:
    """With ModelParallelStrategy's mesh; each tensor of a model may be on one of its axes only."""
    mesh: Any = options.get("mesh", getattr(strategy, "device_mesh", None))
    return {**options, "mesh": mesh}


def _restored(
    kind: type[DistClip],
    policy: Policies,
    metric: str | None,
    options: dict[str, Any],
    state: dict[str, Any],
) -> DistClip:
    made = kind(policy, metric=metric, **options)
    if state:
        made.load_state_dict(state)
    return made


def _check_options(options: dict[str, Any]) -> None:
    if unknown := sorted(options.keys() - _OPTIONS):
        raise TypeError(
            f"cannot clip with {unknown[0]}=: it is none of Clipper's options here, which are "
            f"{', '.join(sorted(_OPTIONS))}."
        )


def _check_clips_alone(trainer: Any, pl_module: Any) -> None:
    """Raises ValueError where the Trainer or the model clips in automatic optimization."""
    value = trainer.gradient_clip_val
    if value is not None and value > 0:
        raise ValueError(
            f"cannot clip with DistClip and Trainer(gradient_clip_val={value}): the gradients "
            f"would be clipped twice, and the norm of the second would be that of clipped ones. "
            f"Leave out one of the two."
        )
    hook = pl_module.configure_gradient_clipping
    source = str(getattr(hook, "__module__", ""))
    if not source.startswith(("lightning.", "pytorch_lightning.")):
        raise ValueError(
            f"cannot clip with DistClip: {type(pl_module).__qualname__} has its own "
            f"`configure_gradient_clipping`, and the gradients would be clipped twice. Remove the "
            f"method, or DistClip."
        )


def _refuse_to_clip(plugin: Any) -> None:
    """Lets Lightning's own clipping raise, which a model may call as `self.clip_gradients`."""

    def clip_gradients(optimizer: Any, clip_val: float = 0.0, *_: Any, **__: Any) -> None:
        if clip_val > 0:
            raise ValueError(
                f"cannot clip with `self.clip_gradients(..., gradient_clip_val={clip_val})`: "
                f"DistClip clips inside `optimizer.step()`, and the gradients would be clipped "
                f"twice. Remove the call, or DistClip."
            )

    vars(plugin)["clip_gradients"] = clip_gradients


def _check_set_up(fabric: Any, module: Any, optimizer: Any) -> nn.Module:
    """The module as the strategy has wrapped it."""
    if not hasattr(getattr(fabric, "strategy", None), "precision"):
        raise TypeError(
            f"cannot clip with a {type(fabric).__qualname__}: it is no Fabric, which knows how "
            f"gradients are scaled and sharded. Pass the Fabric that has set up the module; with "
            f"a Trainer use `DistClip`."
        )
    # Fabric's own wrapper keeps the strategy's one under a private name, and `.module` leads past.
    wrapped = getattr(module, "_forward_module", None)
    if wrapped is None and isinstance(optimizer, Optimizer) and not hasattr(optimizer, "optimizer"):
        raise ValueError(
            f"cannot clip the gradients of this {type(module).__qualname__}: Fabric has set up "
            f"neither it nor its optimizer, and ranks might train apart. Pass what "
            f"`fabric.setup(module, optimizer)` returned."
        )
    wrapped = module if wrapped is None else wrapped
    if _is_engine(wrapped):
        raise ValueError(
            "cannot clip here under DeepSpeed: its gradients lie in partitions, and are clipped in "
            "its own step. Call `distclip.adapters.deepspeed.attach(fabric.strategy.model, "
            "policy)` once after `fabric.setup`, and leave out `clip_gradients`."
        )
    return wrapped


def _is_engine(model: Any) -> bool:
    return hasattr(model, "seq_data_parallel_group")
