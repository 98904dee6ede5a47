"""`attach`: a policy on one optimizer of Megatron-core."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distclip.adapters.frameworks import MEGATRON, claim, import_framework, release
from distclip.adapters.megatron.excluded import check_named, with_names
from distclip.adapters.megatron.held_params import HeldParam, chained, held_params, is_layer_wise
from distclip.adapters.megatron.model_shards import AXIS, ModelShard, model_shards
from distclip.adapters.megatron.rank_groups import RankGroups
from distclip.arguments import shown
from distclip.clipper import Clipper
from distclip.decision import Decision
from distclip.nonfinite import OnNonFinite
from distclip.policies import ClipNorm, Policy, check_policy
from distclip.report import Report

_DEFAULT_CLIP_GRAD = 1.0  # of OptimizerConfig


def attach(
    optimizer: Any,
    policy: Policy[Any] | None = None,
    on_nonfinite: OnNonFinite = "propagate",
    *,
    model: Any = None,
    tensor_norms: bool | int = False,
) -> Handle:
    """Clips inside every `optimizer.step()`, until `.detach()`.

    `step` returns what it returns without distclip, `(update_successful, grad_norm,
    num_zeros_in_grad)`, with the norm of the whole model before clipping. Megatron's own
    `clip_grad` is off meanwhile. `optimizer.get_grad_norm()` outside of a step returns the norm of
    the gradients as they are, and does not count as a step.

    Where Megatron finds an overflow (fp16), it leaves out the step, and the policy does not see
    it. With on_nonfinite="skip" `step` returns `(False, None, None)`, as it does then.

    Args:
        optimizer: what `get_megatron_optimizer` returned.
        policy: how large the gradients may be; `ClipNorm(1.0)` if omitted.
        on_nonfinite: as `Clipper` has it.
        model: the model, or its chunks, as `get_megatron_optimizer` got them: from it parameters
            have names, which `exclude` needs, and states of policies per tensor that are to be
            loaded with other pipeline stages. The distributed optimizer knows its model.
        tensor_norms: as `Clipper` has it.

    Raises:
        ValueError: no optimizer of Megatron, or one that something clips already; gradients that
            lie where no test of distclip has looked; a `model` without its parameters; a policy
            that excludes names, without a model. The optimizer is left as it was.
        TypeError: `model` is none.
        ImportError: megatron-core is not installed.

    Collective: all ranks must attach: with experts or pipeline stages, an all-gather of names over
        their ranks, and one over the world where the policy excludes modules. Each step makes one
        all-reduce of a few numbers, for all chained optimizers, over the world; no process group is
        made.
    """
    import_framework(MEGATRON, "megatron.core")
    classes: Any = import_module("megatron.core.optimizer")
    if not isinstance(optimizer, classes.MegatronOptimizer):
        raise ValueError(
            f"cannot attach to a {type(optimizer).__name__}: it is no optimizer of Megatron-core, "
            f"whose `step` prepares the gradients first. Pass what `get_megatron_optimizer(...)` "
            f"returns; for optimizers of torch there is `distclip.Clipper(...).attach`."
        )
    policy = ClipNorm(1.0) if policy is None else policy
    check_policy(policy)
    claimed: list[Any] = []
    try:
        for target in {id(one): one for one in (optimizer, *chained(optimizer))}.values():
            claim(target, "distclip.adapters.megatron")
            claimed.append(target)
        chunks = _chunks(model, optimizer)
        return Handle(optimizer, policy, on_nonfinite, chunks, claimed, tensor_norms)
    except BaseException:
        for target in claimed:
            release(target)
        raise


class Handle:
    """A policy on one optimizer; see `attach`.

    Attributes:
        report: of the latest step that was not left out because of an overflow; None before it.
    """

    report: Report | None = None

    def __init__(
        self,
        optimizer: Any,
        policy: Policy[Any],
        on_nonfinite: OnNonFinite,
        chunks: Sequence[Any],
        claimed: Sequence[Any],
        tensor_norms: bool | int = False,
    ) -> None:
        members = chained(optimizer)
        groups, held = _read(optimizer)
        check_named(policy, chunks)
        shards = model_shards(held, chunks, groups, is_layer_wise(optimizer))
        self._optimizer, self._claimed = optimizer, claimed
        self._configs = list({id(one.config): one.config for one in members}.values())
        named, layouts = _named(shards), {one.shard.name: one.layout for one in shards}
        mesh = _world_mesh(named)

        def clipper(policy: Policy[Any], mode: OnNonFinite, every: bool | int) -> Clipper:
            return Clipper(
                named,
                policy,
                mesh=mesh,
                layouts=lambda name, _: layouts[name],
                gradient=self._gradient,
                on_nonfinite=mode,
                tensor_norms=every,
            )

        self._clipper = clipper(with_names(policy, held, shards), on_nonfinite, tensor_norms)
        self._measuring = clipper(ClipNorm(float("inf")), "propagate", False)
        self._decision: Decision | None = None  # in a step that is not left out
        self._is_stepping, self._is_attached = False, True
        self._warn_if_clipped_twice(policy)
        self._replaced: dict[str, Any] = {}
        self._replace("step", self._step)
        self._replace("prepare_grads", self._prepare)
        self._replace("get_grad_norm", self._norm)

    def state_dict(self) -> dict[str, Any]:
        """What the policy remembers. The same on every rank."""
        return self._clipper.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: a state of another policy or of other parameters. Nothing is loaded then.
        """
        self._clipper.load_state_dict(saved)

    def detach(self) -> None:
        """Ends it. The optimizer clips by its own rule again."""
        if not self._is_attached:
            return
        self._is_attached = False
        for name, (before, was_own, replacement) in self._replaced.items():
            if vars(self._optimizer).get(name) is not replacement:
                continue  # somebody has wrapped it, and goes on calling it: it does nothing now
            delattr(self._optimizer, name)
            if was_own:
                setattr(self._optimizer, name, before)
        for target in self._claimed:
            release(target)

    def _replace(self, name: str, run: Callable[..., Any]) -> None:
        before = getattr(self._optimizer, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            return run(before, *args, **kwargs) if self._is_attached else before(*args, **kwargs)

        self._replaced[name] = before, name in vars(self._optimizer), replacement
        setattr(self._optimizer, name, replacement)

    def _step(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._is_stepping = True
        try:
            with self._own_clipping_off():
                success, norm, num_zeros = own(*args, **kwargs)
            if self._decision is not None:
                # Only here does the host wait: the inner step has been launched before.
                norm = float(self._decision.report.total_norm)
            return success, norm, num_zeros
        finally:
            self._is_stepping, self._decision = False, None

    def _prepare(self, own: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
        """Clips once the gradients are ready to be stepped; whether the step is to be left out."""
        found_inf = own(*args, **kwargs)
        if not self._is_stepping or found_inf:
            return found_inf
        decision = self._clipper.decide()
        self.report = decision.report
        decision.apply_()
        skip = decision.skip(scaled=False)
        if skip is not None and bool(skip):
            return True
        self._decision = decision
        return False

    def _norm(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._decision is not None:
            return self._decision.report.total_norm  # `step` replaces it by a number
        return float(self._measuring.decide().report.total_norm)

    def _gradient(self, stepped: Tensor) -> Tensor | None:
        if any(one.use_precision_aware_optimizer_no_fp8_or_ds_fp8 for one in self._configs):
            return getattr(stepped, "decoupled_grad", None)
        return stepped.grad

    @contextmanager
    def _own_clipping_off(self) -> Generator[None]:
        """During a step alone: other optimizers may share the config."""
        before = [config.clip_grad for config in self._configs]
        try:
            for config in self._configs:
                config.clip_grad = 0.0
            yield
        finally:
            for config, clip_grad in zip(self._configs, before, strict=True):
                config.clip_grad = clip_grad

    def _warn_if_clipped_twice(self, policy: Policy[Any]) -> None:
        same = getattr(policy, "max_norm", None)
        chosen = {config.clip_grad for config in self._configs} - {0.0, _DEFAULT_CLIP_GRAD, same}
        if chosen and dist.get_rank() == 0:
            warnings.warn(
                f"The config of the optimizer has clip_grad={min(chosen)} beside the policy "
                f"{policy}: the policy holds, and Megatron's own rule is off until `.detach()`.",
                stacklevel=4,
            )


def _read(optimizer: Any) -> tuple[RankGroups, list[HeldParam]]:
    try:
        groups = RankGroups.of(chained(optimizer))
        return groups, held_params(optimizer, groups)
    except AttributeError as error:
        raise ValueError(
            f"cannot attach to this {type(optimizer).__name__}: {error}, and its gradients cannot "
            f"be found without. Use megatron-core {MEGATRON.lowest} to {MEGATRON.highest}, which "
            f"distclip is tested with."
        ) from error


def _chunks(model: Any, optimizer: Any) -> list[nn.Module]:
    if model is not None:
        chunks = list(cast("Any", model)) if isinstance(model, list | tuple) else [model]
        if not all(isinstance(chunk, nn.Module) for chunk in chunks):
            raise TypeError(
                f"cannot read names of parameters from model={shown(model)}: it is no model. Pass "
                f"the model, or the list of its chunks, that `get_megatron_optimizer` got."
            )
        return chunks
    found = {
        id(chunk): chunk
        for one in (optimizer, *chained(optimizer))
        for chunk in getattr(one, "model_chunks", [])
    }
    return list(found.values())


def _named(shards: Sequence[ModelShard]) -> list[tuple[str, Tensor]]:
    """What the clipper holds: no elements where this rank steps nothing of a tensor."""
    held = [one.stepped for one in shards if one.stepped is not None]
    device = held[0].device if held else _device()
    return [
        (one.shard.name, torch.zeros(0, device=device) if one.stepped is None else one.stepped)
        for one in shards
    ]


def _device() -> torch.device:
    """Where the parameters of other ranks lie."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _world_mesh(named: Sequence[tuple[str, Tensor]]) -> DeviceMesh:
    device = named[0][1].device if named else _device()
    world: Any = dist.group.WORLD
    return DeviceMesh.from_group(world, device.type, mesh_dim_names=(AXIS,))
