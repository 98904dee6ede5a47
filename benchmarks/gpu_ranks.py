"""`benchmarks.gpu`: NCCL with one rank, and two ranks on one card over gloo."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, AdamW

import distclip
from benchmarks.gpu_device import Session

LIMIT = 0.1


def nccl(session: Session) -> None:
    """World 1, with `device_id`, as trainers start it: what NCCL lacks or forbids shows."""
    if session.is_cuda:
        start(session, "nccl", device_id=session.device)
    else:
        start(session, "gloo")
    numbers = [3.5, math.inf, math.nan]
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
        tensor = torch.tensor(numbers, dtype=torch.float64, device=session.device)
        dist.all_reduce(tensor, op)
        session.check(f"all_reduce of float64, {op}", repr(tensor.tolist()) == repr(numbers))
    one = session.number(1).reshape(1)
    found = session.time(lambda: dist.all_reduce(one))
    session.say(what="all_reduce of 8 bytes, one rank", **found.facts())
    mesh = init_device_mesh(session.device.type, (1,), mesh_dim_names=("dp",))
    each(
        session,
        {
            "DTensor": lambda: sharded_tensors(session, mesh, [Shard(0)]),
            "DTensor on two axes": lambda: sharded_tensors(
                session, grid(session), [Shard(0), Shard(1)]
            ),
            "FSDP2": lambda: training(session, "FSDP2", mesh, False),
            "FSDP2, overlap": lambda: training(session, "FSDP2", mesh, True),
            "DDP, overlap": lambda: training(session, "DDP", mesh, True),
            "symmetric memory": lambda: symmetric_memory(session, mesh),
            "offload, AdamW": lambda: offload(session, mesh, AdamW),
            "offload, Adam": lambda: offload(session, mesh, Adam),
        },
    )


def two_ranks(session: Session) -> None:
    """Every kind of sharding on its own: torch may not support each over gloo on CUDA tensors."""
    start(session, "gloo")  # without device_id: gloo cannot split a group
    mesh = init_device_mesh(session.device.type, (2,), mesh_dim_names=("dp",))
    each(
        session,
        {
            "DTensor": lambda: sharded_tensors(session, mesh, [Shard(0)]),
            "DDP": lambda: training(session, "DDP", mesh, False),
            "DDP, overlap": lambda: training(session, "DDP", mesh, True),
            "FSDP2": lambda: training(session, "FSDP2", mesh, False),
            "FSDP2, overlap": lambda: training(session, "FSDP2", mesh, True),
        },
    )


def start(session: Session, backend: str, device_id: torch.device | None = None) -> None:
    dist.init_process_group(
        backend,
        store=dist.FileStore(session.store, session.num_ranks),
        rank=session.rank,
        world_size=session.num_ranks,
        timeout=timedelta(seconds=session.pick(20, 300)),  # where one rank has raised
        device_id=device_id,
    )


def grid(session: Session) -> DeviceMesh:
    return init_device_mesh(session.device.type, (1, 1), mesh_dim_names=("dp", "tp"))


def each(session: Session, cases: dict[str, Callable[[], None]]) -> None:
    """One that raises is said to have, and the next one goes on. It is wrong if distclip raises, or
    what it calls; what torch cannot do by itself is noted.
    """
    ours = str(Path(distclip.__file__).parent)
    for name, case in cases.items():
        try:
            case()
        except Exception as raised:
            frames = traceback.extract_tb(raised.__traceback__)
            found = f"{type(raised).__name__}: {str(raised)[:300]} ({frames[-1].name})"
            if any(frame.filename.startswith(ours) for frame in frames):
                session.check(name, False, found=found)
            else:
                session.say(what=name, note=f"torch does not run this: {found}")


def sharded_tensors(session: Session, mesh: DeviceMesh, placements: Sequence[Shard]) -> None:
    """What needs an all-reduce only: norms of several p."""
    torch.manual_seed(session.rank)
    local = [torch.randn(100, 50, device=session.device) for _ in range(2)]
    weight, grad = (DTensor.from_local(t, mesh, placements) for t in local)
    param = nn.Parameter(weight)
    param.grad = grad
    for p in (2.0, 3.0, 8.0, math.inf):
        clipper = distclip.Clipper([param], distclip.ClipNorm(math.inf, p), mesh=mesh)
        clipper.plan.verify()
        mine = local[1].double().abs()
        part = mine.max() if math.isinf(p) else mine.pow(p).sum()
        parts: list[float] = [0.0] * session.num_ranks
        dist.all_gather_object(parts, float(part))
        expected = max(parts) if math.isinf(p) else sum(parts) ** (1 / p)
        found = float(clipper.clip_().total_norm)
        name = f"DTensor on {mesh.ndim} axes, p = {p:g}"
        session.check(name, abs(found / expected - 1) < 1e-6, norm=found, expected=expected)


def training(session: Session, kind: str, mesh: DeviceMesh, overlap: bool) -> None:
    """Some steps of backward and `clip_`: the norm, and that of what is left."""
    width = session.pick(1024, 8)
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(6)]
    model: nn.Module = nn.Sequential(*layers).to(session.device)
    if kind == "FSDP2":
        for module in (*layers, model):
            fully_shard(module, mesh=mesh)
    else:
        model = DistributedDataParallel(model, [0] if session.is_cuda else None)
    clipper = distclip.Clipper(model, distclip.ClipNorm(LIMIT), overlap=overlap)
    clipper.plan.verify()
    for step in range(4):
        model.zero_grad()
        torch.manual_seed(10 * step + session.rank)
        model(torch.randn(16, width, device=session.device)).square().sum().backward()
        expected = norm(model)
        found, left = float(clipper.clip_().total_norm), norm(model)
    right = abs(found / expected - 1) < 1e-6 and abs(left / min(LIMIT, expected) - 1) < 1e-5
    name = f"{kind}{', overlap' * overlap}, {session.num_ranks} ranks"
    session.check(name, right, norm=found, expected=expected, left=left)


def norm(model: nn.Module) -> float:
    """Of whole gradients, by float64; `full_tensor` crashes where gloo has CUDA tensors."""
    total = 0.0
    for param in model.parameters():
        assert param.grad is not None
        square = local(param.grad).double().square().sum()
        if isinstance(param.grad, DTensor):  # of one axis, and sharded
            dist.all_reduce(square, group=param.grad.device_mesh.get_group())
        total += float(square)
    return math.sqrt(total)


def symmetric_memory(session: Session, mesh: DeviceMesh) -> None:
    """The norm that comes through it, or by the all-reduce, and then the plan says why."""
    param = nn.Parameter(distribute_tensor(torch.ones(64, device=session.device), mesh, [Shard(0)]))
    clipper = distclip.Clipper([param], distclip.ClipNorm(LIMIT), symmetric_memory=True)
    for _ in range(3):
        param.grad = torch.full_like(param, 2.0)
        found = float(clipper.clip_().total_norm)
    plan = str(clipper.plan)
    session.check("symmetric memory, 1 rank", abs(found / 16 - 1) < 1e-6, norm=found, plan=plan)


def offload(session: Session, mesh: DeviceMesh, kind: type[torch.optim.Optimizer]) -> None:
    """A fused optimizer on the host, with the norm on a device that is late: the same weights as
    without sharding.
    """
    plain, sharded = (nn.Linear(64, 64) for _ in range(2))
    sharded.load_state_dict(plain.state_dict())
    plain = plain.to(session.device)
    policy = CPUOffloadPolicy() if session.is_cuda else None
    fully_shard(sharded, mesh=mesh, **({"offload_policy": policy} if policy else {}))
    first = kind(plain.parameters(), lr=1e-2)  # type: ignore[call-arg]
    second = kind(sharded.parameters(), lr=1e-2, fused=True)  # type: ignore[call-arg]
    clipper = distclip.Clipper(sharded, distclip.ClipNorm(LIMIT))
    for _ in range(20):
        inputs = torch.randn(8, 64, device=session.device)
        for model, optimizer in ((plain, first), (sharded, second)):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), LIMIT)
        first.step()
        if session.is_cuda:
            torch.cuda.synchronize()
            torch.cuda._sleep(20_000_000)
        clipper.step(second)
    worst = max(
        float((a.detach().cpu() - local(b).cpu()).abs().max())
        for a, b in zip(plain.parameters(), sharded.parameters(), strict=True)
    )
    name = f"{kind.__name__}, fused, offloaded to the host"
    session.check(name, worst < 1e-3, worst_difference=worst)


def local(param: Tensor) -> Tensor:
    return param.detach().to_local() if isinstance(param, DTensor) else param.detach()
