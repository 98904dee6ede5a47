"""Names are those of the bare model, wherever a wrapper stands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

import distclip
from distclip.sharding.names import bare_names
from distclip.sharding.read import named_parameters
from tests.support.ranks import Ranks

CPU = torch.device("cpu")


def bare() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


class Parent(nn.Module):
    """Calls parts of its own `module`, as DDP calls what it wraps."""

    def __init__(self, g: nn.Module, d: nn.Module) -> None:
        super().__init__()
        self.g, self.d = g, d
        self.module = nn.ModuleDict({"module": nn.Linear(2, 2)})


def fsdp1(module: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(module, use_orig_params=True, device_id=CPU)


DDP = DistributedDataParallel
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DDP,
    "compile": torch.compile,
    "ddp of compile": lambda m: DDP(torch.compile(m)),
    "compile of ddp": lambda m: torch.compile(DDP(m)),
    "ddp twice": lambda m: DDP(DDP(m)),
    "compile of ddp of compile": lambda m: torch.compile(DDP(torch.compile(m))),
    "compile of checkpoint of ddp": lambda m: torch.compile(checkpoint_wrapper(DDP(m))),
    "ddp of checkpoint": lambda m: DDP(checkpoint_wrapper(m)),
    "compile of fsdp1": lambda m: torch.compile(fsdp1(m)),
    "fsdp1 of compile": lambda m: fsdp1(torch.compile(m)),
    "data parallel": DataParallel,
}


def loads_into_the_bare_model(wrapper: str) -> None:
    wrap = WRAPPERS[wrapper]
    wholes = {
        "alone": (wrap(bare()), bare()),
        "in a parent": (Parent(wrap(bare()), wrap(bare())), Parent(bare(), bare())),
        "around a parent": (wrap(Parent(bare(), bare())), Parent(bare(), bare())),
    }
    for where, (wrapped, model) in wholes.items():
        names = [name for name, _ in model.named_parameters()]
        clipper = distclip.Clipper(wrapped, distclip.AdaGC())
        assert [param.name for param in clipper.plan.params] == names, where
        assert [shard.name for p in clipper.plan.params for shard in p.shards] == names
        other = distclip.Clipper(model, distclip.AdaGC())
        other.load_state_dict(clipper.state_dict())
        clipper.load_state_dict(other.state_dict())
    parent = wholes["around a parent"][0]
    for exclude in (("g.1.*",), ("module.module.*",), ("d",)):
        policy = distclip.AGC(0.01, exclude=exclude)
        units = distclip.Clipper(parent, policy).plan.groups[0].units
        off = {n for n, on in zip(units.row_names, units.limited.tolist(), strict=True) if not on}
        prefix = exclude[0].rstrip("*")
        assert off == {name for name in units.row_names if name.startswith(prefix)}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_under_wrappers(four_on_cpus: Ranks, wrapper: str) -> None:
    four_on_cpus.run(loads_into_the_bare_model, wrapper)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch imports its own jit
def test_compiled_parts_keep_the_names_of_the_model() -> None:
    model = bare()
    model[0] = torch.compile(model[0])
    model[1].compile()
    names = [name for name, _ in named_parameters(model)]
    assert names == [name for name, _ in bare().named_parameters()]


def test_a_module_of_the_user_keeps_its_name() -> None:
    parent = Parent(bare(), bare())
    bare_name = bare_names(parent)
    assert [bare_name(n) for n, _ in parent.named_parameters()] == [
        name for name, _ in parent.named_parameters()
    ]
    assert bare_names(DataParallel(parent))("module.module.module.weight") == "module.module.weight"


def flat_parameters() -> None:
    model = Parent(FullyShardedDataParallel(bare(), device_id=CPU), nn.Identity())
    clipper = distclip.Clipper(torch.compile(model), distclip.ClipTensorNorm(1.0))
    shards = [shard.name for param in clipper.plan.params for shard in param.shards]
    assert sorted(shards) == sorted(n for n, _ in Parent(bare(), nn.Identity()).named_parameters())


def test_tensors_in_flat_parameters(four_on_cpus: Ranks) -> None:
    four_on_cpus.run(flat_parameters)
