"""Ranks that misbehave while the others clip: what the others find, after how long, what is left.

Every case takes new processes, because some of them end in it. The ranks set up with a long timeout
and get a short one just before the fault: a busy machine may take seconds to set up.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from distclip import AGC, ClipNorm, Clipper, ClipTensorNorm, Layout
from tests.support.layouts import LAYOUTS, lay_out, random_wholes
from tests.support.ranks import Ranks, mesh
from tests.support.wrapped import local, with_gradients

TIMEOUT_S = 6.0  # of the process groups, from the fault on
LATE_S = 1.5  # how long a rank lets the others wait that are to be hit in a collective
ODD = 2
Call = Callable[[int], Any]


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
        error: the names of the error's classes, the most special first; empty without an error.
        cause: the name of the class that the error is chained from.
        seconds: from the fault until the call ended.
        untouched: the gradients and weights have the bits that they had before the call.
        whole: each tensor is untouched, or clipped and stepped as a whole.
    """

    error: tuple[str, ...]
    text: str
    cause: str
    seconds: float
    untouched: bool
    whole: bool


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

    def play(self, case: Case) -> dict[int, Found | str]:
        """What each rank found; a text of a rank that ended, or raised where it should not."""
        try:
            answers = self.answers(play, case)
            return {rank: found for rank, (_, found) in answers.items()}
        finally:
            self.stop()


@dataclass
class Setup:
    """A model with gradients, and how it is clipped.

    Attributes:
        call: clips, and steps where the way does; its argument is the number of the step.
    """

    params: list[nn.Parameter]
    call: Call
    clipper: Clipper | None


def play(case: Case) -> Found:
    source, params, options = _make(case.layout)
    setup = _set_up(case, source, params, options)
    grads = [local(p.grad).clone() for p in params]
    setup.call(0)
    for param, grad in zip(params, grads, strict=True):
        _write_gradient(param, grad)
    if case.fault == "killed after the collective":
        _call_or_end(setup)
    before = [local(t).detach().clone() for p in params for t in (p, p.grad)]
    dist.barrier()
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_S), group)
    error: BaseException | None = None
    began = time.monotonic()
    try:
        _misbehave(case, setup)
    except Exception as raised:
        error = raised
    seconds = time.monotonic() - began
    after = [local(t).detach() for p in params for t in (p, p.grad)]
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    kinds = () if error is None else tuple(kind.__name__ for kind in type(error).__mro__)
    cause = "" if error is None else type(error.__cause__).__name__
    time.sleep(max(0.0, began + 3 - time.monotonic()))  # ends no connection of the others
    return Found(kinds, str(error), cause, seconds, all(same), _is_whole(case, before, after))


def _make(layout: str) -> tuple[Any, list[nn.Parameter], dict[str, Any]]:
    """What a Clipper takes, and its parameters with gradients."""
    if layout == "list":  # each rank has its own rows of the whole parameters
        torch.manual_seed(dist.get_rank())
        params = [nn.Parameter(torch.randn(shape)) for shape in [(6, 4), (5,), (3, 2)]]
        for param in params:
            param.grad = torch.randn_like(param)
        shards = Layout(sharded={"dp"})
        on = mesh((dist.get_world_size(),), ("dp",))
        return params, params, {"mesh": on, "layouts": lambda *_: shards}
    if layout == "dtensors":
        placed = LAYOUTS["fsdp"]
        params = lay_out(random_wholes(placed, seed=1), placed)
        return params, params, {}
    model = with_gradients(layout, "cpu")
    return model, [p for p in model.parameters() if p.grad is not None], {}


def _set_up(case: Case, source: Any, params: list[nn.Parameter], options: dict[str, Any]) -> Setup:
    if case.way == "function":
        return Setup(params, lambda _: distclip.clip_grad_norm_(source, 0.5, **options), None)
    policy = ClipNorm(0.5)
    if case.way == "in backward":
        policy = ClipTensorNorm(0.5)
    optimizer = torch.optim.SGD(params, lr=0.1)
    clipper = Clipper(source, policy, overlap=case.way == "overlap", **options)
    if case.way == "step":
        return Setup(params, lambda n: clipper.step(optimizer, step=n), clipper)
    if case.way == "attach":
        clipper.attach(optimizer)
        return Setup(params, lambda _: optimizer.step(), clipper)
    if case.way == "in backward":
        return Setup(params, _in_backward(clipper, params), clipper)
    return Setup(params, lambda n: clipper.clip_(step=n), clipper)


def _in_backward(clipper: Clipper, params: list[nn.Parameter]) -> Call:
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in params}
    factors = [local(p.grad).clone() for p in params]
    for param in params:
        param.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    attached = clipper.attach_in_backward(optimizers.values())

    def call(step: int) -> None:
        for param in params:
            param.grad = None
        losses = [(local_of(p) * f).sum() for p, f in zip(params, factors, strict=True)]
        torch.stack(losses).sum().backward()
        attached.end_step(step=step)

    return call


def local_of(param: Any) -> Tensor:
    """With a way back to the parameter for autograd."""
    return param.to_local()


def _write_gradient(param: nn.Parameter, values: Tensor) -> None:
    with torch.no_grad():
        if param.grad is not None:
            local(param.grad).copy_(values)


def _is_whole(case: Case, before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether one factor explains each gradient, and a step each weight."""
    for i in range(0, len(before), 2):
        weight, grad, new_weight, new_grad = before[i], before[i + 1], after[i], after[i + 1]
        factor = new_grad.double().norm() / grad.double().norm() if grad.numel() else 1.0
        close = {"rtol": 1e-5, "atol": 1e-7}
        if not torch.allclose(new_grad.double(), grad.double() * factor, **close):
            return False
        stepped = weight - 0.1 * new_grad
        if not (torch.equal(weight, new_weight) or torch.allclose(stepped, new_weight, **close)):
            return False
    return True


def _call_or_end(setup: Setup) -> None:
    """A rank ends when it has the norm, and has written nothing."""
    if dist.get_rank() != ODD:
        setup.call(1)
        return
    assert setup.clipper is not None
    setup.clipper.decide(step=1)
    os.kill(os.getpid(), signal.SIGKILL)


def _misbehave(case: Case, setup: Setup) -> None:
    rank, fault = dist.get_rank(), case.fault
    if fault in FAULTS:
        FAULTS[fault](setup, rank)
    else:
        raise AssertionError(fault)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_before(setup: Setup, rank: int) -> None:
    if rank == ODD:
        _kill()
    setup.call(2)


def _killed_during(setup: Setup, rank: int) -> None:
    if rank == ODD:
        threading.Timer(LATE_S / 2, _kill).start()
    if rank == ODD - 1:
        time.sleep(LATE_S)
    setup.call(2)


def _two_killed(setup: Setup, rank: int) -> None:
    if rank in (1, ODD):
        _kill()
    setup.call(2)


def _host_killed(setup: Setup, rank: int) -> None:
    if rank == 0:
        _kill()
    setup.call(2)


def _host_stopped(setup: Setup, rank: int) -> None:
    if rank == 0:
        _stop()
    setup.call(2)


def _stop() -> None:
    """Until the others have given up."""
    goes_on = f"sleep {TIMEOUT_S + 4}; kill -CONT {os.getpid()}"
    subprocess.Popen(["/bin/sh", "-c", goes_on])
    os.kill(os.getpid(), signal.SIGSTOP)


def _stopped(setup: Setup, rank: int) -> None:
    if rank == ODD:
        _stop()
    setup.call(2)


def _exits(setup: Setup, rank: int) -> None:
    """As Python does after an error that nobody catches."""
    if rank == ODD:
        sys.stdout.flush()
        os._exit(1)
    setup.call(2)


def _raises_and_stays(setup: Setup, rank: int) -> None:
    """A hook of its own raises, and the rank does something else then, as saving what it has."""
    if rank == ODD:
        time.sleep(TIMEOUT_S + 5)
        raise RuntimeError("a hook has raised")
    setup.call(2)


def _left_out(setup: Setup, rank: int) -> None:
    if rank != ODD:
        setup.call(2)
    setup.call(3)


def _once_more(setup: Setup, rank: int) -> None:
    setup.call(2)
    if rank == ODD:
        setup.call(2)
    setup.call(3)


def _calls_left(setup: Setup, rank: int) -> None:
    """Steps have no numbers here: a rank has made one call less, and is done."""
    if rank != ODD:
        setup.call(2)


def _other_size(setup: Setup, rank: int) -> None:
    params = [*setup.params]
    shards, on = Layout(sharded={"dp"}), mesh((dist.get_world_size(),), ("dp",))
    policy = ClipTensorNorm(1.0) if rank == ODD else ClipNorm(1.0)
    params += [nn.Parameter(torch.ones(2)) for _ in range(30)]
    Clipper(params, policy, mesh=on, layouts=lambda *_: shards).clip_()


def _not_made(setup: Setup, rank: int) -> None:
    """A Clipper cannot be made on one rank, which does something else then."""
    shards, on = Layout(sharded={"dp"}), mesh((dist.get_world_size(),), ("dp",))
    params = setup.params
    if rank == ODD:
        params = [nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)]
    try:
        clipper = Clipper(params, mesh=on, layouts=lambda *_: shards)
    except ValueError:
        time.sleep(TIMEOUT_S + 5)
        raise
    clipper.clip_()


FAULTS: dict[str, Callable[[Setup, int], None]] = {
    "killed before the collective": _killed_before,
    "killed in the collective": _killed_during,
    "killed after the collective": lambda setup, rank: setup.call(2),
    "two killed": _two_killed,
    "exits with its own error": _exits,
    "stopped": _stopped,
    "raises and stays": _raises_and_stays,
    "leaves out a call, steps numbered": _left_out,
    "makes a call once more, steps numbered": _once_more,
    "has made a call less": _calls_left,
    "keeps the store, killed": _host_killed,
    "keeps the store, stopped": _host_stopped,
    "another policy, a message of another size": _other_size,
    "makes no Clipper": _not_made,
}


def all_cases() -> Iterator[Case]:
    for fault in FAULTS:
        yield Case(fault)
