"""Large gradients measured during backward, soon after they are final.

Final means what the optimizer will see: summed up over uses and reduced over ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from distclip import torch_private
from distclip.norms.measure import GroupMeasurement, NormBuffer, measure, with_tensors
from distclip.norms.plan import Plan
from distclip.sharding.local_tensors import (
    final_gradient,
    local_gradients,
    local_memory,
    share_address,
)
from distclip.training.dead_hooks import remove_later
from distclip.training.grad_hooks import WeakListener, register_grad_hooks
from distclip.training.samples import Samples, current_stream


class Sizes(NamedTuple):
    """Numbers of elements.

    Attributes:
        large: of a gradient from which it is measured in backward. Shorter ones cost more there,
            each by itself, than in the call, which measures all of them together.
        together: of gradients that are measured together in backward, as soon as so many are final.
    """

    large: int
    together: int


# By measurement: for shorter ones a hook takes several times as long as reading, and 4 MiB are
# still in a cache.
_ON_CPU = Sizes(large=1 << 16, together=1 << 20)
# By arithmetic, not yet by measurement: for 1 MiB a hook takes ten times as long on the host as
# reading does on the device, and to measure 64 MiB takes less than the launches for it.
_ON_ACCELERATOR = Sizes(large=1 << 18, together=1 << 24)


def sizes_on(device: torch.device) -> Sizes:
    return _ON_CPU if device.type == "cpu" else _ON_ACCELERATOR


class BackwardNorms:
    """The norms of large gradients that backward has left, while the gradients do not change.

    A norm is used only if `.grad` is still the very tensor, no operation has written to it since,
    and a sample of its elements has the bits that it had. What has changed, or was never measured,
    is measured when the norms are asked for. A second micro-batch, a gradient set to None or
    replaced, and a backward that raises need no rule of their own. What is not seen is a write that
    torch does not count and that leaves out the sample, such as one to a single element through
    `.data`.

    Gradients that become final one by one are collected, and measured on the stream on which they
    were made, in the hook of a later one. What is then read is `.grad` as it is at that time. The
    last ones are left to the call. So nothing runs after what autograd, FSDP2 and DDP make the
    stream of the caller wait for, and nothing but the samples needs a rule for its memory.
    """

    def __init__(self, plan: Plan, modules: Sequence[nn.Module]) -> None:
        self._plan = plan
        self._params = [param.param for param in plan.params]
        self._numels = [local_memory(param.detach()).numel() for param in self._params]
        self._waits = plan.device.type == "cpu"  # else nothing is read back from the device
        heard = self._large_params()
        self._slots = [
            _BufferSlot(buffer, member)
            for group in (plan.groups if heard else plan.groups[:0])
            for buffer in [NormBuffer(group, plan)]
            for member in range(len(plan.params[group.members]))
        ]
        self._put: set[int] = set()  # the parameters whose number in a buffer is not zero
        self._samples = Samples(len(self._params), plan.device)
        self._together = sizes_on(plan.device).together
        self._collected: dict[int, Any] = {}  # parameters, and the streams of their gradients
        self._num_collected: dict[Any, int] = {}  # elements, by the stream
        self._known: dict[int, _Known] = {}
        self._index = {id(self._params[i]): i for i in heard}
        params = [self._params[i] for i in heard]
        handles = register_grad_hooks(WeakListener(self), params, modules)
        weakref.finalize(self, remove_later, handles)

    def gradients(self) -> list[Tensor | None]:
        """As `local_gradients`, in less time where backward has left all."""
        known = self._known
        if len(known) == len(self._params) and all(
            known[i].grad is param.grad for i, param in enumerate(self._params)
        ):
            values = [known[i].values for i in range(len(known))]
            if not share_address(values):
                return [*values]
        return local_gradients(self._params)

    def measurements(
        self, gradients: Sequence[Tensor | None], tensors: bool
    ) -> list[GroupMeasurement]:
        """As `measure`, without reading again what was measured. Forgets the gradients after."""
        known = sorted(self._known.items())
        fresh = [i for i, k in known if k.is_still(gradients[i]) and self._samples.has(i)]
        if self._waits:
            changed = self._samples.changed(fresh)
            fresh = [i for i in fresh if i not in changed]
        if not fresh or self._is_too_little(fresh):
            self._forget_gradients()
            return measure(gradients, self._plan, tensors=tensors)
        if not self._waits:
            self._refresh(fresh, gradients)
        self._clear(self._put.difference(fresh))
        self._forget_gradients()
        rest = list(gradients)
        for i in fresh:
            rest[i] = None
        buffers = dict.fromkeys(slot.buffer for slot in self._slots)
        found = [buffer.measurement(rest) for buffer in buffers]
        return with_tensors(found, gradients, self._plan) if tensors else found

    def accumulated(self, param: Tensor) -> None:
        """`.grad` has its final values, on the current stream."""
        i, stream = self._index[id(param)], current_stream(self._plan.device)
        self._known.pop(i, None)
        self._collected[i] = stream
        num = self._num_collected.get(stream, 0) + self._numels[i]
        self._num_collected[stream] = num
        if num >= self._together:
            self._measure_collected(stream)

    def reduced(self, params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """These gradients have their final values, but `.grad` does not have them yet."""
        pairs = zip(params, values, strict=True)
        found = [(i, each) for p, each in pairs if (i := self._index.get(id(p))) is not None]
        for i, _ in found:
            self._known.pop(i, None)
        self._measure(dict(found))

    def written(self, params: Sequence[Tensor]) -> None:
        """`.grad` has the values that were measured."""
        for param in params:
            i = self._index.get(id(param))
            if i is None or not self._samples.has(i):
                continue
            if (values := final_gradient(param)) is not None:
                self._samples.move(i, values)
                self._known[i] = _Known.of(param, values)

    def _large_params(self) -> list[int]:
        """The parameters whose gradients are measured in backward."""
        device, large = self._plan.device, sizes_on(self._plan.device).large
        # Kernels that measure units again only where a sample differs exist for no accelerator.
        if not self._waits and any(group.units is not None for group in self._plan.groups):
            return []
        # Under CPU offload FSDP2 copies the gradient of a parameter with a hook to the CPU at once,
        # and waits for it.
        here = [param.device == device or param.is_meta for param in self._params]
        return [i for i, numel in enumerate(self._numels) if here[i] and numel >= large]

    def _is_too_little(self, fresh: Sequence[int]) -> bool:
        """Whether to measure everything at once takes no longer."""
        return 2 * sum(self._numels[i] for i in fresh) < sum(self._numels)

    def _measure_collected(self, stream: Any) -> None:
        """Measures what was collected on the current stream."""
        self._num_collected.pop(stream)
        together = [i for i, other in list(self._collected.items()) if other == stream]
        for i in together:
            del self._collected[i]
        found = {i: final_gradient(self._params[i]) for i in together}
        values = {i: each for i, each in found.items() if each is not None}
        known = {i: _Known.of(self._params[i], each) for i, each in values.items()}
        for i in self._measure(values):
            self._known[i] = known[i]

    @torch.no_grad()
    def _measure(self, values: dict[int, Tensor]) -> list[int]:
        """Measures gradients, by their indices; returns those that have a sample."""
        here = [i for i, each in sorted(values.items()) if each.device == self._plan.device]
        # First the samples: they then show a write that comes between.
        self._samples.take(here, [values[i] for i in here])
        measured = [i for i in here if self._samples.has(i)]
        for buffer, members, of_buffer in self._by_buffer(measured):
            buffer.put_many(members, [values[i] for i in measured[of_buffer]])
        self._put.update(measured)
        return measured

    @torch.no_grad()
    def _refresh(self, fresh: Sequence[int], gradients: Sequence[Tensor | None]) -> None:
        changed = self._samples.changed_on_device(fresh)
        grads = [cast(Tensor, gradients[i]) for i in fresh]
        for buffer, members, of_buffer in self._by_buffer(fresh):
            buffer.refresh(members, grads[of_buffer], changed[of_buffer])

    @torch.no_grad()
    def _clear(self, indices: Iterable[int]) -> None:
        """Zeros for gradients that this step does not have, or that are measured anew."""
        for buffer, members, _ in self._by_buffer(sorted(indices)):
            buffer.clear(members)
        self._put.difference_update(indices)

    def _by_buffer(self, indices: Sequence[int]) -> Iterator[tuple[NormBuffer, list[int], slice]]:
        """The buffers of these parameters: which, which members, and which of `indices`.

        Args:
            indices: in ascending order; those of a group lie together.
        """
        first = 0
        for buffer, slots in groupby((self._slots[i] for i in indices), attrgetter("buffer")):
            members = [slot.member for slot in slots]
            yield buffer, members, slice(first, first + len(members))
            first += len(members)

    def _forget_gradients(self) -> None:
        """Keeps no gradient alive after it was used."""
        self._known.clear()
        self._collected.clear()
        self._num_collected.clear()
        self._samples.forget()


class _BufferSlot(NamedTuple):
    buffer: NormBuffer
    member: int


class _Known(NamedTuple):
    """A gradient as it was when it was measured.

    Attributes:
        grad: the `.grad`.
        values: its dense values on this rank.
    """

    grad: Tensor | None
    values: Tensor
    version: int
    address: int

    @staticmethod
    def of(param: Tensor, values: Tensor) -> _Known:
        return _Known(param.grad, values, torch_private.version(values), _address(values))

    def is_still(self, values: Tensor | None) -> bool:
        """Whether this is that tensor, lies where it lay, and nothing that torch counts wrote."""
        if values is None or values is not self.values:
            return False
        return (torch_private.version(values), _address(values)) == (self.version, self.address)


def _address(values: Tensor) -> int:
    return values.data_ptr() if type(values) is Tensor else 0
