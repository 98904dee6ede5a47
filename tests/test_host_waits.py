"""No call makes the host wait for an accelerator where docs/accelerators.md does not say so.

Everything runs on the device of tests/support/accelerator.py, by torch's operators and by the
kernels of CUDA; the table is read from the page.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

import distclip
from distclip import functional, kernels
from distclip.policies import Policy
from tests.support import accelerator
from tests.support.accelerator import NAME, Accelerator, running
from tests.support.host_waits import Watch, table, use_triton
from tests.support.overlap import sizes
from tests.support.ranks import mesh

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(
        not accelerator.can_be_built(), reason=f"no compiler ({accelerator.COMPILER}) here"
    ),
]

DEVICE = f"{NAME}:0"
POLICIES: dict[str, Policy[Any]] = {
    "ClipNorm": distclip.ClipNorm(0.05),
    "ClipNorm p=8": distclip.ClipNorm(0.05, 8.0),
    "ClipNorm p=inf": distclip.ClipNorm(0.05, math.inf),
    "ClipValue": distclip.ClipValue(0.05),
    "ClipTensorNorm": distclip.ClipTensorNorm(0.05),
    "ClipBlockRMS": distclip.ClipBlockRMS(0.05),
    "AdaGC": distclip.AdaGC(),
    "AdaGN": distclip.AdaGN(),
    "AGGC": distclip.AGGC(),
    "AGC": distclip.AGC(),
    "ZClip": distclip.ZClip(),
    "AutoClip": distclip.AutoClip(),
    "SkipSpike": distclip.SkipSpike() & distclip.ClipNorm(0.05),
    "Minimum": distclip.ZClip() & distclip.AutoClip(),
}
MODES = ["propagate", "raise", "skip", "zero"]
EARLIER_STEPS = 5  # before the one that is watched: numbers of 4 steps before are read


class Case(NamedTuple):
    """One call, and what is true of it, in the words of the table."""

    call: str
    facts: frozenset[str]


class Wait(NamedTuple):
    case: Case
    where: str
    what: str


def is_listed(wait: Wait, row: dict[str, str]) -> bool:
    """`a or b, c`: one of the first two, and the third. `where` is a function or a module."""
    if not f"{wait.where}.".startswith(f"{row['where'].strip('`')}."):
        return False
    calls = [call.strip(" `") for call in row["calls"].split(",")]
    if "all" not in calls and wait.case.call not in calls:
        return False
    needed = [need.strip() for need in row["when"].split(",")]
    return needed == ["always"] or all(
        any(word.strip(" `") in wait.case.facts for word in need.split(" or ")) for need in needed
    )


class Watched:
    """Collects the waits of calls; those inside torch alone are not distclip's."""

    def __init__(self) -> None:
        self.waits: set[Wait] = set()

    @contextmanager
    def call(self, name: str, *facts: str) -> Iterator[None]:
        with Watch() as watch:
            yield
        case = Case(name, frozenset(facts))
        self.waits |= {Wait(case, seen.where, seen.what) for seen in watch.waits if seen.where}


def model(backend: str = "torch") -> nn.Module:
    """One layer for Triton's interpreter, which takes its time for each tensor."""
    torch.manual_seed(0)
    widths = [7, 3] if backend == "triton" else [7, 12, 8, 3]
    return nn.Sequential(*itertools.starmap(nn.Linear, itertools.pairwise(widths))).to(DEVICE)


def backward(module: nn.Module, scaler: Any = None) -> None:
    loss = module(torch.randn(6, 7, device=DEVICE)).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()


@functools.cache
def set_up(backend: str) -> None:
    """In each process once."""
    if backend == "triton":
        use_triton()
        for name in ("prepare", "prepare_units"):
            if hasattr(kernels, name):
                setattr(kernels, name, lambda *_: None)  # the interpreter compiles nothing


def waits_of_clipping(backend: str, name: str, mode: str) -> set[Wait]:
    """Without an optimizer."""
    set_up(backend)
    watched, module = Watched(), model(backend)
    for overlap in (False, True):
        facts = [name.split(maxsplit=1)[0], mode, *(["overlap"] if overlap else [])]
        with sizes():  # however small, gradients are measured in backward
            clipper = distclip.Clipper(module, POLICIES[name], on_nonfinite=mode, overlap=overlap)
        for _ in range(EARLIER_STEPS):
            backward(module)
            clipper.clip_()
        with watched.call("backward", *facts):
            backward(module)
        with watched.call("clip_", *facts):
            clipper.clip_()
        backward(module)
        loss = {"loss": torch.ones((), device=DEVICE)} if name == "SkipSpike" else {}
        with watched.call("clip_", "scale", *facts):
            clipper.clip_(scale=0.5, step=7, **loss)
        backward(module)
        with watched.call("decide", *facts):
            decision = clipper.decide()
        with watched.call("apply_", *facts):
            decision.apply_()
    return watched.waits


def step_calls(
    clipper: distclip.Clipper, optimizer: torch.optim.Optimizer, scaler: Any
) -> dict[str, Callable[[], Any]]:
    def attached_step() -> None:
        attached = clipper.attach(optimizer, scaler)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        attached.remove()

    def clip_and_step() -> None:
        clipper.clip_(optimizer, scaler)
        optimizer.step() if scaler is None else scaler.step(optimizer)

    return {
        "step": lambda: clipper.step(optimizer, scaler),
        "attach": attached_step,
        "clip_": clip_and_step,
    }


def waits_of_steps(name: str, mode: str) -> set[Wait]:
    """With optimizers and scalers, for which it does not matter who runs the kernels."""
    watched, module = Watched(), model()
    for overlap in (False, True):
        facts = [name.split(maxsplit=1)[0], mode, *(["overlap"] if overlap else [])]
        with sizes():
            clipper = distclip.Clipper(module, POLICIES[name], on_nonfinite=mode, overlap=overlap)
        for fused, scaled in itertools.product((False, True), repeat=2):
            more = [*facts, *(["fused", "folded"] if fused else ["not fused", "not folded"])]
            more += ["scaler"] if scaled else []
            optimizer = torch.optim.AdamW(module.parameters(), fused=fused)
            scaler = torch.amp.GradScaler(NAME) if scaled else None
            for call, function in step_calls(clipper, optimizer, scaler).items():
                for _ in range(2):  # in the first, the optimizer and the scaler make their states
                    backward(module, scaler)
                    function()
                    if scaler is not None:
                        scaler.update()
                backward(module, scaler)
                with watched.call(call, *more):
                    function()
                if scaler is not None:
                    scaler.update()
    return watched.waits


def waits_of_functions(backend: str) -> set[Wait]:
    set_up(backend)
    watched, module = Watched(), model(backend)
    params = [*module.parameters()]
    backward(module)
    grads = [param.grad for param in params]
    norm = torch.tensor(0.7, device=DEVICE)
    grad = grads[0]
    calls: dict[str, Callable[[], Any]] = {
        "clip_grad_norm_": lambda: distclip.clip_grad_norm_(params, 0.1),
        "get_total_norm": lambda: distclip.get_total_norm(grads),
        "clip_grads_with_norm_": lambda: distclip.clip_grads_with_norm_(params, 0.1, norm),
        "clip_grad_value_": lambda: distclip.clip_grad_value_(params, 0.1),
        "clip_by_norm": lambda: [
            functional.clip_by_norm(grad, 0.1),
            functional.clip_by_norm(grad, 0.1, axes=[1]),
        ],
        "clip_by_global_norm": lambda: functional.clip_by_global_norm(grads, 0.1),
        "clip_by_value": lambda: functional.clip_by_value(grad, -0.1, 0.1),
    }
    for name, function in calls.items():
        for _ in range(EARLIER_STEPS):
            function()
        with watched.call(name):
            function()
    with watched.call("clip_grad_norm_", "error_if_nonfinite"):
        distclip.clip_grad_norm_(params, 0.1, error_if_nonfinite=True)
    return watched.waits


def waits_on_a_mesh(backend: str, name: str, mode: str) -> set[Wait]:
    """Two ranks hold half of each parameter."""
    set_up(backend)
    watched = Watched()
    both = mesh((2,), ("dp",), NAME)

    def sharded(tensor: Tensor, placement: Any) -> DTensor:
        return DTensor.from_local(tensor, both, [placement], run_check=False)

    shapes = [((4, 3), Shard(0)), ((4,), Shard(0)), ((2, 3), Replicate())]
    params = [
        nn.Parameter(sharded(torch.ones(shape, device=DEVICE), placement))
        for shape, placement in shapes
    ]
    facts = [name.split(maxsplit=1)[0], mode, "reduce mesh"]
    clipper = distclip.Clipper(params, POLICIES[name], on_nonfinite=mode)
    for step in range(EARLIER_STEPS + 1):
        for param in params:
            param.grad = sharded(torch.ones_like(param.to_local()), param.placements[0])
        first = ["first step"] if step == 0 else []
        if step in (0, EARLIER_STEPS):
            with watched.call("clip_", *facts, *first):
                clipper.clip_()
        else:
            clipper.clip_()
    return watched.waits


def waits_when_gradients_come_and_go(backend: str, name: str) -> set[Wait]:
    """As of experts that get no token, or of layers that are frozen in turn."""
    set_up(backend)
    watched, module = Watched(), model(backend)
    clipper = distclip.Clipper(module, POLICIES[name])
    for _ in range(2):
        backward(module)
        clipper.clip_()
    module[0].weight.grad = None
    with watched.call("clip_", name.split(maxsplit=1)[0], "new set of gradients"):
        clipper.clip_()
    return watched.waits


ROWS = table("where")
BACKENDS = ["torch", "triton"]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture(scope="module")
def process(backend: str) -> Iterator[Accelerator]:
    """For one backend, which a process cannot change."""
    yield from running(1)


@pytest.fixture(scope="module")
def processes(backend: str) -> Iterator[Accelerator]:
    yield from running(2)


def check(waits: set[Wait]) -> None:
    unlisted = sorted(
        f"{wait.case.call} {sorted(wait.case.facts)}: {wait.where}: {wait.what}"
        for wait in waits
        if not any(is_listed(wait, row) for row in ROWS)
    )
    assert not unlisted, "\n".join(
        ["the host waits, and docs/accelerators.md does not say so:", *unlisted]
    )
    SEEN.update(str(row) for row in ROWS if any(is_listed(wait, row) for wait in waits))


SEEN: set[str] = set()  # rows of the table
# Each calls kernels of its own; the other policies call some of theirs.
INTERPRETED = ["ClipNorm", "ClipNorm p=8", "ClipValue", "ClipTensorNorm", "AGC"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", POLICIES)
def test_clipping(name: str, mode: str, on_accelerator: Accelerator) -> None:
    [waits] = on_accelerator.run(waits_of_clipping, "torch", name, mode)
    check(waits)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("mode", ["propagate", "zero"])
@pytest.mark.parametrize("name", INTERPRETED)
def test_clipping_by_triton(name: str, mode: str, backend: str, process: Accelerator) -> None:
    [waits] = process.run(waits_of_clipping, backend, name, mode)
    check(waits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", POLICIES)
def test_steps(name: str, mode: str, on_accelerator: Accelerator) -> None:
    [waits] = on_accelerator.run(waits_of_steps, name, mode)
    check(waits)


def test_functions(backend: str, process: Accelerator) -> None:
    [waits] = process.run(waits_of_functions, backend)
    check(waits)


@pytest.mark.parametrize("mode", ["propagate", "skip"])
@pytest.mark.parametrize("name", ["ClipNorm", "ClipNorm p=inf", "AGC"])
def test_on_a_mesh(name: str, mode: str, backend: str, processes: Accelerator) -> None:
    for waits in processes.run(waits_on_a_mesh, backend, name, mode):
        check(waits)


@pytest.mark.parametrize("name", ["ClipNorm", "ClipTensorNorm", "AGC"])
def test_gradients_that_come_and_go(name: str, backend: str, process: Accelerator) -> None:
    [waits] = process.run(waits_when_gradients_come_and_go, backend, name)
    check(waits)


def test_every_row_of_the_table_was_seen(request: pytest.FixtureRequest) -> None:
    """By the tests above."""
    options = request.config.option
    if options.keyword or any("::" in name for name in request.config.args):
        pytest.skip("not all tests above have run")
    missing = [row for row in ROWS if str(row) not in SEEN]
    assert not missing, f"docs/accelerators.md lists waits that no call makes: {missing}"
