"""What the collectives of one clipping step cost by the alpha-beta model, after counting them."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2, prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from distclip import clip_grad_norm_
from tests.benchmarks.counting import Collective, CollectiveMode
from tests.benchmarks.simulated_ranks import Case, Meshes, sharded_stage, simulated


@dataclass(frozen=True)
class Network:
    """Seconds: `call` for each collective, `alpha` for each message, `beta` for each byte."""

    call: float
    alpha: float
    beta: float

    def tree(self, c: Collective) -> float:
        """Reduced along a binomial tree, and broadcast back."""
        return self.call + 2 * ceil(log2(c.ranks)) * (self.alpha + c.payload * self.beta)

    def ring(self, c: Collective) -> float:
        """Reduce-scatter and all-gather around a ring."""
        return self.call + 2 * (c.ranks - 1) * (self.alpha + c.payload / c.ranks * self.beta)


def torch_step(params: list[Tensor], meshes: Meshes) -> None:
    """As torchtitan calls torch: one norm for each mesh, made whole, combined over the stages."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for param in params:
        by_mesh.setdefault(param.device_mesh.mesh_dim_names, []).append(param)
    norms = [get_total_norm([p.grad for p in ps]).full_tensor() for ps in by_mesh.values()]
    total = torch.linalg.vector_norm(torch.stack(norms)) ** 2
    if meshes[False].size(0) > 1:
        dist.all_reduce(total, group=meshes[False].get_group("pp"))
    for ps in by_mesh.values():
        clip_grads_with_norm_(ps, 1.0, total**0.5)


def collectives(case: Case) -> dict[str, list[Collective]]:
    """What rank 0 starts in one step of distclip and torch, on the same meshes, smaller weights."""
    small = case.shrunk()
    with simulated(small, 0) as meshes:
        params = list(sharded_stage(small, meshes, 0, "cpu").parameters())
        for param in params:
            param.grad = torch.ones_like(param)
        with CollectiveMode() as ours:
            clip_grad_norm_(params, 1.0)
        with CollectiveMode() as theirs:
            torch_step(params, meshes)
    return {"distclip": ours.checked(), "torch": theirs.checked(), **deepspeed(case)}


def deepspeed(
    case: Case, num_groups: int = 2, sub_group_size: float = 1e9
) -> dict[str, list[Collective]]:
    """Read in DeepSpeed 0.19.8's source (`get_grad_norm_direct`), not run.

    Each parameter group (ZeRO-1/2, here with pipelines or experts) or sub-group (ZeRO-3, elsewhere)
    has one all-reduce over the data-parallel and one over the model-parallel ranks; the experts'
    group has a third one, over the ranks with the same experts (`_average_expert_grad_norms`).
    """
    pp, replicate, fsdp, tp = case.dense
    dp, model = replicate * fsdp, pp * tp
    if pp == 1 and case.experts is None:
        in_matrices = case.model.numel / tp / dp  # nearly all elements are in the matrices' group
        num_sub_groups = num_groups - 1 + ceil(in_matrices / sub_group_size)
        found = [Collective(dp, 8), Collective(model, 8)] * num_sub_groups
        return {"DeepSpeed ZeRO-3": [c for c in found if c.ranks > 1]}
    both = [Collective(dp, 4), Collective(model, 4)]
    experts = case.experts and [*both, Collective(prod(case.experts[1:3]), 4)]
    found = both * num_groups + (experts or [])
    return {"DeepSpeed ZeRO-1": [c for c in found if c.ranks > 1]}
