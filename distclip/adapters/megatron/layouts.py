"""The attributes that Megatron-core sets on plain tensors, read as layouts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor

from distclip.errors import LayoutError
from distclip.sharding.layout import Layout

Axes: TypeAlias = str | tuple[str, ...]


@dataclass(frozen=True)
class MegatronLayouts:
    """`layouts=` for parameters with the attributes of megatron-core.

    | attribute                       | read as                                                    |
    |---------------------------------|------------------------------------------------------------|
    | `tensor_model_parallel = True`  | sharded over `tp`; an expert over `etp`                    |
    | `allreduce = False`             | an expert: sharded over `ep`                               |
    | `shared = True`                 | second copy of a tied embedding: replicated over `pp`      |
    | none of these                   | as without `layouts=`: copies, except along distinct axes  |

    No norm depends on `partition_dim`. An axis that is named here but is not in the mesh is an
    error only for a parameter that needs it: without the axis, the norm would lack the other parts.

    Megatron's optimizers copy these attributes to their float32 parameters, all but `allreduce`.
    For those, look up the model's parameter by its name and pass that one on.

    Args:
        tp, pp, ep: the mesh axes of tensor, pipeline and expert parallelism.
        etp: the axes that split one expert; `tp` if omitted.

    Raises:
        LayoutError: `etp` is omitted, but Megatron does not split experts as it splits other
            tensors.

    Example:
        Megatron's ranks in its default order "tp-cp-ep-dp-pp". The second mesh is for experts that
        are spread over the tensor-parallel ranks too, and not split:

        >>> import torch
        >>> from distclip.adapters import MegatronLayouts, megatron_layouts
        >>> # axes = ("pp", "dp", "cp", "tp")
        >>> # mesh = init_device_mesh("cuda", (pp, dp, cp, tp), mesh_dim_names=axes)
        >>> # distclip.Clipper(model, mesh=mesh, layouts=megatron_layouts)
        >>> # axes = ("pp", "edp", "ep", "tp")
        >>> # mesh = init_device_mesh("cuda", (pp, edp, ep // tp, tp), mesh_dim_names=axes)
        >>> # distclip.Clipper(model, mesh=mesh, layouts=MegatronLayouts(ep=("ep", "tp"), etp=()))
        >>> weight = torch.zeros(2, 3)
        >>> weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, 0, 1
        >>> print(megatron_layouts("weight", weight))
        sharded over tp

    Source: megatron-core 0.16.1, `core/tensor_parallel/layers.py`, `core/optimizer/optimizer.py`.
    """

    tp: Axes = "tp"
    pp: Axes = "pp"
    ep: Axes = "ep"
    etp: Axes | None = None

    def __call__(self, name: str, param: Tensor) -> Layout:
        is_expert = not getattr(param, "allreduce", True)
        sharded = _as_set(self.ep) if is_expert else frozenset[str]()
        if getattr(param, "tensor_model_parallel", False):
            sharded |= self._expert_axes(name) if is_expert else self._tensor_axes()
        is_second_copy = getattr(param, "shared", False)
        replicated = _as_set(self.pp) if is_second_copy else frozenset[str]()
        return Layout(sharded, replicated)  # without axes: copies everywhere, as Megatron has it

    def _tensor_axes(self) -> frozenset[str]:
        return frozenset() if _tensor_parallel_sizes().tensor == 1 else _as_set(self.tp)

    def _expert_axes(self, name: str) -> frozenset[str]:
        tp, etp = _tensor_parallel_sizes()
        if self.etp is None and tp != etp:
            raise LayoutError(
                f"cannot tell which ranks hold the expert {name!r}: Megatron divides a tensor "
                f"among {tp} ranks, but an expert's among {etp}: other ranks than those along "
                f"{self.tp!r} hold its parts. Say which axes do, for example "
                f"`MegatronLayouts(ep=('ep', 'tp'), etp=())`."
            )
        return frozenset() if etp == 1 else _as_set(self.tp if self.etp is None else self.etp)


megatron_layouts = MegatronLayouts()


class _TensorParallelSizes(NamedTuple):
    """How many ranks split a tensor, and an expert; None where Megatron has set up none."""

    tensor: int | None
    expert: int | None


def _tensor_parallel_sizes() -> _TensorParallelSizes:
    # Megatron marks parameters as `tensor_model_parallel` on a single tensor-parallel rank too,
    # where no axis need be named. It is not imported here: where nobody has, nothing is set up.
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return _TensorParallelSizes(None, None)
    return _TensorParallelSizes(
        state.get_tensor_model_parallel_world_size(),
        state.get_expert_tensor_parallel_world_size(),
    )


def _as_set(axes: Axes) -> frozenset[str]:
    return frozenset({axes} if isinstance(axes, str) else axes)
