"""A function in the place of Fabric's `clip_gradients`."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from distclip.adapters.frameworks import claim
from distclip.adapters.lightning.checks import check_options, check_set_up
from distclip.adapters.lightning.clipped_optimizer import make_clipper
from distclip.clipper import Clipper
from distclip.policies import ClipNorm, Policy
from distclip.report import Report
from distclip.training.wrappers import unwrapped

OWNER = "distclip.adapters.lightning.clip_gradients"


def clip_gradients(
    fabric: Any,
    module: nn.Module | Sequence[nn.Module],
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
        module, optimizer: what `fabric.setup` returned; a list of modules where the optimizer steps
            several.
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
    module: nn.Module | Sequence[nn.Module],
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
    check_options(options)
    policy = ClipNorm(1.0) if policy is None else policy
    wrapped = check_set_up(fabric, module, optimizer)
    inner = unwrapped([optimizer])[0]
    kept = _kept.get(inner)
    if kept is not None and kept.is_for(wrapped, policy, options):
        return kept.clipper
    clipper = make_clipper(fabric.strategy, wrapped, optimizer, policy, options)
    if kept is None:
        claim(inner, OWNER)
    elif type(kept.policy) is type(policy):
        clipper.load_state_dict(kept.clipper.state_dict())
    _kept[inner] = _Kept(clipper, [weakref.ref(each) for each in wrapped], policy, options)
    return clipper


@dataclass
class _Kept:
    """The Clipper of a Fabric optimizer, and the arguments that it was made with."""

    clipper: Clipper
    modules: list[weakref.ref[nn.Module]]
    policy: Policy[Any]
    options: dict[str, Any]

    def is_for(
        self, modules: Sequence[nn.Module], policy: Policy[Any], options: dict[str, Any]
    ) -> bool:
        made_with = [id(ref()) for ref in self.modules]
        same = made_with == [*map(id, modules)] and self.options == options
        return same and type(self.policy) is type(policy) and self.policy == policy


_kept: MutableMapping[Optimizer, _Kept] = weakref.WeakKeyDictionary()
