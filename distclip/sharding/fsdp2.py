"""FSDP2 shows a module's unsharded parameters while it needs them, and these have no gradients.

After a forward without backward the root stays unsharded; so does everything under
`reshard_after_forward=False`. The gradients are those of the sharded parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distclip.torch_private import composable_modules


def reshard(module: nn.Module) -> None:
    """Makes the parameters of a module those that have gradients; the next forward gathers again.

    Collective: none.
    """
    if is_used():
        _reshard(module.modules())


def sharded_params(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """`tensors`, with sharded parameters in the place of unsharded ones of any FSDP2 module."""
    if not is_used() or type(None) not in set(map(type, map(attrgetter("grad"), tensors))):
        return tensors
    if all(tensor.grad is not None for tensor in tensors if tensor.requires_grad):
        return tensors
    modules = list(_fsdp2(composable_modules()))
    before = [list(module.parameters()) for module in modules]
    _reshard(modules)
    sharded: dict[int, Tensor] = {}
    for unsharded, module in zip(before, modules, strict=True):
        after = list(module.parameters())
        if len(after) == len(unsharded):  # not a module whose unsharded parameters are tied
            sharded.update((id(a), b) for a, b in zip(unsharded, after, strict=True) if a is not b)
    return [sharded.get(id(tensor), tensor) for tensor in tensors]


def is_used() -> bool:
    """Whether somebody has imported FSDP2: that takes 0.2 s."""
    return hasattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule")


def _reshard(modules: Iterable[nn.Module]) -> None:
    for module in _fsdp2(modules):
        module.reshard()


def _fsdp2(modules: Iterable[nn.Module]) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    return (module for module in modules if isinstance(module, FSDPModule))


def shard_(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shards every parameter along dim 0 over a mesh of one axis, in place."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, mesh=mesh)
