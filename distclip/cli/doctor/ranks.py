"""Two local ranks: an all-reduce, then clipping of sharded models, compared with float64."""

from __future__ import annotations

import copy
import math
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import distclip
from distclip.cli.doctor.apart import Answer, Call, Check, in_words
from distclip.cli.doctor.finding import Finding
from distclip.cli.doctor.kernels import LIMIT, worst

BACKENDS = ("gloo", "nccl", "mpi", "ucc", "xccl")
_SIZE = 2
TOLERANCE = 1e-4  # the gradients are those of float32 on ranks and of float64 in one process
_ALL_REDUCE = "all-reduce"
_BACKENDS = "backends"


class Wrapper(NamedTuple):
    """A way to spread a model over ranks, which share one batch or have each its own part."""

    wrap: Callable[[nn.Module, DeviceMesh], nn.Module]
    shares_batch: bool = False


class Stage(NamedTuple):
    """What one rank found in one stage; `error` is 0 if all is right, or relative to float64."""

    name: str
    error: float = 0.0
    raised: str = ""


def backends() -> Iterator[Finding]:
    """Which backends this torch was built with."""
    for name in BACKENDS:
        if dist.is_backend_available(name):
            yield Finding(_BACKENDS, name, "ok", "available")
        elif name == "gloo" or (name == "nccl" and torch.version.cuda):
            advice = "use a torch that is built with it, such as that of pip"
            yield Finding(_BACKENDS, name, "warning", "this torch is built without it", advice)
        else:
            yield Finding(_BACKENDS, name, "absent", "this torch is built without it")


def check(backend: str, store: str, timeout: float) -> Check:
    """Both ranks, with a file in which they find each other."""
    calls = [Call(run, (backend, rank, store, timeout)) for rank in range(_SIZE)]
    return Check(f"ranks on {backend}", calls, partial(findings, backend))


def can_use_nccl(found: Iterable[Finding]) -> bool:
    """Whether there is a GPU for each rank."""
    gpus = [one for one in found if one.section == "devices" and one.name.startswith("CUDA:")]
    return len(gpus) >= _SIZE and dist.is_nccl_available()


def run(backend: str, rank: int, store: str, timeout: float) -> Iterator[Stage]:
    """The stages on one rank."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # of a launcher that runs this command
    dist.init_process_group(
        backend,
        f"file://{store}",
        rank=rank,
        world_size=_SIZE,
        timeout=timedelta(seconds=timeout),
    )
    found = torch.tensor([rank + 1.0], device=device)
    dist.all_reduce(found)
    yield Stage(_ALL_REDUCE, abs(found.item() - sum(range(1, _SIZE + 1))))
    mesh = init_device_mesh(device.type, (_SIZE,))
    for name, wrapper in WRAPPERS.items():
        yield _stage(name, wrapper, mesh, rank)


def _stage(name: str, wrapper: Wrapper, mesh: DeviceMesh, rank: int) -> Stage:
    try:
        return Stage(name, clip_error(wrapper, mesh, rank))
    except Exception as error:
        return Stage(name, raised=in_words(error))


def clip_error(wrapper: Wrapper, mesh: DeviceMesh, rank: int) -> float:
    """The larger relative error of the norm of a wrapped model and of what is left of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 8))
    batch = torch.randn(16, 24)
    right = norm_in_one_process(model, batch)
    wrapped = wrapper.wrap(model.to(mesh.device_type), mesh)
    part = batch if wrapper.shares_batch else batch.chunk(_SIZE)[rank]
    loss(wrapped, part.to(mesh.device_type)).backward()
    norm = distclip.clip_grad_norm_(wrapped, LIMIT).item()
    left = distclip.get_total_norm(wrapped).item()
    return worst([abs(norm / right - 1), abs(left / LIMIT - 1)])


def norm_in_one_process(model: nn.Module, batch: Tensor) -> float:
    """The norm of the same gradients, in float64, without a word of distclip."""
    whole = copy.deepcopy(model).double()
    grads = torch.autograd.grad(loss(whole, batch.double()), list(whole.parameters()))
    return math.sqrt(sum(grad.square().sum().item() for grad in grads))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return 100 * model(batch).square().mean()  # times 100: a norm far above the limit


def _ddp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group())


def _fsdp1(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    device = next(model.parameters()).device  # torch asks for it on a CPU
    return FullyShardedDataParallel(model, mesh.get_group(), device_id=device, use_orig_params=True)


def _fsdp2(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _dtensor(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


WRAPPERS = {
    "DDP": Wrapper(_ddp),
    "FSDP1": Wrapper(_fsdp1),
    "FSDP2": Wrapper(_fsdp2),
    "DTensor": Wrapper(_dtensor, shares_batch=True),
}


def findings(backend: str, answers: list[Answer]) -> Iterator[Finding]:
    """One for each stage, from the answers of both ranks."""
    section = f"{_SIZE} local ranks, {backend}"
    failed = ""
    for name in (_ALL_REDUCE, *WRAPPERS):
        line = Finding(section, name, "ok", "", needed=True)
        stages = [stage for answer in answers for stage in answer.values if stage.name == name]
        if failed:
            yield line._replace(status="unusable", found=f"not tried, because {failed} failed")
        elif len(stages) < _SIZE:
            failed = name
            yield line._replace(status="unusable", found=_why(answers), advice=_advice(backend))
        else:
            yield _finding(line, stages)


def _finding(line: Finding, stages: list[Stage]) -> Finding:
    error = worst([stage.error for stage in stages])
    if raised := next((stage.raised for stage in stages if stage.raised), ""):
        if raised.startswith(("ImportError", "ModuleNotFoundError")):
            return line._replace(status="absent", found=f"this torch has none: {raised}")
        advice = "do not train with it here; another torch may help (see the tested one above)"
        return line._replace(status="unusable", found=f"clipping raised {raised}", advice=advice)
    if line.name == _ALL_REDUCE:
        right = error == 0
        found = "right" if right else f"the sum is wrong by {error:g}"
    else:
        right = error <= TOLERANCE
        found = f"clips to within {error:.0e} of float64"
    if right:
        return line._replace(found=found)
    advice = "do not train with it; report this output to distclip"
    return line._replace(status="unusable", found=found, advice=advice)


def _why(answers: list[Answer]) -> str:
    """The errors of the ranks; one that waited for the other says little."""
    errors = [answer.error or "ended early" for answer in answers]
    reasons = [error for error in errors if not error.startswith("no answer")] or errors
    return "; ".join(dict.fromkeys(reasons))


def _advice(backend: str) -> str:
    names = [name for _, name in socket.if_nameindex()]
    variable = "_".join([backend.upper(), "SOCKET_IFNAME"])
    here = f"here: {', '.join(names)}"
    if (value := os.environ.get(variable)) and not set(value.split(",")) <= set(names):
        return f"unset {variable}={value}, or name an interface that exists ({here})"
    advice = f"set {variable} to the interface that leads to the other ranks ({here})"
    if backend == "nccl":
        advice += "; NCCL_DEBUG=INFO shows more; try NCCL_P2P_DISABLE=1"
    return advice
