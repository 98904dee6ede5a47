"""Any policy in the place of torchtitan's own clipping, with its training steps as they are."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distclip import nonfinite
from distclip.adapters.frameworks import TORCHTITAN, claim, import_framework, release
from distclip.adapters.torchtitan.trained import (
    Trained,
    check_steps_after_backward,
    remembers,
    rule_of,
    states_of,
)
from distclip.api import clip_grad_norm_
from distclip.arguments import as_interval
from distclip.clipper import Clipper
from distclip.errors import LayoutError
from distclip.nonfinite import OnNonFinite
from distclip.policies import Policy, TorchClipNorm, check_policy, vetoes
from distclip.report import Report
from distclip.sharding.fsdp2 import sharded_params
from distclip.training import wrappers

OWNER = "distclip.adapters.torchtitan"
STATE = "distclip"  # the key of what the policy remembers, in torchtitan's checkpoints

_utils = import_framework(TORCHTITAN, "torchtitan.distributed.utils", stacklevel=6)
_trainer = import_framework(TORCHTITAN, "torchtitan.trainer", stacklevel=6)


def install(
    policy: Policy[Any] | None = None,
    *,
    on_nonfinite: OnNonFinite = "propagate",
    max_consecutive_skips: int = 20,
    tensor_norms: bool | int = False,
) -> Installed:
    """Clips in torchtitan's training steps, until `.remove()` or the end of a `with` block.

    Call it on every rank before the trainer is built. A function of distclip then stands in the
    place of `torchtitan.distributed.utils.clip_grad_norm_`, also in modules that have imported it
    by name. It knows the trainers that are built afterwards, of `torchtitan.trainer.Trainer` and of
    subclasses that call its `__init__`; for others see `Installed.add`.

    Args:
        policy: how large the gradients may be; the `max_norm` of the config has no effect then. If
            omitted, `max_norm` is the limit, with the coefficient of torchtitan's own function,
            max_norm / (norm + 1e-6).
        on_nonfinite, max_consecutive_skips, tensor_norms: as `Clipper` has them. With "skip" the
            trainer's optimizers leave out the step; its learning rates go on. So it is where the
            policy vetoes a step.

    Raises:
        ValueError, TypeError: it is installed already, or an argument is not what `Clipper` takes.

    Collective: when a trainer is built, as `Clipper` has it. Each step makes one all-reduce of a
        few numbers, pipeline stages included.
    """
    if policy is not None:
        check_policy(policy)
    nonfinite.check_mode(on_nonfinite, max_consecutive_skips)
    make_clipper = functools.partial(
        Clipper,
        on_nonfinite=on_nonfinite,
        max_consecutive_skips=max_consecutive_skips,
        tensor_norms=as_interval("tensor_norms", tensor_norms) or False,
    )
    return Installed(policy, on_nonfinite, make_clipper)


class Installed:
    """What `install` returns.

    Attributes:
        report: of the latest step of a trainer; None before the first.
    """

    report: Report | None = None

    def __init__(
        self,
        policy: Policy[Any] | None,
        on_nonfinite: OnNonFinite,
        make_clipper: Callable[..., Clipper],
    ) -> None:
        claim(_utils, OWNER)
        self._policy, self._mode, self._make_clipper = policy, on_nonfinite, make_clipper
        # By a weak reference: a trainer that is gone leaves no model behind.
        self._trainers: WeakKeyDictionary[Any, Trained] = WeakKeyDictionary()
        self._is_removed = False
        self._own: Callable[..., Tensor] = _utils.clip_grad_norm_
        self._own_init: Callable[..., None] = _trainer.Trainer.__init__
        self._instead, self._init = self._function(self._own), self._adding(self._own_init)
        _replace(self._own, self._instead)
        _trainer.Trainer.__init__ = self._init

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def add(self, trainer: Any) -> Clipper | None:
        """Clips for a trainer that was built before `install`, or without `Trainer.__init__`.

        It needs the attributes that torchtitan's trainers and engines have: `model_parts`,
        `parallel_dims` and `optimizers`. Where it has a `checkpointer`, what the policy remembers
        is saved and loaded with its checkpoints, under "distclip". Does nothing for a trainer that
        is known, unless its parameters are others than before.

        Returns:
            What clips; its `state_dict` is for trainers without a `checkpointer`. None without a
            policy where `trainer.config.training.max_norm` does not exist.

        Raises:
            ValueError: the optimizers step during backward, or their gradients are clipped already;
                what `Clipper` raises.
            TypeError: it lacks these attributes.

        Collective: as `Clipper`. All ranks must add.
        """
        trained = Trained.read(trainer)
        if (known := self._trainers.get(trainer)) is not None:
            if known.ids == trained.ids and known.optimizers is trained.optimizers:
                return known.clipper
            self._drop(trainer, known)
        check_steps_after_backward(trained.optimizers)
        rule = self._policy if self._policy is not None else rule_of(trainer)
        if rule is not None:  # at setup, not in the first step: it may be a collective
            trained.clipper = self._make_clipper(trained.params, rule, mesh=trained.mesh)
        claim(trained.optimizers, OWNER)
        if self._mode == "skip" or vetoes(self._policy):
            trained.skips.register(wrappers.unwrapped([trained.optimizers]))
        if trained.clipper is not None and remembers(trained.clipper):
            states_of(trainer)[STATE] = trained.clipper
        self._trainers[trainer] = trained
        return trained.clipper

    def remove(self) -> None:
        """Ends it. torchtitan clips by its own rule again, also in trainers that exist."""
        if self._is_removed:
            return
        self._is_removed = True
        _replace(self._instead, self._own)  # also where it was imported by name meanwhile
        if _trainer.Trainer.__init__ is self._init:
            _trainer.Trainer.__init__ = self._own_init
        for trainer, trained in list(self._trainers.items()):
            self._drop(trainer, trained)
        release(_utils)

    def _drop(self, trainer: Any, trained: Trained) -> None:
        trained.skips.remove()
        release(trained.optimizers)
        states = states_of(trainer)
        if trained.clipper is not None and states.get(STATE) is trained.clipper:
            del states[STATE]
        del self._trainers[trainer]

    def _adding(self, own: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(own)
        def init(trainer: Any, *args: Any, **kwargs: Any) -> None:
            own(trainer, *args, **kwargs)
            if not self._is_removed:
                self.add(trainer)

        return init

    def _function(self, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(own)
        @torch.no_grad()
        def clip(
            parameters: Tensor | Iterable[Tensor],
            max_norm: float,
            norm_type: float = 2.0,
            error_if_nonfinite: bool = False,
            foreach: bool | None = None,
            pp_mesh: DeviceMesh | None = None,
            ep_enabled: bool = False,
        ) -> Tensor:
            params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            how = (max_norm, norm_type, error_if_nonfinite, foreach)
            if self._is_removed:  # somebody holds it under no name of a module
                return own(params, *how, pp_mesh, ep_enabled)
            ids = frozenset(map(id, sharded_params(params)))
            trained = next((each for each in self._trainers.values() if each.ids == ids), None)
            if trained is None:
                mesh = self._mesh_of_others(params, pp_mesh)
                self.report = None
                return clip_grad_norm_(params, *how, mesh=mesh)
            return self._clip_(trained, max_norm, norm_type, error_if_nonfinite)

        return clip

    def _clip_(
        self, trained: Trained, max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> Tensor:
        clipper = self._clipper_of(trained, max_norm, norm_type)
        trained.skips.forget()
        decision = clipper.decide()
        if error_if_nonfinite and decision.is_known_nonfinite:
            raise nonfinite.error(
                decision.total_norm,
                decision.gradients,
                decision.plan,
                setting="error_if_nonfinite=False",
            )
        decision.apply_()
        if (skip := decision.skip(False)) is not None:
            trained.skips.expect(skip)
        self.report = decision.report
        return decision.report.total_norm

    def _clipper_of(self, trained: Trained, max_norm: float, norm_type: float) -> Clipper:
        if self._policy is not None and trained.clipper is not None:
            if norm_type not in (2.0, self._policy.norm_type):
                raise ValueError(
                    f"cannot clip with norm_type={norm_type}: the policy that is installed is "
                    f"{self._policy}, and the norm that it limits is another one. Install a policy "
                    f"with that norm_type, or leave it out of the call."
                )
            return trained.clipper
        own_rule = TorchClipNorm(max_norm, norm_type)
        if trained.clipper is None or trained.clipper.policy != own_rule:
            trained.clipper = self._make_clipper(trained.params, own_rule, mesh=trained.mesh)
        return trained.clipper

    def _mesh_of_others(
        self, params: Sequence[Tensor], pp_mesh: DeviceMesh | None
    ) -> DeviceMesh | None:
        """The mesh for parameters that are not all of one trainer's.

        Raises:
            ValueError: what the policy remembers, or what is skipped, belongs to a trainer.
            LayoutError: it is unknown which ranks hold the other pipeline stages.
        """
        instead = (
            "Call `install` before the trainer is built, or `add(trainer)` on what it returned "
            "where the trainer was built earlier, without `Trainer.__init__`, or got other "
            "parameters since."
        )
        if self._policy is not None or self._mode != "propagate":
            raise ValueError(
                f"cannot clip these {len(params)} parameters: they are not those of a trainer that "
                f"distclip knows, and the policy and on_nonfinite={self._mode!r} are kept for each "
                f"trainer. {instead}"
            )
        if pp_mesh is None or pp_mesh.size() == dist.get_world_size():
            return pp_mesh
        for trained in self._trainers.values():
            if trained.pp_mesh is pp_mesh:
                return trained.mesh
        raise LayoutError(
            f"cannot clip these {len(params)} parameters over pipeline stages: the mesh of the "
            f"stages does not show which ranks share one, and a trainer that does is not known. "
            f"{instead}"
        )


def _replace(function: Callable[..., Any], instead: Callable[..., Any]) -> None:
    """Under each of its names: in its own module, and in those that have imported it."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is function:
                setattr(module, name, instead)
