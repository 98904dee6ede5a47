"""Ranks that misbehave while the others clip: what the others find, after how long, what is left.

Every case takes new processes, because some of them end in it. The ranks set up with a long timeout
and get a short one just before the fault: a busy machine may take seconds to set up.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import distclip
from distclip import ClipNorm, Clipper, ClipTensorNorm, Layout
from tests.support.layouts import LAYOUTS, lay_out, random_wholes
from tests.support.ranks import Ranks, mesh
from tests.support.wrapped import local, with_gradients

TIMEOUT_S = 5.0  # of the process groups, from the fault on
LATE_S = 1.0  # how long a rank lets the others wait, in which one of them is killed
ODD = 2
LIMIT = 0.5


@dataclass(frozen=True)
class Case:
    """What happens, in which way of clipping, on which layout."""

    fault: str
    way: str = "clip_"
    layout: str = "list"

    def __str__(self) -> str:
        return f"{self.fault}, {self.way}, {self.layout}"


class Found(NamedTuple):
    """What a rank has to say.

    Attributes:
        error: the name of the error's class; empty without an error.
        cause: that of the error that it is chained from.
        seconds: from the fault until the call ended.
        untouched: gradients and weights have the bits that they had when the fault happened.
        whole: each gradient is as it was, or one factor explains all of its elements; each weight
            is as it was, or made the step that its gradient asks for.
        stepped: which weights were stepped.
    """

    error: str
    text: str
    cause: str
    seconds: float
    untouched: bool
    whole: bool
    stepped: tuple[bool, ...]


class MortalRanks(Ranks):
    """Ranks of which some end, with a store in a file, or one that rank 0 keeps."""

    grace_s = 60.0

    def __init__(self, size: int = 4, has_host: bool = False) -> None:
        super().__init__(size)
        self._has_host = has_host

    def _new_store(self) -> str:
        if not self._has_host:
            return super()._new_store()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            return f"localhost:{free.getsockname()[1]}"


def played(case: Case) -> dict[int, Found | str]:
    """What each rank found; a text of a rank that ended, or failed where it should not."""
    ranks = MortalRanks(5 if case.layout == "part" else 4, "keeps the store" in case.fault)
    try:
        return {rank: found for rank, (_, found) in ranks.answers(play, case).items()}
    finally:
        ranks.stop()


@dataclass
class Run:
    """One rank's parameters, and how they are clipped.

    Attributes:
        call: clips, and steps where the way does; its argument is the number of the step.
    """

    way: str
    params: list[nn.Parameter]
    call: Callable[[int], Any]
    clipper: Clipper | None
    first: list[Tensor]
    before: list[Tensor] = field(default_factory=list)
    began: float = 0.0

    def mark(self) -> None:
        """From now on nothing may be written; the gradients are large again."""
        with torch.no_grad():
            for param, grad in zip(self.params, self.first, strict=True):
                if param.grad is not None:
                    local(param.grad).copy_(grad)
        self.before = self.now()
        self.began = time.monotonic()

    def now(self) -> list[Tensor]:
        """Weights, and then gradients; zeros for those that a hook has freed."""
        weights = [local(param).detach().clone() for param in self.params]
        zeros = [torch.zeros_like(grad) for grad in self.first]
        each = zip(self.params, zeros, strict=True)
        return weights + [z if p.grad is None else local(p.grad).clone() for p, z in each]


def play(case: Case) -> Found | None:
    """What one rank found."""
    if (made := _made(case.layout)) is None:
        return None
    source, params, options = made
    first = [local(param.grad).clone() for param in params]
    run = Run(case.way, params, *_way_of(case.way, source, params, options), first)
    run.call(0)
    clipped = [local(p.grad) for p in params if p.grad is not None]
    same = [torch.equal(a, b) for a, b in zip(clipped, first, strict=False) if a.numel()]
    assert not any(same), "nothing was clipped"
    _meet(options)
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_S), group)
    run.mark()
    error: Exception | None = None
    try:
        FAULTS[case.fault](run, dist.get_rank())
    except Exception as raised:
        error = raised
    return _found(case, run, error, time.monotonic() - run.began)


def _made(layout: str) -> tuple[Any, list[nn.Parameter], dict[str, Any]] | None:
    """What a Clipper takes, its parameters with gradients, and options; None on other ranks."""
    if layout in ("list", "part"):  # each rank has its own rows of the whole parameters
        on = mesh((4,), ("dp",))
        shards = Layout(sharded={"dp"})
        if layout == "part":  # no process group has exactly these ranks
            on = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("a", "b"))
            shards = Layout(sharded={"a", "b"})
            if on.get_coordinate() is None:
                return None
        torch.manual_seed(dist.get_rank())
        params = [nn.Parameter(torch.randn(shape)) for shape in [(6, 4), (5,), (3, 2)]]
        for param in params:
            param.grad = torch.randn_like(param)
        return params, params, {"mesh": on, "layouts": lambda *_: shards}
    if layout == "dtensors":
        placed = LAYOUTS["fsdp"]
        params = lay_out(random_wholes(placed, seed=1), placed)
        return params, params, {}
    model = with_gradients(layout, "cpu")
    return model, [p for p in model.parameters() if p.grad is not None], {}


def _meet(options: dict[str, Any]) -> None:
    on: DeviceMesh | None = options.get("mesh")
    for axis in range(0 if on is None else on.ndim):
        dist.barrier(on.get_group(axis))
    if on is None:
        dist.barrier()


def _way_of(
    way: str, source: Any, params: list[nn.Parameter], options: dict[str, Any]
) -> tuple[Callable[[int], Any], Clipper | None]:
    if way == "function":
        return lambda _: distclip.clip_grad_norm_(source, LIMIT, **options), None
    policy = ClipTensorNorm(LIMIT) if way == "in backward" else ClipNorm(LIMIT)
    clipper = Clipper(source, policy, overlap=way == "overlap", **options)
    optimizer = torch.optim.SGD(params, lr=0.1)
    if way == "step":
        return lambda n: clipper.step(optimizer, step=n), clipper
    if way == "attach":
        clipper.attach(optimizer)
        return lambda _: optimizer.step(), clipper
    if way == "in backward":
        return _in_backward(clipper, params), clipper
    return lambda n: clipper.clip_(step=n), clipper


def _in_backward(clipper: Clipper, params: list[nn.Parameter]) -> Callable[[int], Any]:
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in params}
    factors = [local(p.grad).clone() for p in params]
    for param in params:
        param.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    attached = clipper.attach_in_backward(optimizers.values())

    def call(step: int) -> None:
        for param in params:
            param.grad = None
        _backward(params, factors)
        attached.end_step(step=step)
        for param in params:
            param.grad = None

    return call


def _backward(params: list[Any], factors: list[Tensor]) -> None:
    """Leaves `factors` in the gradients."""
    inner = [p.to_local() if hasattr(p, "to_local") else p for p in params]
    torch.stack([(p * f).sum() for p, f in zip(inner, factors, strict=True)]).sum().backward()


def _found(case: Case, run: Run, error: Exception | None, seconds: float) -> Found:
    now, num = run.now(), len(run.params)
    weights, grads = zip(run.before[:num], now[:num], strict=True), run.first
    pairs = [*zip(run.before, now, strict=True)]
    in_backward = case.way == "in backward"  # there gradients come and go
    untouched = all(torch.equal(a, b) for a, b in (pairs[:num] if in_backward else pairs))
    stepped = tuple(not torch.equal(a, b) for a, b in weights)
    whole = all(
        _is_multiple(pairs[i][0] - pairs[i][1], grads[i])
        and (in_backward or _is_multiple(now[num + i], grads[i]))
        for i in range(num)
    )
    name = "" if error is None else type(error).__name__
    cause = "" if error is None or error.__cause__ is None else type(error.__cause__).__name__
    return Found(name, str(error or ""), cause, seconds, untouched, whole, stepped)


def _is_multiple(tensor: Tensor, of: Tensor) -> bool:
    if not of.numel():
        return True
    factor = (tensor * of).sum() / of.square().sum()
    return torch.allclose(tensor, factor * of, rtol=1e-4, atol=1e-6)


# What happens. The call of step 2 is the one that fails. ----------------------------------------


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    """Until the others have given up."""
    goes_on = f"sleep {TIMEOUT_S + 6}; kill -CONT {os.getpid()}"
    subprocess.Popen(["/bin/sh", "-c", goes_on])
    os.kill(os.getpid(), signal.SIGSTOP)


def _before_call(happens: Callable[[], Any], *ranks: int) -> Callable[[Run, int], None]:
    def play(run: Run, rank: int) -> None:
        if rank in ranks:
            happens()
        run.call(2)

    return play


def _killed_in_call(run: Run, rank: int) -> None:
    if rank == ODD:
        threading.Timer(LATE_S / 2, _kill).start()
    if rank == ODD - 1:
        time.sleep(LATE_S)
    run.call(2)
    run.mark()  # in several steps, a rank may have all that it needs, and finds it in its next call
    run.call(3)


def _killed_after_collective(run: Run, rank: int) -> None:
    """It has the norm, and has written nothing yet; the others find it in the next step."""
    if rank == ODD:
        if run.clipper is None or run.way == "in backward":
            run.call(1)
        else:
            run.clipper.decide(step=None if run.way == "attach" else 1)
        _kill()
    run.call(1)
    run.mark()
    run.call(2)


def _hook_raises(run: Run, rank: int) -> None:
    """And the process ends, as Python ends it."""
    if rank == ODD:
        run.params[0].register_hook(_raise)
        with contextlib.suppress(RuntimeError):
            _backward(run.params, run.first)
            raise AssertionError("the hook has not run")
        os._exit(1)
    run.call(2)


def _hook_raises_and_stays(run: Run, rank: int) -> None:
    """The rank does something else then, such as saving what it has."""
    if rank == ODD:
        time.sleep(TIMEOUT_S + 4)
        _raise()
    run.call(2)


def _raise(*_: Any) -> None:
    raise RuntimeError("a hook has raised")


def _call_left_out(run: Run, rank: int) -> None:
    if rank != ODD:
        run.call(2)
    run.call(3)


def _call_once_more(run: Run, rank: int) -> None:
    run.call(2)
    run.mark()
    if rank == ODD:
        run.call(2)
    run.call(3)


def _a_call_less(run: Run, rank: int) -> None:
    """Nobody numbers steps, and the last one lacks a rank, which has ended its loop."""
    if rank != ODD:
        run.call(2)


def _other_size(run: Run, rank: int) -> None:
    """Its message is longer: there it has a number for each tensor."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(30)]
    policy = ClipTensorNorm(1.0) if rank == ODD else ClipNorm(1.0)
    _sharded_clipper(params, policy).clip_()


def _not_made(run: Run, rank: int) -> None:
    policy: Any = "no policy" if rank == ODD else ClipNorm(1.0)
    try:
        clipper = _sharded_clipper(run.params, policy)
    except TypeError:
        time.sleep(TIMEOUT_S + 4)
        raise
    clipper.clip_()


def _sharded_clipper(params: list[nn.Parameter], policy: Any) -> Clipper:
    shards = Layout(sharded={"dp"})
    return Clipper(params, policy, mesh=mesh((4,), ("dp",)), layouts=lambda *_: shards)


FAULTS: dict[str, Callable[[Run, int], None]] = {
    "killed before the call": _before_call(_kill, ODD),
    "killed in the call": _killed_in_call,
    "killed after the collective": _killed_after_collective,
    "two killed": _before_call(_kill, 1, ODD),
    "stopped": _before_call(_stop, ODD),
    "a hook raises": _hook_raises,
    "a hook raises, and the rank stays": _hook_raises_and_stays,
    "a call left out": _call_left_out,
    "a call once more": _call_once_more,
    "a call less at the end": _a_call_less,
    "another policy, with a longer message": _other_size,
    "cannot make a Clipper": _not_made,
    "keeps the store, killed": _before_call(_kill, 0),
    "keeps the store, stopped": _before_call(_stop, 0),
}
