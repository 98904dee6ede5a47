"""Gradients measured during backward, each as soon as it is final.

Final means what the optimizer will see: summed up over uses and reduced over ranks.
"""

# No deferred annotations here: DDP reads those of its communication hook.

import weakref
from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distclip import torch_private
from distclip.errors import LayoutError
from distclip.norms.measure import GroupMeasurement, NormBuffer, measure
from distclip.norms.plan import Plan
from distclip.sharding.local_tensors import final_gradient, local_gradient


class BackwardNorms:
    """The norm of every gradient that backward has left, while the gradient does not change.

    A norm is used only if `.grad` is still the very tensor and no operation has written to it
    since; what has changed, or was never seen, is measured when the norms are asked for. A second
    micro-batch, a gradient set to None or replaced, and a backward that raises need no rule of
    their own. A write through `.data` leaves no trace on a tensor, and is not seen.
    """

    def __init__(self, plan: Plan, modules: Sequence[nn.Module]) -> None:
        self._plan = plan
        self._params = [param.param for param in plan.params]
        self._index = {id(param): i for i, param in enumerate(self._params)}
        self._buffers = [NormBuffer(group, plan) for group in plan.groups]
        self._slots = [
            _BufferSlot(buffer, member)
            for group, buffer in zip(plan.groups, self._buffers, strict=True)
            for member in range(len(plan.params[group.members]))
        ]
        self._measured: set[int] = set()  # the parameters whose number in a buffer is not zero
        self._forget_gradients()
        handles = register_grad_hooks(_WeakListener(self), self._params, modules)
        weakref.finalize(self, _remove, handles)

    def gradients(self) -> list[Tensor | None]:
        """As `local_gradients`, in less time where all were seen."""
        if all(map(is_, map(attrgetter("grad"), self._params), self._grads)):
            return self._seen
        known = zip(self._params, self._grads, self._seen, strict=True)
        return [
            seen if param.grad is grad else local_gradient(param) for param, grad, seen in known
        ]

    def measurements(self, gradients: Sequence[Tensor | None]) -> list[GroupMeasurement]:
        """As `measure`, without reading again what was measured. Forgets the gradients after."""
        versions = [-1 if grad is None else torch_private.version(grad) for grad in gradients]
        is_fresh = gradients is self._seen and versions == self._versions
        stale = [] if is_fresh else self._stale(gradients, versions)
        if not self._measured or len(stale) > len(gradients) // 2:
            self._forget_gradients()
            return measure(gradients, self._plan)
        for i in stale:
            self._measure(i, gradients[i])
        if -1 in versions:  # a gradient of an earlier step that this step does not have
            for i in [i for i, g in enumerate(gradients) if g is None and i in self._measured]:
                self._measure(i, None)
        self._forget_gradients()
        return [buffer.measurement() for buffer in self._buffers]

    def _stale(self, gradients: Sequence[Tensor | None], versions: Sequence[int]) -> list[int]:
        now_and_then = zip(gradients, self._seen, versions, self._versions, strict=True)
        return [i for i, (g, seen, v, w) in enumerate(now_and_then) if g is not seen or v != w]

    def reduced(self, param: Tensor, values: Tensor | None) -> None:
        """A gradient has its final values; None where a collective has yet to make them."""
        if (i := self._index.get(id(param))) is not None:
            self._grads[i] = self._seen[i] = None
            is_here = values is not None and values.device == self._plan.device
            self._measure(i, values if is_here else None)

    def written(self, param: Tensor) -> None:
        """`.grad` has the values that were measured."""
        if (i := self._index.get(id(param))) in self._measured:
            self._grads[i], self._seen[i] = param.grad, (values := final_gradient(param))
            self._versions[i] = -1 if values is None else torch_private.version(values)

    @torch.no_grad()
    def _measure(self, i: int, values: Tensor | None) -> None:
        self._slots[i].buffer.put(self._slots[i].member, values)
        (self._measured.discard if values is None else self._measured.add)(i)

    def _forget_gradients(self) -> None:
        """Keeps no gradient alive after it was used."""
        self._grads: list[Tensor | None] = [None] * len(self._params)
        self._seen = list(self._grads)  # their dense values
        self._versions = [-1] * len(self._params)


class _BufferSlot(NamedTuple):
    buffer: NormBuffer
    member: int


class Listener(Protocol):
    """What `register_grad_hooks` calls for a parameter: `reduced`, then `written`."""

    def reduced(self, param: Tensor, values: Tensor | None) -> None: ...
    def written(self, param: Tensor) -> None: ...


class _WeakListener:
    """Keeps its target no longer alive than others do: hooks of parameters outlive a Clipper."""

    def __init__(self, target: BackwardNorms) -> None:
        self._target = weakref.ref(target)

    def reduced(self, param: Tensor, values: Tensor | None) -> None:
        if (target := self._target()) is not None:
            target.reduced(param, values)

    def written(self, param: Tensor) -> None:
        if (target := self._target()) is not None:
            target.written(param)


def register_grad_hooks(
    listener: Listener, params: Sequence[Tensor], modules: Sequence[nn.Module]
) -> list[Any]:
    """Calls `listener` for each parameter in every backward; returns handles with `.remove()`.

    A plain parameter waits only for its own accumulation; FSDP2 runs the same hooks on the sharded
    parameter after its reduce-scatter. DDP's all-reduce comes later, bucket by bucket, and `.grad`
    is written at the end of backward.

    Raises:
        LayoutError: a DistributedDataParallel module has a communication hook already, and it
            takes only one.
    """
    ddp = [
        m for module in modules for m in module.modules() if isinstance(m, DistributedDataParallel)
    ]
    for module in ddp:
        _register_bucket_hook(listener, module)
    in_buckets = {id(p) for module in ddp for p in module.parameters()}

    @torch_private.outside_of_graphs
    def hook(param: Tensor) -> None:
        listener.reduced(param, final_gradient(param))
        listener.written(param)

    alone = [p for p in params if p.requires_grad and id(p) not in in_buckets]
    return [p.register_post_accumulate_grad_hook(hook) for p in alone]


def _register_bucket_hook(listener: Listener, module: DistributedDataParallel) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    arrived: list[Tensor] = []

    @torch_private.outside_of_graphs
    def finish() -> None:
        for param in arrived:
            listener.written(param)
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
            for param, values in zip(params, views, strict=True):
                listener.reduced(param, values)
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


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
