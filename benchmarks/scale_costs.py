"""What the collectives of one clipping step cost by the alpha-beta model, from collectives that were counted."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2, prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from benchmarks.scale_ranks import Case, Meshes, gradients, sharded_stage, simulated
from distclip import clip_grad_norm_


@dataclass(frozen=True)
class Collective:
    ranks: int
    payload: int  # bytes


@dataclass(frozen=True)
class Network:
    """Seconds: `call` for each collective, `alpha` for each message; `beta` for each byte."""

    call: float
    alpha: float
    beta: float

    def tree(self, c: Collective) -> float:
        """Reduced along a binomial tree, and broadcast back."""
        return self.call + 2 * ceil(log2(c.ranks)) * (self.alpha + c.payload * self.beta)

    def ring(self, c: Collective) -> float:
        """Reduce-scatter and all-gather around a ring."""
        return self.call + 2 * (c.ranks - 1) * (self.alpha + c.payload / c.ranks * self.beta)


class Noted(CommDebugMode):
    """CommDebugMode counts collectives; this notes how many ranks and bytes each has as well."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        reduces = "all_reduce" in name or "allreduce" in name
        if reduces and not any(issubclass(t, DTensor) for t in types):  # a DTensor's own collectives come after it
            self.collectives.append(_noted(*args[:3]))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def checked(self) -> list[Collective]:
        """Those of more than one rank. Raises AssertionError where torch has counted others."""
        assert len(self.collectives) == self.get_total_counts(), self.get_comm_counts()
        return [c for c in self.collectives if c.ranks > 1]


def _noted(values: Any, first: Any, second: Any) -> Collective:
    """From the arguments of `c10d.allreduce_` or of `_c10d_functional.all_reduce`."""
    if isinstance(values, Tensor):
        return Collective(_resolve_process_group(second).size(), values.numel() * values.element_size())
    group = dist.ProcessGroup.unbox(first)
    return Collective(group.size(), sum(v.numel() * v.element_size() for v in values))


# Who reduces what ---------------------------------------------------------------------------------


def torch_step(params: list[Tensor], meshes: Meshes) -> None:
    """torch's functions as torchtitan calls them: a norm for each mesh, made whole, joined over pipeline stages."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for param in params:
        by_mesh.setdefault(param.device_mesh.mesh_dim_names, []).append(param)
    norms = [get_total_norm([p.grad for p in mine]).full_tensor() for mine in by_mesh.values()]
    total = torch.linalg.vector_norm(torch.stack(norms)) ** 2
    if meshes[False].size(0) > 1:
        dist.all_reduce(total, group=meshes[False].get_group("pp"))
    for mine in by_mesh.values():
        clip_grads_with_norm_(mine, 1.0, total**0.5)


def counted(case: Case) -> dict[str, list[Collective]]:
    """What rank 0 starts in one step of distclip and of torch, on the case's meshes with small weights."""
    small = case.shrunk()
    with simulated(small, 0) as meshes:
        params = gradients(sharded_stage(small, meshes, 0, "cpu"))
        with Noted() as ours:
            clip_grad_norm_(params, 1.0)
        with Noted() as theirs:
            torch_step(params, meshes)
    return {"distclip": ours.checked(), "torch": theirs.checked()}


def deepspeed(case: Case, num_groups: int, sub_group_size: float) -> tuple[str, list[Collective]]:
    """Read in DeepSpeed 0.19.8's source (`get_grad_norm_direct`), not run.

    Each parameter group (ZeRO-1/2, here with pipelines or experts) or sub-group (ZeRO-3, elsewhere) has one
    all-reduce over the data-parallel ranks and one over the model-parallel ranks; the group of the experts a
    third one that averages its norm over the ranks with the same experts (`_average_expert_grad_norms`).
    """
    pp, replicate, fsdp, tp = case.dense
    dp, model = replicate * fsdp, pp * tp
    if pp > 1 or case.experts is not None:
        each = [Collective(dp, 4), Collective(model, 4)]
        extra = [] if case.experts is None else [*each, Collective(prod(case.experts[1:3]), 4)]
        return "DeepSpeed ZeRO-1", [c for c in [*each * num_groups, *extra] if c.ranks > 1]
    matrices = case.model.numel / tp / dp  # nearly all elements are in one group, that of the matrices
    num_sub_groups = num_groups - 1 + ceil(matrices / sub_group_size)
    each = [Collective(dp, 8), Collective(model, 8)]
    return "DeepSpeed ZeRO-3", [c for c in each * num_sub_groups if c.ranks > 1]
