"""`attach`: a policy on one DeepSpeed engine."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from distclip.adapters.deepspeed.model_shards import (
    AXIS,
    ModelShard,
    is_replicated,
    model_shards,
    module_names,
)
from distclip.adapters.deepspeed.outer_step import OuterStepHook
from distclip.adapters.deepspeed.partitions import read_partitions
from distclip.adapters.frameworks import DEEPSPEED, claim, import_framework, release
from distclip.clipper import Clipper
from distclip.nonfinite import OnNonFinite
from distclip.policies import ClipNorm, Minimum, Policy, check_policy
from distclip.report import Report
from distclip.sharding.layout import Layout, LayoutFunction


def attach(
    engine: Any,
    policy: Policy[Any] | None = None,
    on_nonfinite: OnNonFinite = "propagate",
    *,
    tensor_norms: bool | int = False,
) -> Handle:
    """Clips inside every `engine.step()`, until `.detach()`.

    The gradients are measured where the engine holds them when its optimizer's step begins,
    without the loss scale. The coefficient is applied where the inner optimizer reads them: in
    float32, unscaled, one group after the other. The engine's own `gradient_clipping` is off
    meanwhile, also after `load_checkpoint`.

    Where a norm is not finite, most of DeepSpeed's optimizers skip the step themselves, whatever
    `on_nonfinite` says ("raise" apart). It decides in float32 at stage 0, and in bf16 under ZeRO-1
    and 2 where the config has `check_grad_overflow` off.

    Args:
        engine: what `deepspeed.initialize` returned, with an optimizer.
        policy: how large the gradients may be; `ClipNorm(1.0)` if omitted.
        on_nonfinite, tensor_norms: as `Clipper` has them.

    Raises:
        ValueError: `engine` is no such engine, or has a handle already; its optimizer is of an
            unknown class, or keeps gradients where they cannot be read. The engine is left as it
            was.

    Collective: all ranks must attach: with pipeline stages, an all-gather of names over each
        pipeline. Each step makes one all-reduce of a few numbers, for all groups and sub-groups;
        none where nothing is sharded.
    """
    _check_engine(engine)
    import_framework(DEEPSPEED, "deepspeed")
    policy = ClipNorm(1.0) if policy is None else policy
    check_policy(policy)
    claim(engine, "distclip.adapters.deepspeed")
    try:
        return Handle(engine, policy, on_nonfinite, tensor_norms)
    except BaseException:
        release(engine)
        raise


class Handle:
    """A policy on one engine; see `attach`."""

    def __init__(
        self,
        engine: Any,
        policy: Policy[Any],
        on_nonfinite: OnNonFinite,
        tensor_norms: bool | int = False,
    ) -> None:
        optimizer = engine.optimizer
        partitions = read_partitions(optimizer)
        shards = model_shards(engine, partitions)
        outer = None if isinstance(optimizer, Optimizer) else OuterStepHook(optimizer, partitions)
        weights = [one.weights() for one in partitions] if outer is None else outer.weights
        self._engine = engine
        self._clipper = Clipper(
            [(one.shard.name, _weights_of(one, weights, engine.device)) for one in shards],
            _exclude_by_name(policy, engine.module),
            mesh=_world_mesh(engine.device.type),
            layouts=None if is_replicated(engine, partitions) else _layouts(shards),
            gradient=None if outer is None else outer.gradient,
            on_nonfinite=on_nonfinite,
            tensor_norms=tensor_norms,
        )
        self._warn_if_clipped_twice()
        if outer is None:
            # For torch autocast in fp16; not in DeepSpeed 0.16.9.
            scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
            self._hook = self._clipper.attach(optimizer, scaler)
        else:
            outer.register(self._clipper.decide)
            self._hook = outer
        self._own_clipping: float = engine._config.gradient_clipping
        engine._config.gradient_clipping = 0.0

    @property
    def report(self) -> Report | None:
        """Of the latest step; None before the first."""
        return self._hook.report

    def state_dict(self) -> dict[str, Any]:
        """What the policy remembers: for `save_checkpoint(..., client_state=...)`.

        The same on every rank.
        """
        return self._clipper.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, at any stage and on any number of ranks.

        Raises:
            ValueError: a state of another policy or of other parameters. Nothing is loaded then.
        """
        self._clipper.load_state_dict(saved)

    def detach(self) -> None:
        """Ends it. The engine clips by its own rule again."""
        self._hook.remove()
        self._engine._config.gradient_clipping = self._own_clipping
        release(self._engine)

    def _warn_if_clipped_twice(self) -> None:
        config = self._engine._config
        # Unset, it is 1.0: only one that somebody chose is worth a warning.
        if config._param_dict.get("gradient_clipping") and dist.get_rank() == 0:
            warnings.warn(
                f"The config of DeepSpeed has gradient_clipping={config.gradient_clipping} beside "
                f"the policy {self._clipper.policy}: the policy holds, and DeepSpeed's own rule is "
                f"off until `.detach()`.",
                stacklevel=4,
            )


def _weights_of(
    shard: ModelShard, weights: Sequence[Sequence[Tensor]], device: torch.device
) -> Tensor:
    """The float32 weights of a tensor; no elements where this rank holds nothing of it."""
    if shard.index is None:
        return torch.zeros(0, device=device)
    return weights[shard.index.partition][shard.index.slice]


def _layouts(shards: Sequence[ModelShard]) -> LayoutFunction:
    layouts = {one.shard.name: one.layout for one in shards}

    def layout_of(name: str, _: Tensor) -> Layout:
        return layouts[name]

    return layout_of


def _world_mesh(device_type: str) -> DeviceMesh | None:
    size = dist.get_world_size()
    return init_device_mesh(device_type, (size,), mesh_dim_names=(AXIS,)) if size > 1 else None


def _exclude_by_name(policy: Policy[Any], module: nn.Module) -> Policy[Any]:
    """The policy with names of parameters in `exclude`, for modules of the engine's model.

    The clipper holds DeepSpeed's flat weights, which are in no module.
    """
    if isinstance(policy, Minimum):
        first, second = (_exclude_by_name(one, module) for one in (policy.first, policy.second))
        return Minimum(first, second)
    if not is_dataclass(policy):
        return policy
    exclude = cast("tuple[Any, ...]", policy.exclude)
    if not any(isinstance(one, nn.Module) for one in exclude):
        return policy
    names: list[str] = []
    for one in exclude:
        names += module_names(module, one) if isinstance(one, nn.Module) else [one]
    return replace(policy, exclude=tuple(names))  # type: ignore[call-arg]


def _check_engine(engine: Any) -> None:
    if not hasattr(engine, "optimizer") or not hasattr(engine, "seq_data_parallel_group"):
        raise ValueError(
            f"cannot attach to a {type(engine).__name__}: it is no engine of DeepSpeed, and only "
            f"an engine shows where its gradients lie. Pass the first of what "
            f"`deepspeed.initialize(...)` returns (with accelerate, what `prepare` returns; with "
            f"the transformers Trainer, `trainer.model_wrapped` once training has begun)."
        )
    without = ("DummyOptim", "DeepSpeedZeRoOffload")
    if engine.optimizer is None or type(engine.optimizer).__name__ in without:
        raise ValueError(
            "cannot attach to this engine of DeepSpeed: it has no optimizer, and no step would "
            "ever apply a gradient. Give `deepspeed.initialize` an optimizer, or one in its "
            "config, and attach afterwards."
        )
