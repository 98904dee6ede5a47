"""Thousands of ranks in one process, under torch's fake process group.

Each sampled rank is built by torch's own wrappers; the rule that they show is then counted on all.
"""

from __future__ import annotations

import gc
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import _utils as dtensor_utils

from distclip import Clipper, Layout
from distclip.torch_private import simulated_rank
from tests.benchmarks.models import Model, Unit, Weight

Meshes = dict[bool, DeviceMesh]  # by Weight.expert
Coordinate = dict[str, int]
# The last two shard a weight; torch cuts it over the last one first.
AXES = {True: ("pp", "dp_replicate", "efsdp", "ep"), False: ("pp", "dp_replicate", "fsdp", "tp")}


@dataclass(frozen=True)
class Case:
    """A model and the ranks that train it.

    Attributes:
        dense: ranks along (pp, dp_replicate, fsdp, tp).
        experts: the same ranks along (pp, dp_replicate, efsdp, ep), for the experts.
        num_random: how many random ranks are sampled.
        num_corners: how many are sampled of rank 0, the last rank, the last rank of the first
            pipeline stage, the first rank of the last one.
    """

    model: Model
    dense: tuple[int, int, int, int]
    experts: tuple[int, int, int, int] | None = None
    num_random: int = 2
    num_corners: int = 4

    @property
    def world(self) -> int:
        return prod(self.dense)

    @property
    def shapes(self) -> dict[bool, tuple[int, int, int, int]]:
        """By Weight.expert."""
        return (
            {False: self.dense} if self.experts is None else {False: self.dense, True: self.experts}
        )

    @cached_property
    def coordinates(self) -> dict[bool, list[Coordinate]]:
        """By Weight.expert and rank; the last axis counts fastest."""
        at = {expert: product(*map(range, shape)) for expert, shape in self.shapes.items()}
        return {
            e: [dict(zip(AXES[e], i, strict=True)) for i in indices] for e, indices in at.items()
        }

    def units(self, stage: int) -> list[Unit]:
        return self.model.stage(stage, self.dense[0])

    def placements(self, weight: Weight) -> tuple[Placement, Placement]:
        """Over tp or ep, then over fsdp or efsdp.

        As torchtitan does, efsdp shards the number of experts, or within each expert if there are
        more ranks than experts.
        """
        inner = 0 if weight.expert else weight.tp
        outer = weight.expert and prod(self.shapes[True][2:]) > weight.shape[0]
        return Replicate() if inner is None else Shard(inner), Shard(int(outer))

    def shrunk(self) -> Case:
        """The same meshes and placements, with small weights and two layers in each stage."""
        model, rows = self.model, max(prod(shape[2:]) for shape in self.shapes.values())

        def small(unit: Unit) -> Unit:
            first = [weight.shape[0] if weight.expert else rows for weight in unit]
            return tuple(
                replace(w, shape=(n, 64, 8)[: len(w.shape)])
                for w, n in zip(unit, first, strict=True)
            )

        two = [tuple(map(small, layer)) for layer in (model.layers[0], model.layers[-1])]
        ends = {"embedding": small(model.embedding), "head": small(model.head)}
        return replace(self, model=replace(model, layers=(*two,) * self.dense[0], **ends))


@contextmanager
def simulated(case: Case, rank: int) -> Iterator[Meshes]:
    """This process as one rank of the case, with process groups that answer at once."""
    with simulated_rank(rank, case.world):
        shapes = case.shapes.items()
        yield {e: init_device_mesh("cpu", shape, mesh_dim_names=AXES[e]) for e, shape in shapes}


def sharded_stage(case: Case, meshes: Meshes, stage: int, device: str = "meta") -> nn.Module:
    """One pipeline stage as torch shards it."""
    # Sliced once: torch compares and hashes all ranks of each new slice.
    slices = {e: (mesh[AXES[e][3]], mesh[AXES[e][1:3]]) for e, mesh in meshes.items()}
    units = case.units(stage)
    return nn.ModuleList(_sharded_unit(case, u, *slices[u[0].expert], device) for u in units)


def _sharded_unit(
    case: Case, unit: Unit, inner: DeviceMesh, outer: DeviceMesh, device: str
) -> nn.Module:
    """`distribute_tensor` over tp or ep, then `fully_shard`."""
    module, shard = nn.Module(), case.placements(unit[0])[1]
    for weight in unit:
        values = torch.ones(weight.shape, device=device)
        placements = case.placements(weight)[:1]
        values = distribute_tensor(values, inner, placements, src_data_rank=None)
        module.register_parameter(weight.name, nn.Parameter(values))
    return fully_shard(module, mesh=outer, shard_placement_fn=lambda _: shard)


def sample(case: Case, seed: int = 0) -> list[int]:
    """The ranks whose plans are built."""
    last, stage = case.world - 1, case.world // case.dense[0]
    corners = {*(0, last, stage - 1, case.world - stage)[: case.num_corners]}
    return sorted(corners | {*random.Random(seed).sample(range(case.world), case.num_random)})


def build_plans(case: Case) -> tuple[dict[Weight, Layout], dict[str, float]]:
    """The layouts that the real plans of sampled ranks read, and what the most expensive cost.

    Raises:
        AssertionError: the rule that `counted_once` evaluates for every rank is not that of a plan.
    """
    layouts: dict[Weight, Layout] = {}
    costs: list[dict[str, float]] = []
    for rank in sample(case):
        stage = case.coordinates[False][rank]["pp"]
        with simulated(case, rank) as meshes:
            clipper, cost = timed_clipper(sharded_stage(case, meshes, stage))
        weights = [weight for unit in case.units(stage) for weight in unit]
        for weight, local in zip(weights, clipper.plan.params, strict=True):
            at = case.coordinates[weight.expert][rank]
            _, _, outer, inner = at.values()
            layout = layouts.setdefault(weight, local.layout)
            assert local.layout == layout, (weight, rank)
            assert local.coordinate == at, (weight, rank)
            assert local.counted == layout.counted_at(at), (weight, rank)
            numel = local_numel(case, weight, inner, outer)
            assert local.param.to_local().numel() == numel, (weight, rank)
        costs.append({**cost, "tensors": len(weights)})
    return layouts, {"plans": len(costs)} | {n: max(cost[n] for cost in costs) for n in costs[0]}


def timed_clipper(module: nn.Module) -> tuple[Clipper, dict[str, float]]:
    """Made once for its time and once for its memory, because watching memory takes time."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    Clipper(module)
    cost = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    before = _rss()
    tracemalloc.start()
    clipper = Clipper(module)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return clipper, {**cost, "megabytes": peak / 1e6, "rss_megabytes": (_rss() - before) / 1e6}


def _rss() -> int:
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * 4096


def local_numel(case: Case, weight: Weight, inner: int, outer: int) -> int:
    """Elements on the rank at `inner` on tp (or ep) and `outer` on fsdp (or efsdp).

    By torch's rule for what `fully_shard` does: first over the inner axis, then over the outer one.
    """
    _, _, num_outer, num_inner = case.shapes[weight.expert]
    sizes, placements = (num_inner, num_outer), case.placements(weight)
    rule = dtensor_utils._compute_local_shape_and_global_offset
    return prod(rule(weight.shape, sizes, [inner, outer], placements, skip_offset=True)[0])


def counted_once(case: Case, layouts: dict[Weight, Layout]) -> bool:
    """Whether of all ranks one counts each shard, and the counted shards add up to each weight.

    Which axes shard a weight comes from how it was sharded, not from the layout that distclip read.
    """
    counted: Counter[Weight] = Counter()
    counters: Counter[Any] = Counter()
    stages = [Counter(w for unit in case.units(i) for w in unit) for i in range(case.dense[0])]
    ranges = {e: [range(n) for n in shape[2:]] for e, shape in case.shapes.items()}
    numel = {
        w: {i: local_numel(case, w, *i[::-1]) for i in product(*ranges[w.expert])} for w in layouts
    }
    for rank in range(case.world):
        for weight, times in stages[case.coordinates[False][rank]["pp"]].items():
            at = case.coordinates[weight.expert][rank]
            if layouts[weight].counted_at(at):
                stage, _, outer, inner = at.values()
                is_cut = isinstance(case.placements(weight)[0], Shard)
                counters[weight.name, stage, outer, inner if is_cut else 0] += 1
                counted[weight] += times * numel[weight][outer, inner]
    total = sum(stages, Counter())
    return max(counters.values()) == 1 and all(counted[w] == n * w.numel for w, n in total.items())
