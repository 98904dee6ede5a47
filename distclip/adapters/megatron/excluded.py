"""What a policy excludes, by names that are the same on every rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch.distributed as dist
from torch import nn

from distclip.adapters.megatron.held_params import HeldParam
from distclip.adapters.megatron.model_shards import ModelShard
from distclip.policies import Policy


def check_named(policy: Policy[Any], chunks: Sequence[nn.Module]) -> None:
    """Raises ValueError where a policy excludes names and parameters have none."""
    names = [wanted for wanted in policy.exclude if isinstance(wanted, str)]
    if names and not chunks:
        raise ValueError(
            f"cannot exclude {names[0]!r}: parameters have no names here, because this optimizer "
            f"does not know those of the model. Pass the model, or the chunks that "
            f"`get_megatron_optimizer` got, as `model=`."
        )


def with_names(
    policy: Policy[Any], held: Sequence[HeldParam], shards: Sequence[ModelShard]
) -> Policy[Any]:
    """The policy, with the names of parameters in the place of the modules that it excludes.

    What Megatron steps are often copies of a module's parameters, and other ranks hold other parts
    of them, or other modules.

    Collective: an all-gather of names over the world where a policy excludes modules.
    """
    modules = [wanted for wanted in policy.exclude if isinstance(wanted, nn.Module)]
    if not modules:
        return policy
    inside = {id(param) for module in modules for param in module.parameters()}
    stepped = {id(one.stepped) for one in held if id(one.param) in inside} - {id(None)}
    own = [one.shard.name for one in shards if id(one.stepped) in stepped]
    everyone: list[list[str]] = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    names = sorted({name for each in everyone for name in each})
    return _excluding(policy, tuple(names)) if names else policy


def _excluding(policy: Any, names: tuple[str, ...]) -> Any:
    """A copy that excludes `names` and not the modules; also in policies that it is made of."""
    if not dataclasses.is_dataclass(policy) or isinstance(policy, type):
        return policy
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(policy):
        value = getattr(policy, field.name)
        if field.name == "exclude":
            given = cast("tuple[Any, ...]", value)
            kept = tuple(wanted for wanted in given if not isinstance(wanted, nn.Module))
            changed["exclude"] = (*kept, *names)
        elif hasattr(value, "exclude"):
            changed[field.name] = _excluding(value, names)
    return dataclasses.replace(policy, **changed)
