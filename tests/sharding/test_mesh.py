"""The ranks that reduce together: what is kept of a user's mesh, and what that changes on it."""

from __future__ import annotations

import copy
import gc
import io
import sys
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

import distclip
from distclip.sharding.mesh import ReduceMesh, _listed
from distclip.sharding.read import read_layouts
from tests.support.ranks import Ranks
from tests.support.wrapped import with_gradients

LEFT_OUT = 2  # ranks of the world that are not on the mesh


def mesh_without_group(device: str) -> DeviceMesh:
    """Several axes, and not all ranks: torch makes no process group over such a mesh."""
    ranks = torch.arange(dist.get_world_size() - LEFT_OUT).view(-1, 1)
    return DeviceMesh(device, ranks, mesh_dim_names=("dp", "tp"))


def sharded_parameter(on: DeviceMesh, placements: Sequence[Placement]) -> nn.Parameter:
    whole = torch.arange(1.0, 7.0).view(2, 3)
    param = nn.Parameter(distribute_tensor(whole, on, placements, src_data_rank=None))
    param.grad = param.detach().clone()
    return param


def saved_and_copied(device: str) -> None:
    on = mesh_without_group(device)
    if on.get_coordinate() is None:
        return
    model = nn.Module()
    model.weight = sharded_parameter(on, [Shard(0), Shard(1)])
    norm = distclip.clip_grad_norm_(model, 1.0)
    torch.testing.assert_close(norm.cpu(), torch.arange(1.0, 7.0).norm())
    twin = copy.deepcopy(model)  # as an average of the weights begins
    assert isinstance(twin.weight, DTensor)
    torch.save(model.state_dict(), io.BytesIO())


def test_parameters_on_a_mesh_can_be_saved_and_copied(four_ranks: Ranks) -> None:
    """No process group may lie on the mesh: it could not be pickled."""
    four_ranks.run(saved_and_copied, four_ranks.device)


def reduce_mesh_outlives_the_mesh(device: str) -> None:
    on = mesh_without_group(device)
    if on.get_coordinate() is None:
        return
    reduce_mesh = ReduceMesh.of(on, ("dp",), from_user=True)
    mesh = weakref.ref(on)
    del on
    gc.collect()  # torch's meshes are in cycles of references
    assert mesh() is None
    assert reduce_mesh.ranks_along("dp") == [0, 1]
    assert reduce_mesh.coordinate == {"dp": dist.get_rank(), "tp": 0}
    assert (reduce_mesh.size("dp"), reduce_mesh.size("tp")) == (2, 1)


def test_a_reduce_mesh_does_not_keep_the_mesh_alive(four_ranks: Ranks) -> None:
    four_ranks.run(reduce_mesh_outlives_the_mesh, four_ranks.device)


def nothing_is_kept(device: str) -> None:
    """With DTensors and with FSDP1, without the help of the collector of cycles."""
    on = init_device_mesh(device, (4,), mesh_dim_names=("dp",))
    model = nn.Module()
    model.weight = sharded_parameter(on, [Shard(0)])
    for module in (model, with_gradients("fsdp1 FULL_SHARD original", device)):
        named = list(module.named_parameters())
        gc.collect()
        gc.disable()
        try:
            before = [sys.getrefcount(held) for held in (module, *module.parameters())]
            read = read_layouts(named, [module])
            reduce_mesh = weakref.ref(read.reduce_mesh)
            assert reduce_mesh() is not None
            del read
            assert reduce_mesh() is None
            assert before == [sys.getrefcount(held) for held in (module, *module.parameters())]
        finally:
            gc.enable()


def test_reading_layouts_keeps_nothing_alive(four_ranks: Ranks) -> None:
    four_ranks.run(nothing_is_kept, four_ranks.device)


def test_many_ranks_are_named_in_short() -> None:
    assert _listed(torch.arange(8).view(2, 4)) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert _listed(torch.arange(1000)) == "0, 1, 2, 3, ..., 999"
