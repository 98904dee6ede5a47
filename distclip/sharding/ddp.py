"""Reads DistributedDataParallel over tensor parallelism, `DistributedDataParallel(device_mesh=)`.

DDP keeps each DTensor as a plain parameter of its local values, on which the spec is recorded. In
the first forward the modules get DTensors made of these parameters in their place, and
`named_parameters` no longer finds them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distclip.sharding.dtensor import layout_on, ranks_by_axis
from distclip.sharding.rank_group import RankGroup
from distclip.sharding.tensor_layout import ParamReader, TensorLayout
from distclip.torch_private import spec_of_localized


def make_reader(modules: Sequence[nn.Module]) -> ParamReader:
    """A reader of the parameters that DDP has made of DTensors."""
    found: dict[int, dict[str, list[int]]] = {}  # by the mesh's id, as in `dtensor.make_reader`

    def read(name: str, param: Tensor) -> TensorLayout | None:
        if isinstance(param, DTensor) or (spec := spec_of_localized(param)) is None:
            return None
        if id(spec.mesh) not in found:
            found[id(spec.mesh)] = ranks_by_axis(spec.mesh)
        return layout_on(name, spec.shape, spec.mesh, spec.placements, found[id(spec.mesh)])

    return read


def ranks_of_ddp(modules: Iterable[nn.Module]) -> RankGroup | None:
    """The ranks that all DistributedDataParallel modules in `modules` average over; else None."""
    inner = (each for module in modules for each in module.modules())
    found = [each for each in inner if isinstance(each, DistributedDataParallel)]
    groups = [cast(dist.ProcessGroup, each.process_group) for each in found]
    if not groups or any(group is not groups[0] for group in groups):
        return None
    return RankGroup.of_group(groups[0], next(found[0].parameters()).device)


def any_localized(params: Iterable[Tensor]) -> bool:
    """Whether DDP has made one of the plain parameters of a DTensor."""
    return _may_be_used() and any(map(spec_of_localized, params))


def hidden_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that `module.named_parameters()` has lost in the first forward."""
    if not _may_be_used():
        return
    for path, inner in cast("Iterator[tuple[str, nn.Module]]", module.named_modules()):
        if isinstance(inner, DistributedDataParallel) and hasattr(inner, "device_mesh"):
            for name, param in _hidden_in(inner):
                yield (f"{path}.{name}" if path else name), param


def _may_be_used() -> bool:
    """Whether DDP has made parameters of DTensors: it imports this then. Looking takes longer."""
    return "torch.distributed.tensor.parallel.ddp" in sys.modules


def _hidden_in(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, inner in cast("Iterator[tuple[str, nn.Module]]", module.named_modules()):
        for name, value in vars(inner).items():
            if isinstance(value, DTensor) and (param := _leaf_of(value)) is not None:
                yield (f"{path}.{name}" if path else name), param


def _leaf_of(tensor: DTensor) -> nn.Parameter | None:
    """The parameter that a DTensor was made of by `DTensor.from_local`."""
    made_by: Any = tensor.grad_fn
    for accumulates, _ in () if made_by is None else made_by.next_functions:
        param = getattr(accumulates, "variable", None)
        if param is not None and spec_of_localized(param) is not None:
            return param
    return None
