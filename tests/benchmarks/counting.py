"""Modes that count the bytes that operators read and write, and the collectives they start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

ONLY_WRITE = {"aten::copy_", "aten::zero_", "aten::fill_"}


class Traffic(TorchDispatchMode):
    """Counts the bytes of some tensors that operators read and write."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._watched = {t.untyped_storage().data_ptr() for t in tensors}
        self.read = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not func.is_view:
            names = (argument.name for argument in func._schema.arguments)
            self._count(func, {**dict(zip(names, args, strict=False)), **kwargs})
        return func(*args, **kwargs)

    def _count(self, func: Any, given: dict[str, Any]) -> None:
        read: dict[tuple[int, int], int] = {}  # a tensor that is given twice is read once
        for argument in func._schema.arguments:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if "_fused_" in func._schema.name and argument.name == "grads":
                # The kernels write gradients back only if they divide.
                writes = given.get("grad_scale") is not None
            for t in tensors_in(given.get(argument.name)):
                if t.untyped_storage().data_ptr() in self._watched:
                    self.written += t.nbytes * writes
                    if not (writes and func._schema.name in ONLY_WRITE):
                        read[t.data_ptr(), t.numel()] = t.nbytes
        self.read += sum(read.values())


def tensors_in(value: Any) -> Iterator[Tensor]:
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(one, Tensor):
            yield one


@dataclass(frozen=True)
class Collective:
    ranks: int
    payload: int  # bytes


class CollectiveMode(CommDebugMode):
    """CommDebugMode counts collectives; this also notes how many ranks and bytes each one has."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        # A DTensor's own collectives come after the call that has DTensors.
        on_dtensors = any(issubclass(t, DTensor) for t in types)
        if ("all_reduce" in name or "allreduce" in name) and not on_dtensors:
            self.collectives.append(_collective(*args[:3]))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def checked(self) -> list[Collective]:
        """Those of more than one rank. Raises AssertionError where torch has counted others."""
        assert len(self.collectives) == self.get_total_counts(), self.get_comm_counts()
        return [c for c in self.collectives if c.ranks > 1]


def _collective(values: Any, first: Any, second: Any) -> Collective:
    """From the arguments of `c10d.allreduce_` or of `_c10d_functional.all_reduce`."""
    if isinstance(values, Tensor):
        return Collective(_resolve_process_group(second).size(), values.nbytes)
    return Collective(dist.ProcessGroup.unbox(first).size(), sum(v.nbytes for v in values))
