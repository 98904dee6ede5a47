"""When, during backward, a gradient is what the optimizer will see: summed up and reduced over ranks."""

# No deferred annotations here: DDP reads those of its hook.

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distclip.errors import LayoutError
from distclip.sharding.local_tensors import final_gradient


class Listener(Protocol):
    """Whom `listen` tells of a parameter: first its final values, then that `.grad` has them."""

    def reduced(self, param: Tensor, values: Tensor | None) -> None: ...
    def written(self, param: Tensor) -> None: ...


def register_grad_hooks(listener: Listener, params: Sequence[Tensor], modules: Sequence[nn.Module]) -> list[Any]:
    """Tells `listener` of each parameter, every backward; returns handles with `.remove()`.

    A plain parameter has nothing to wait for but its own accumulation; FSDP2 runs the same hooks on the sharded
    parameter after its reduce-scatter. DDP's all-reduce comes later, bucket by bucket, and `.grad` is written at the
    end of backward. Values are None where a collective has yet to make them.

    Raises:
        LayoutError: a DistributedDataParallel module has a communication hook already, and it can have but one.
    """
    ddp = [inner for m in modules for inner in m.modules() if isinstance(inner, DistributedDataParallel)]
    for module in ddp:
        _listen_to_buckets(listener, module)
    in_buckets = {id(p) for module in ddp for p in module.parameters()}
    hook = _accumulated(listener)
    alone = [p for p in params if p.requires_grad and id(p) not in in_buckets]
    return [p.register_post_accumulate_grad_hook(hook) for p in alone]


def _accumulated(listener: Listener) -> Callable[[Tensor], None]:
    def hook(param: Tensor) -> None:
        listener.reduced(param, final_gradient(param))
        listener.written(param)

    return hook


def _listen_to_buckets(listener: Listener, module: DistributedDataParallel) -> None:
    from torch._C._distributed_c10d import GradBucket
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    arrived: list[Tensor] = []

    def finish() -> None:
        for param in arrived:
            listener.written(param)
        arrived.clear()

    def hook(group: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        if bucket.index() == 0:
            arrived.clear()  # of a backward that raised
            # DDP queues the callback that writes .grad after this one, which therefore joins the queue once more.
            _after_backward(lambda: _after_backward(finish))
        params, views = bucket.parameters(), bucket.gradients()

        def reduced(future: torch.futures.Future[Tensor]) -> Tensor:
            for param, values in zip(params, views, strict=True):
                listener.reduced(param, values)
            arrived.extend(params)
            return future.value()

        return allreduce_hook(group, bucket).then(reduced)

    try:
        cast(Any, module).register_comm_hook(module.process_group, hook)
    except RuntimeError as error:
        raise LayoutError(
            "cannot measure gradients during backward: the DistributedDataParallel module has a communication hook "
            "already, and it takes but one, so that nothing would tell when a bucket has been reduced. "
            "Make the Clipper without overlap=True, or leave the hook out."
        ) from error


def _after_backward(call: Callable[[], None]) -> None:
    cast(Any, torch.autograd).Variable._execution_engine.queue_callback(call)
