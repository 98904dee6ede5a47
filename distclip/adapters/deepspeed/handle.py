"""Any policy on a DeepSpeed engine: ZeRO 0 to 3, in the place of its own clipping."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distclip.clipper import Clipper
from distclip.step import Decision

if TYPE_CHECKING:
    from distclip import Policy, Report
    from distclip.adapters.deepspeed.model_shards import Place
    from distclip.adapters.deepspeed.partitions import Partition

TESTED = ("0.16.9", "0.19.8")
_attached: WeakSet[Any] = WeakSet()


def attach(engine: Any, policy: Policy[Any] | None = None, on_nonfinite: str = "propagate") -> Handle:
    """Clips inside every `engine.step()`, by `policy` (`ClipNorm(1.0)` when omitted), until `.detach()`.

    The gradients are measured where the engine holds them when its optimizer's step begins, without the loss scale.
    The coefficient is applied where the inner optimizer reads them: in float32, unscaled, one group after the other.
    The engine's own `gradient_clipping` is off meanwhile, also after `load_checkpoint`.

    Where a norm is not finite, most of DeepSpeed's optimizers leave the step out by themselves, whatever
    `on_nonfinite` says ("raise" apart); it decides in float32 at stage 0, and in bf16 under ZeRO-1 and 2 where the
    config has `check_grad_overflow` off.

    Args:
        engine: what `deepspeed.initialize` returned, with an optimizer.

    Raises:
        ValueError: something that is no such engine, or has a handle already; an optimizer that is not known, or
            keeps its gradients where they cannot be read. The engine is left as it was.

    Collective: all ranks must attach: with pipeline stages, an all-gather of names over each pipeline. Each step one
        all-reduce of a few numbers, for all groups and sub-groups; none where nothing is sharded.
    """
    from distclip import ClipNorm

    _check(engine)
    return Handle(engine, ClipNorm(1.0) if policy is None else policy, on_nonfinite)


class Handle:
    """A policy on one engine; see `attach`.

    Attributes:
        report: of the latest step; None before the first.
    """

    def __init__(self, engine: Any, policy: Policy[Any], on_nonfinite: str) -> None:
        from distclip.adapters.deepspeed import partitions as where
        from distclip.adapters.deepspeed.model_shards import nothing_apart, places

        self._engine, self._optimizer, self._where = engine, engine.optimizer, where
        self._partitions: Sequence[Partition] = where.partitions(self._optimizer)
        self._places: Sequence[Place] = places(engine, self._partitions)
        layouts = {place.part.name: place.layout for place in self._places}
        alike = nothing_apart(engine, self._partitions)
        self._clipper = Clipper(
            [(place.part.name, self._weights(place)) for place in self._places],
            _by_name(policy, engine.module),
            mesh=_mesh(engine.device.type),
            layouts=None if alike else lambda name, _: layouts[name],
            gradient=self._gradient,
            on_nonfinite=on_nonfinite,
        )
        self._place_of = {id(p.param): place for p, place in zip(self._clipper.plan.params, self._places, strict=True)}
        self._decision: Decision | None = None
        self._scale = 1.0
        self._report: Report | None = None
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._switch_off()
        self._hooks = self._hook()
        _attached.add(engine)

    @property
    def report(self) -> Report | None:
        return self._plain.report if self._plain is not None else self._report

    def state_dict(self) -> dict[str, Any]:
        """What the policy remembers, the same on every rank: for `save_checkpoint(..., client_state=...)`."""
        return self._clipper.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, at any stage and on any number of ranks.

        Raises:
            ValueError: a state of another policy or of other parameters; nothing is loaded.
        """
        self._clipper.load_state_dict(saved)

    def detach(self) -> None:
        """Ends it; the engine clips by its own rule again."""
        for hook in self._hooks:
            hook.remove()
        if self._plain is not None:
            self._plain.remove()
        elif vars(self._optimizer).get("step") == self._outer_step:
            del self._optimizer.step
            if self._step != self._optimizer.step:  # somebody had put another in its place
                self._optimizer.step = self._step
        self._live = False
        self._engine._config.gradient_clipping = self._own_rule[0]
        if self._own_rule[1] is not None:
            self._optimizer.clip_grad = self._own_rule[1]
        _attached.discard(self._engine)

    def _switch_off(self) -> None:
        config, optimizer = self._engine._config, self._optimizer
        self._own_rule: tuple[float, float | None] = (config.gradient_clipping, getattr(optimizer, "clip_grad", None))
        # Unset, it is 1.0: only one that somebody chose is worth a word.
        if config._param_dict.get("gradient_clipping") and dist.get_rank() == 0:
            warnings.warn(
                f"The config of DeepSpeed has gradient_clipping={config.gradient_clipping} beside the policy "
                f"{self._clipper.policy}: the policy holds, and DeepSpeed's own rule is off until `.detach()`.",
                stacklevel=4,
            )
        config.gradient_clipping = 0.0

    def _hook(self) -> list[Any]:
        self._plain, self._live = None, True
        if isinstance(self._optimizer, torch.optim.Optimizer):
            scaler = getattr(self._engine, "torch_autocast_z0_gradscaler", None)
            self._plain = self._clipper.attach(self._optimizer, scaler)
            return []
        self._step = self._optimizer.step
        self._optimizer.step = self._outer_step
        inner = self._where.inner_optimizers(self._optimizer)
        before = [each.register_step_pre_hook(cast(Any, self._before)) for each in inner]
        return [*before, *(each.register_step_post_hook(self._after) for each in inner)]

    def _outer_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._live:  # another wrapper may go on calling this one
            self._decide()
        try:
            return self._step(*args, **kwargs)
        finally:
            self._decision = None

    @torch.no_grad()
    def _decide(self) -> None:
        optimizer = self._optimizer
        optimizer.clip_grad = 0.0  # load_checkpoint brings back what it was
        self._where.settle(optimizer)
        self._scale = self._where.loss_scale(optimizer)
        self._found = [partition.gradients() for partition in self._partitions]
        for param, place in zip(self._clipper.plan.params, self._places, strict=True):
            param.param.data = self._weights(place)  # offloading states moves them
        try:
            self._decision = self._clipper.decide(scale=None if self._scale == 1.0 else 1 / self._scale)
        finally:
            self._found = []
        self._report = self._decision.report

    def _gradient(self, weights: Tensor) -> Tensor | None:
        place = self._place_of[id(weights)]
        return None if place.at is None else self._found[place.at[0]][place.at[1]]

    def _weights(self, place: Place) -> Tensor:
        """The float32 weights that a gradient belongs to; no elements where this rank holds none."""
        if place.at is None:
            return torch.zeros(0, device=self._engine.device)
        partition = self._partitions[place.at[0]]
        if partition.stepped is (fragment := partition.fragments[place.at[1]]).param:
            return partition.stepped
        return fragment.of(partition.stepped.detach())

    @torch.no_grad()
    def _before(self, inner: torch.optim.Optimizer, *_: Any) -> None:
        """Applies the decision to what steps now: unscaled by the engine, by the scale that it has *now*."""
        if self._decision is None:
            return
        stepping = {id(p): p for group in inner.param_groups for p in group["params"] if p.grad is not None}
        grown = self._where.loss_scale(self._optimizer) / self._scale
        correction = None if grown == 1.0 else torch.tensor(grown, dtype=torch.float64, device="cpu")
        self._decision.apply_(lambda w: self._applied(self._place_of[id(w)], stepping), correction)
        skipped = self._decision.skip(False)
        if skipped is not None and bool(skipped):
            self._hidden = [(p, p.grad) for p in stepping.values() if p.grad is not None]
            for hidden in self._hidden:
                hidden[0].grad = None

    def _applied(self, place: Place, stepping: dict[int, Tensor]) -> Tensor | None:
        if place.at is None:
            return None
        partition = self._partitions[place.at[0]]
        fragment = partition.fragments[place.at[1]]
        if id(partition.stepped) not in stepping or not fragment.size or partition.stepped.grad is None:
            return None
        return fragment.of(partition.stepped.grad)

    def _after(self, *_: Any) -> None:
        for param, grad in self._hidden:
            param.grad = grad
        self._hidden = []


def _mesh(device_type: str) -> DeviceMesh | None:
    from distclip.adapters.deepspeed.model_shards import AXIS

    size = dist.get_world_size()
    return init_device_mesh(device_type, (size,), mesh_dim_names=(AXIS,)) if size > 1 else None


def _by_name(policy: Policy[Any], module: nn.Module) -> Policy[Any]:
    """The policy with the modules that it leaves out given by the names of their parameters."""
    from distclip.adapters.deepspeed.model_shards import module_names

    exclude = getattr(policy, "exclude", ())
    if not is_dataclass(policy) or not any(isinstance(each, nn.Module) for each in exclude):
        return policy
    names: list[str] = []
    for each in exclude:
        names += module_names(module, each) if isinstance(each, nn.Module) else [each]
    return replace(policy, exclude=tuple(names))  # type: ignore[call-arg]


def _check(engine: Any) -> None:
    if not hasattr(engine, "optimizer") or not hasattr(engine, "seq_data_parallel_group"):
        raise ValueError(
            f"cannot attach to a {type(engine).__name__}: it is no engine of DeepSpeed, and only an engine tells where "
            f"its gradients lie. Pass the first of what `deepspeed.initialize(...)` returns (with accelerate, what "
            f"`prepare` returns; with the transformers Trainer, `trainer.model_wrapped` once training has begun)."
        )
    if engine.optimizer is None or type(engine.optimizer).__name__ in ("DummyOptim", "DeepSpeedZeRoOffload"):
        raise ValueError(
            "cannot attach to this engine of DeepSpeed: it has no optimizer, so that no step would ever apply a "
            "gradient. Give `deepspeed.initialize` an optimizer, or one in its config, and attach afterwards."
        )
    if engine in _attached:
        raise ValueError(
            "cannot attach to this engine of DeepSpeed again: it has a handle already, and its gradients would be "
            "clipped twice. Call `.detach()` on the first handle."
        )
    version = import_module("deepspeed").__version__
    if not _numbers(TESTED[0]) <= _numbers(version) <= _numbers(TESTED[1]):
        warnings.warn(
            f"distclip is tested with DeepSpeed {TESTED[0]} to {TESTED[1]}, and this is {version}: compare "
            f"`handle.report.total_norm` with a run without sharding before you trust it.",
            stacklevel=3,
        )


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
