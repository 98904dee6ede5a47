"""Hooks that tell when gradients have their final values."""

# No deferred annotations here: DDP reads those of its communication hook.

import weakref
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distclip import torch_private
from distclip.errors import LayoutError
from distclip.training.dead_hooks import remove_dead


class Listener(Protocol):
    """What `register_grad_hooks` calls: `accumulated`, or under DDP `reduced`, then `written`."""

    def accumulated(self, param: Tensor) -> None: ...
    def reduced(self, params: Sequence[Tensor], values: Sequence[Tensor]) -> None: ...
    def written(self, params: Sequence[Tensor]) -> None: ...


class WeakListener:
    """Keeps its target no longer alive than others do: hooks of parameters outlive a Clipper."""

    def __init__(self, target: Listener) -> None:
        self._target = weakref.ref(target)

    def accumulated(self, param: Tensor) -> None:
        if (target := self._target()) is not None:
            target.accumulated(param)

    def reduced(self, params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        if (target := self._target()) is not None:
            target.reduced(params, values)

    def written(self, params: Sequence[Tensor]) -> None:
        if (target := self._target()) is not None:
            target.written(params)


def register_grad_hooks(
    listener: Listener, params: Sequence[Tensor], modules: Sequence[nn.Module]
) -> list[Any]:
    """Calls `listener` for the parameters in every backward; returns handles with `.remove()`.

    A plain parameter waits only for its own accumulation; FSDP2 runs the same hooks on the sharded
    parameter after its reduce-scatter. DDP's all-reduce comes later, bucket by bucket, and `.grad`
    is written at the end of backward.

    Raises:
        LayoutError: a DistributedDataParallel module has a communication hook already, and it
            takes only one.
    """
    remove_dead()
    ddp = [
        m for module in modules for m in module.modules() if isinstance(m, DistributedDataParallel)
    ]
    heard = set(map(id, params))
    in_buckets: set[int] = set()
    for module in ddp:
        here = set(map(id, module.parameters()))
        if not here.isdisjoint(heard):
            _register_bucket_hook(listener, module)
        in_buckets |= here

    @torch_private.outside_of_graphs
    def hook(param: Tensor) -> None:
        listener.accumulated(param)

    alone = [p for p in params if p.requires_grad and id(p) not in in_buckets]
    return [p.register_post_accumulate_grad_hook(hook) for p in alone]


def _register_bucket_hook(listener: Listener, module: DistributedDataParallel) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    arrived: list[Tensor] = []

    @torch_private.outside_of_graphs
    def finish() -> None:
        listener.written(arrived)
        arrived.clear()

    @torch_private.outside_of_graphs
    def finish_after_ddp() -> None:
        # DDP queues the callback that writes `.grad` after ours, which has to queue once more.
        torch_private.queue_after_backward(finish)

    @torch_private.outside_of_graphs
    def hook(
        group: Any,
        bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
    ) -> torch.futures.Future[Tensor]:
        if bucket.index() == 0:
            arrived.clear()  # of a backward that raised
            torch_private.queue_after_backward(finish_after_ddp)
        params, views = bucket.parameters(), bucket.gradients()

        def reduced(future: torch.futures.Future[Tensor]) -> Tensor:
            listener.reduced(params, views)
            arrived.extend(params)
            return future.value()

        return allreduce_hook(group, bucket).then(reduced)

    try:
        cast(Any, module).register_comm_hook(module.process_group, hook)
    except RuntimeError as error:
        raise LayoutError(
            "cannot measure gradients during backward: the DistributedDataParallel module has a "
            "communication hook already. It takes only one, and without ours it is unknown when a "
            "bucket has been reduced. Make the Clipper without overlap=True, or leave the hook out."
        ) from error
