"""Thousands of ranks in one process: each sampled rank is built by torch's own wrappers under a fake process group."""

from __future__ import annotations

import gc
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.debug import _clear_fast_path_sharding_prop_cache, _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.models import Model, Unit, Weight
from distclip import Clipper, Layout
from distclip.sharding.layout import Held

Meshes = dict[bool, DeviceMesh]  # by Weight.expert


@dataclass(frozen=True)
class Case:
    """A model and the ranks that train it.

    Attributes:
        dense: ranks along (pp, dp_replicate, fsdp, tp).
        experts: the same ranks along (pp, dp_replicate, efsdp, ep), for the experts.
        num_random: of how many ranks the real plan is built, besides the corners.
    """

    model: Model
    dense: tuple[int, int, int, int]
    experts: tuple[int, int, int, int] | None = None
    num_random: int = 2

    @property
    def world(self) -> int:
        return prod(self.dense)

    @property
    def shapes(self) -> dict[bool, tuple[int, int, int, int]]:
        return {False: self.dense} if self.experts is None else {False: self.dense, True: self.experts}

    def coordinates(self, rank: int) -> dict[bool, dict[str, int]]:
        """Where a rank stands on each mesh: the last axis counts fastest."""
        return {expert: _coordinate(rank, shape, _axes(expert)) for expert, shape in self.shapes.items()}

    def units(self, stage: int) -> list[Unit]:
        return self.model.stage(stage, self.dense[0])

    def shrunk(self) -> Case:
        """The same meshes and placements, with small weights and two layers a stage."""
        model, rows = self.model, max(prod(shape[2:]) for shape in self.shapes.values())

        def small(unit: Unit) -> Unit:
            return tuple(replace(w, shape=(w.shape[0] if w.expert else rows, 64, 8)[: len(w.shape)]) for w in unit)

        ends = [tuple(small(unit) for unit in layer) for layer in (model.layers[0], model.layers[-1])]
        layers = (ends[0], ends[1]) * self.dense[0]
        return replace(self, model=Model(model.name, model.source, small(model.embedding), layers, small(model.head)))

    def fsdp_dim(self, weight: Weight) -> int:
        """Experts are cut by their number while it lasts, else within each expert: torchtitan's rule."""
        return int(weight.expert and prod(self.shapes[True][2:]) > weight.shape[0])


def _axes(expert: bool) -> tuple[str, ...]:
    return ("pp", "dp_replicate", *(("efsdp", "ep") if expert else ("fsdp", "tp")))


def _coordinate(rank: int, shape: tuple[int, ...], axes: tuple[str, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    for axis, size in zip(reversed(axes), reversed(shape), strict=True):
        rank, found[axis] = divmod(rank, size)
    return found


# One rank, in full --------------------------------------------------------------------------------


@contextmanager
def simulated(case: Case, rank: int) -> Iterator[Meshes]:
    """This process as one rank of the case, with process groups that answer at once."""
    dist.init_process_group("fake", rank=rank, world_size=case.world, store=FakeStore())
    try:
        yield {e: init_device_mesh("cpu", shape, mesh_dim_names=_axes(e)) for e, shape in case.shapes.items()}
    finally:
        dist.destroy_process_group()
        # torch keeps the specs of results by their inputs, and meshes of two ranks are equal: a parameter made on
        # the second rank would stand where the first one did.
        _clear_sharding_prop_cache()
        _clear_fast_path_sharding_prop_cache()


def sharded_stage(case: Case, meshes: Meshes, stage: int, device: str = "meta") -> nn.Module:
    """One pipeline stage as torch shards it: `distribute_tensor` over tp or ep, then `fully_shard` of each unit."""
    # Sliced once: torch compares and hashes all ranks of each new slice.
    slices = {e: (mesh[_axes(e)[1:3]], mesh[_axes(e)[3]]) for e, mesh in meshes.items()}
    return nn.ModuleList([_sharded_unit(case, *slices[unit[0].expert], unit, device) for unit in case.units(stage)])


def _sharded_unit(case: Case, outer: DeviceMesh, inner: DeviceMesh, unit: Unit, device: str) -> nn.Module:
    module, dim = nn.Module(), case.fsdp_dim(unit[0])
    for weight in unit:
        values = torch.ones(weight.shape, device=device)
        placed = distribute_tensor(values, inner, [_inner(weight)], src_data_rank=None)
        module.register_parameter(weight.name, nn.Parameter(placed))
    return fully_shard(module, mesh=outer, shard_placement_fn=lambda _: Shard(dim))


def _inner(weight: Weight) -> Placement:
    """How tp or ep cuts a weight."""
    dim = 0 if weight.expert else weight.tp
    return Replicate() if dim is None else Shard(dim)


@dataclass
class Measured:
    """What the plans of sampled ranks cost: the most of any rank."""

    plans: int = 0
    tensors: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    megabytes: float = 0.0
    rss_megabytes: float = 0.0

    def note(self, **found: float) -> None:
        for name, value in found.items():
            setattr(self, name, max(getattr(self, name), value))


def sample(case: Case, seed: int = 0) -> list[int]:
    """First and last rank of the first and the last stage, and random ones."""
    stage = case.world // case.dense[0]
    corners = {0, stage - 1, case.world - stage, case.world - 1}
    return sorted(corners | set(random.Random(seed).sample(range(case.world), case.num_random)))


def build_plans(case: Case, ranks: list[int]) -> tuple[dict[Weight, Layout], Measured]:
    """The layout that the real plan of each of `ranks` reads, and what the plans cost.

    Raises:
        AssertionError: the rule as `count` evaluates it for every rank is not what a real plan says.
    """
    layouts: dict[Weight, Layout] = {}
    measured = Measured()
    for rank in ranks:
        stage = case.coordinates(rank)[False]["pp"]
        with simulated(case, rank) as meshes:
            module = sharded_stage(case, meshes, stage)
            plan = _measure(module, measured).plan
        weights = [weight for unit in case.units(stage) for weight in unit]
        for weight, held in zip(weights, plan.params, strict=True):
            _check(case, rank, weight, held, layouts.setdefault(weight, held.layout))
        measured.note(plans=measured.plans + 1, tensors=len(weights))
    return layouts, measured


def _measure(module: nn.Module, measured: Measured) -> Clipper:
    """A Clipper, made once for its time and once more for its memory, since watching memory takes time."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    Clipper(module)
    measured.note(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)
    before = _rss()
    tracemalloc.start()
    clipper = Clipper(module)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    measured.note(megabytes=peak / 1e6, rss_megabytes=(_rss() - before) / 1e6)
    return clipper


def _rss() -> int:
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * 4096


def _check(case: Case, rank: int, weight: Weight, held: Held, layout: Layout) -> None:
    coordinate = case.coordinates(rank)[weight.expert]
    values = held.param
    assert isinstance(values, DTensor)
    assert held.layout == layout, (weight, rank)
    # On the axes of the whole mesh: an expert's axes are those of its own mesh, and the pipeline's.
    assert held.coordinate == coordinate, (weight, rank)
    assert held.counted == layout.counted_at(coordinate), (weight, rank)
    assert values._local_tensor.numel() == local_numel(case, weight, *list(coordinate.values())[:2]), (weight, rank)


# Every rank, by the rule --------------------------------------------------------------------------


def local_numel(case: Case, weight: Weight, inner: int, outer: int) -> int:
    """Elements on the rank at `inner` on tp (or ep) and `outer` on fsdp (or efsdp), by torch's rule.

    As `fully_shard` does: first cut over the inner axis, then what is left over the outer one.
    """
    shape = case.shapes[weight.expert]
    placements = (_inner(weight), Shard(case.fsdp_dim(weight)))
    sizes = (shape[3], shape[2])
    local, _ = _compute_local_shape_and_global_offset(weight.shape, sizes, (inner, outer), placements, skip_offset=True)
    return prod(local)


def count(case: Case, layouts: dict[Weight, Layout]) -> bool:
    """Whether every element is counted exactly once: of all ranks, one for each shard, and their shards add up.

    What cuts a weight is known here from how it was sharded, not from the layout that distclip read.
    """
    counted, counters = Counter[Weight](), Counter[tuple]()
    stages = [Counter(w for unit in case.units(stage) for w in unit) for stage in range(case.dense[0])]
    sizes = {w: _sizes(case, w) for w in layouts}
    for rank in range(case.world):
        at = case.coordinates(rank)
        for weight, times in stages[at[False]["pp"]].items():
            where = at[weight.expert]
            if layouts[weight].counted_at(where):
                inner, outer, _, stage = where.values()
                shard = (weight.name, stage, outer, inner if weight.expert or weight.tp is not None else 0)
                counters[shard] += 1
                counted[weight] += times * sizes[weight][inner][outer]
    whole = sum(stages, Counter[Weight]())
    return max(counters.values()) == 1 and all(counted[w] == times * w.numel for w, times in whole.items())


def _sizes(case: Case, weight: Weight) -> list[list[int]]:
    _, _, outer, inner = case.shapes[weight.expert]
    return [[local_numel(case, weight, i, o) for o in range(outer)] for i in range(inner)]


def gradients(module: nn.Module) -> list[Tensor]:
    """Parameters with gradients of ones, laid out alike."""
    params = list(module.parameters())
    for param in params:
        param.grad = torch.ones_like(param)
    return params
