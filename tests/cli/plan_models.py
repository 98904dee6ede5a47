"""Functions as users of `distclip plan` have them: from a mesh, or nothing, to what they clip."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distclip
from tests.support.layouts import LAYOUTS, Placed

WIDTH, HIDDEN, VOCAB = 10, 14, 23  # of which no mesh of the tests divides all


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)


class Stack(nn.Module):
    """Some of the layers of a model; the first stage has the embedding, the last one the head."""

    def __init__(
        self,
        num_layers: int = 5,
        width: int = WIDTH,
        hidden: int = HIDDEN,
        stage: int = 0,
        num_stages: int = 1,
    ) -> None:
        super().__init__()
        if stage == 0:
            self.embedding = nn.Embedding(VOCAB, width)
        layers = range(num_layers)[stage::num_stages]
        self.layers = nn.ModuleDict({str(i): Block(width, hidden) for i in layers})
        if stage == num_stages - 1:
            self.head = nn.Linear(width, VOCAB, bias=False)


def numel(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def stage(mesh: DeviceMesh, num_layers: int = 5, width: int = WIDTH, hidden: int = HIDDEN) -> Stack:
    """One stage over pp, tensor parallelism over tp, FSDP2 over fsdp; axes that lack do nothing."""
    torch.manual_seed(0)
    axes = mesh.mesh_dim_names or ()
    pp = (mesh.get_local_rank("pp"), mesh["pp"].size()) if "pp" in axes else (0, 1)
    model = Stack(num_layers, width, hidden, *pp)
    for block in model.layers.values():
        if "tp" in axes:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh["tp"], plan)
        if "fsdp" in axes:
            fully_shard(block, mesh=mesh["fsdp"])
    if "fsdp" in axes:
        fully_shard(model, mesh=mesh["fsdp"])
    return model


def forty_layers(mesh: DeviceMesh) -> Stack:
    return stage(mesh, 40, 16_384, 65_536)


def without_mesh() -> Stack:
    return Stack()


def two_parts(mesh: DeviceMesh) -> list[nn.Module]:
    return [stage(mesh), Block(WIDTH, HIDDEN)]


def agc_clipper(mesh: DeviceMesh) -> distclip.Clipper:
    return distclip.Clipper(stage(mesh), distclip.AGC(), mesh=mesh, tensor_norms=10)


def of_two_groups(mesh: DeviceMesh) -> distclip.Clipper:
    layers, model = [], stage(mesh)
    rest = []
    for name, param in model.named_parameters():
        (layers if name.startswith("layers") else rest).append((name, param))
    tensors = {"name": "layers", "params": layers, "policy": distclip.ClipTensorNorm(1.0)}
    return distclip.Clipper([tensors, {"name": "rest", "params": rest}], mesh=mesh)


def clipper_of_a_slice(mesh: DeviceMesh) -> distclip.Clipper:
    """The ranks along tp train together, those along fsdp apart."""
    model = parallelize_module(nn.Linear(WIDTH, 8), mesh["tp"], ColwiseParallel())
    return distclip.Clipper(model, mesh=mesh["tp"])


def laid_out(placed: list[Placed], mesh: DeviceMesh) -> nn.Module:
    """The tensors of one of tests/support/layouts.py; `mesh` is that of the first that has one."""
    meshes = {_shape(mesh): mesh}
    module = nn.ParameterList()
    for each in placed:
        whole = torch.zeros(each.shape)
        if each.placements:
            key = tuple(zip(each.axes, each.mesh_shape, strict=True))
            if key not in meshes:
                meshes[key] = init_device_mesh("cpu", each.mesh_shape, mesh_dim_names=each.axes)
            whole = distribute_tensor(whole, meshes[key], each.placements, src_data_rank=None)
        module.append(nn.Parameter(whole))
    return module


def _shape(mesh: DeviceMesh) -> tuple[Any, ...]:
    return tuple(zip(mesh.mesh_dim_names or (), mesh.mesh.shape, strict=True))


def _mesh_of(placed: list[Placed]) -> str:
    first = next((each for each in placed if each.placements), placed[0])
    return ",".join(f"{a}={n}" for a, n in zip(first.axes, first.mesh_shape, strict=True))


# By their names without spaces: a function, its mesh of four ranks, and the size of the model.
NAMED: dict[str, tuple[Callable[[DeviceMesh], nn.Module], str, int]] = {
    **{
        name.replace(" ", "_"): (
            partial(laid_out, placed),
            _mesh_of(placed),
            sum(prod(each.shape) for each in placed),
        )
        for name, placed in LAYOUTS.items()
    },
    "stages_of_fsdp": (stage, "pp=2,fsdp=2", numel(Stack())),
    "stages_of_tp": (stage, "tp=2,pp=2", numel(Stack())),
}
globals().update({name: function for name, (function, _, _) in NAMED.items()})


_earlier: list[weakref.ref[nn.Module]] = []


def alone(mesh: DeviceMesh) -> nn.Module:
    """Raises where the model of an earlier rank is still in memory."""
    if any(model() is not None for model in _earlier):
        raise RuntimeError("an earlier model is still in memory")
    model = stage(mesh)
    _earlier.append(weakref.ref(model))
    return model


# What cannot be planned.


def no_module(mesh: DeviceMesh) -> None: ...


def no_parts(mesh: DeviceMesh) -> list[nn.Module]:
    return []


def no_parameters(mesh: DeviceMesh) -> nn.Module:
    return nn.ReLU()


def lazy(mesh: DeviceMesh) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))


def raises(mesh: DeviceMesh) -> nn.Module:
    raise KeyError("the vocabulary")


def ends(mesh: DeviceMesh) -> nn.Module:
    sys.exit("no data")


def on_a_gpu(mesh: DeviceMesh) -> nn.Module:
    return stage(mesh).to_empty(device="cuda:7")


def reads_values(mesh: DeviceMesh) -> nn.Module:
    return nn.Linear(int(torch.ones(()).item()), 2)


def of_two_arguments(mesh: DeviceMesh, config: dict[str, int]) -> nn.Module: ...


def scalar() -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.ones(()))])


def on_another_mesh() -> nn.Module:
    return stage(init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "pp")))


def of_other_groups(mesh: DeviceMesh) -> distclip.Clipper:
    """As many groups as the number of its stage."""
    first, *rest = stage(mesh).parameters()
    groups = [{"params": [first]}, *[{"params": rest}] * mesh.get_local_rank("pp")]
    return distclip.Clipper(groups, mesh=mesh)


def talks(mesh: DeviceMesh) -> nn.Module:
    print("from Python")
    print("past the redirection", file=sys.__stdout__)
    os.system("echo from another process")
    return stage(mesh)


no_function = 3
