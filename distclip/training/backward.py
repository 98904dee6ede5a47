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
from distclip.training.samples import Samples


class BackwardNorms:
    """The norm of every gradient that backward has left, while the gradient does not change.

    A norm is used only if `.grad` is still the very tensor, no operation has written to it since,
    and a sample of its elements has the bits that it had. What has changed, or was never seen, is
    measured when the norms are asked for. A second micro-batch, a gradient set to None or replaced,
    and a backward that raises need no rule of their own. What is not seen is a write that torch
    does not count and that leaves out the sample, such as one to a single element through `.data`.
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
        self._waits = plan.device.type == "cpu"  # else nothing is read back from the device
        self._measured: set[int] = set()  # the parameters whose number in a buffer is not zero
        self._samples = Samples(len(self._params), plan.device)
        self._latest: Tensor | None = None  # the values that were measured last
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
        stale, changed = self._surely_stale(gradients), None
        sampled = [i for i, grad in enumerate(gradients) if grad is not None and i not in stale]
        if self._waits:
            stale |= self._samples.changed(sampled)
        elif sampled:
            changed = self._samples.changed_on_device(sampled)
        if self._is_too_much(len(stale)):
            self._forget_gradients()
            return measure(gradients, self._plan)
        for i in stale:
            self._measure(i, gradients[i])
        for i in [i for i in self._measured if gradients[i] is None]:
            self._measure(i, None)  # a gradient of an earlier step that this step does not have
        if changed is not None:
            for group, buffer in zip(self._plan.groups, self._buffers, strict=True):
                buffer.refresh(gradients[group.members], changed[group.members])
        self._forget_gradients()
        return [buffer.measurement() for buffer in self._buffers]

    def _is_too_much(self, num_stale: int) -> bool:
        """Whether to measure everything at once takes no longer."""
        # Kernels that measure units again only where a sample differs exist for no accelerator.
        has_units = any(group.units is not None for group in self._plan.groups)
        too_much = num_stale > len(self._params) // 2 or (has_units and not self._waits)
        return too_much or not self._measured

    def _surely_stale(self, gradients: Sequence[Tensor | None]) -> set[int]:
        """What is another tensor or lies elsewhere, has a later version, or has no sample."""
        versions = [-1 if grad is None else torch_private.version(grad) for grad in gradients]
        addresses = [grad.data_ptr() if type(grad) is Tensor else 0 for grad in gradients]
        has = self._samples.has
        stale = {i for i, grad in enumerate(gradients) if grad is not None and not has(i)}
        if gradients is self._seen and (versions, addresses) == (self._versions, self._addresses):
            return stale
        now = zip(gradients, versions, addresses, strict=True)
        then = zip(self._seen, self._versions, self._addresses, strict=True)
        pairs = enumerate(zip(now, then, strict=True))
        return stale | {i for i, (a, b) in pairs if a[0] is not b[0] or a[1:] != b[1:]}

    def reduced(self, param: Tensor, values: Tensor | None) -> None:
        """A gradient has its final values; None where a collective has yet to make them."""
        if (i := self._index.get(id(param))) is not None:
            self._grads[i] = self._seen[i] = None
            is_here = values is not None and values.device == self._plan.device
            self._measure(i, values if is_here else None)
            self._latest = values if is_here else None
            if self._latest is not None:
                self._samples.take(i, self._latest)

    def written(self, param: Tensor) -> None:
        """`.grad` has the values that were measured."""
        if (i := self._index.get(id(param))) in self._measured:
            self._grads[i], self._seen[i] = param.grad, (values := final_gradient(param))
            self._versions[i] = -1 if values is None else torch_private.version(values)
            self._addresses[i] = values.data_ptr() if type(values) is Tensor else 0
            if values is not None and values is not self._latest:
                self._samples.move(i, values)
        self._latest = None

    @torch.no_grad()
    def _measure(self, i: int, values: Tensor | None) -> None:
        self._slots[i].buffer.put(self._slots[i].member, values)
        (self._measured.discard if values is None else self._measured.add)(i)

    def _forget_gradients(self) -> None:
        """Keeps no gradient alive after it was used."""
        self._grads: list[Tensor | None] = [None] * len(self._params)
        self._seen = list(self._grads)  # their dense values
        self._samples.forget()
        self._versions = [-1] * len(self._params)
        self._addresses = [0] * len(self._params)


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
