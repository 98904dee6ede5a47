"""What Megatron-core says of a parameter by attributes on a plain tensor, as a layout."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from distclip import Layout

Axes: TypeAlias = str | tuple[str, ...]


@dataclass(frozen=True)
class MegatronLayouts:
    """`layouts=` for parameters with the attributes of megatron-core; the arguments name the axes of the mesh.

    | attribute                       | read as                                                               |
    |---------------------------------|-----------------------------------------------------------------------|
    | `tensor_model_parallel = True`  | sharded over `tp`, an expert's over `etp`                             |
    | `allreduce = False`             | an expert's: sharded over `ep`                                        |
    | `shared = True`                 | the second copy of a tied embedding: a copy over `pp`, not counted    |
    | none of these                   | as without `layouts=`: copies, except along the mesh's distinct axes  |

    `partition_dim` tells where the parts lie in the whole, which no norm depends on. An axis that is named here but
    not in the mesh is an error only for a parameter that needs it: ignored, the norm would lack the other parts.

    Megatron's optimizers copy these attributes, but not `allreduce`, to their float32 parameters: for those, look
    the model's parameter up by its name and pass that one on.

    Args:
        tp, pp, ep: the axes of tensor, pipeline and expert parallelism.
        etp: the axes that divide one expert; `tp` when omitted.

    Raises:
        LayoutError: `etp` was omitted, but Megatron divides experts otherwise than other tensors.

    Example:
        Megatron's ranks in its default order "tp-cp-ep-dp-pp", and experts of one tensor rank in the place of
        tensor-parallel ranks:

        >>> import torch
        >>> from distclip.adapters import MegatronLayouts, megatron_layouts
        >>> # mesh = init_device_mesh("cuda", (pp, dp, cp, tp), mesh_dim_names=("pp", "dp", "cp", "tp"))
        >>> # distclip.Clipper(model, mesh=mesh, layouts=megatron_layouts)
        >>> # mesh = init_device_mesh("cuda", (pp, edp, ep // tp, tp), mesh_dim_names=("pp", "edp", "ep", "tp"))
        >>> # distclip.Clipper(model, mesh=mesh, layouts=MegatronLayouts(ep=("ep", "tp"), etp=()))
        >>> weight = torch.zeros(2, 3)
        >>> weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, 0, 1
        >>> print(megatron_layouts("weight", weight))
        sharded over tp

    Reference: megatron-core 0.16.1, `core/tensor_parallel/layers.py` and `core/optimizer/optimizer.py`.
    """

    tp: Axes = "tp"
    pp: Axes = "pp"
    ep: Axes = "ep"
    etp: Axes | None = None

    def __call__(self, name: str, param: Tensor) -> Layout | None:
        from distclip.sharding.layout import Layout

        expert = not getattr(param, "allreduce", True)
        sharded = _set(self.ep) if expert else frozenset[str]()
        if getattr(param, "tensor_model_parallel", False):
            sharded |= self._tensor_axes(name, expert)
        replicated = _set(self.pp) if getattr(param, "shared", False) else frozenset[str]()
        return Layout(sharded, replicated) if sharded or replicated else None

    def _tensor_axes(self, name: str, expert: bool) -> frozenset[str]:
        tp, etp = _tensor_ranks()
        if not expert:
            return frozenset() if tp == 1 else _set(self.tp)
        if self.etp is None and tp != etp:
            from distclip.errors import LayoutError

            raise LayoutError(
                f"cannot tell which ranks hold the expert {name!r}: Megatron divides a tensor among {tp} ranks, but an "
                f"expert's among {etp}, so that other ranks than those along {self.tp!r} hold its parts. "
                f"Say which axes do, for example `MegatronLayouts(ep=('ep', 'tp'), etp=())`."
            )
        return frozenset() if etp == 1 else _set(self.tp if self.etp is None else self.etp)


megatron_layouts = MegatronLayouts()


def _tensor_ranks() -> tuple[int | None, int | None]:
    """On how many ranks Megatron divides a tensor, and an expert's; None where it has not set up any.

    It marks parameters as `tensor_model_parallel` on a single tensor rank too, where no axis need be named.
    """
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return None, None
    return (
        state.get_tensor_model_parallel_world_size(),
        state.get_expert_tensor_parallel_world_size(),
    )


def _set(axes: Axes) -> frozenset[str]:
    return frozenset({axes} if isinstance(axes, str) else axes)
