"""`benchmarks.gpu`: the optimizer's step, a loss scale, backward, limits per unit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer

import distclip
from benchmarks.gpu_device import Session
from benchmarks.gradients import random_gradients
from benchmarks.timing import STATES
from distclip.training import optimizers
from tests.benchmarks.models import LLAMA_1B

ALONE, APART, FOLDED, TORCHS = "step alone", "clip_, step", "clipper.step", "torch, step"
GIVEN = "step given a factor"  # which the kernels read, and write every gradient
NOISE = 1.02


def folding(session: Session) -> None:
    """clipper.step() with fused AdamW, where nothing is clipped and where every step is."""
    for dtype in session.pick((torch.bfloat16, torch.float32), (torch.float32,)):
        folding_of(session, dtype)


def folding_of(session: Session, dtype: torch.dtype) -> None:
    shapes = session.pick([w.shape for w in LLAMA_1B.weights], [(10, 10), (7,)])
    work = random_gradients(shapes, dtype, device=session.device)
    optimizer = AdamW(work.params, lr=1e-6, fused=True)
    half = torch.full((), 0.5, device=session.device)
    for state, factor in STATES.items():
        limit = factor * work.norm
        clipper = distclip.Clipper(work.params, distclip.ClipNorm(limit))
        ways: dict[str, Callable[[], object]] = {
            ALONE: optimizer.step,
            GIVEN: partial(step_given, optimizer, half),
            APART: partial(in_turn, clipper.clip_, optimizer.step),
            FOLDED: partial(clipper.step, optimizer),
            TORCHS: partial(
                in_turn, partial(nn.utils.clip_grad_norm_, work.params, limit), optimizer.step
            ),
        }
        us: dict[str, float] = {}
        for name, way in ways.items():
            found = session.time(way, work.restore, 5)
            us[name] = found.device_us
            session.say(what=f"{LLAMA_1B.name}, {dtype}", state=state, by=name, **found.facts())
        what = f"{FOLDED}, {state}, {dtype}, us: as {APART}"
        session.goal(what, us[FOLDED], NOISE * us[APART])


def step_given(optimizer: Optimizer, factor: Tensor) -> None:
    with optimizers.folded(optimizer, factor, None):
        optimizer.step()


def in_turn(*calls: Callable[[], object]) -> None:
    for call in calls:
        call()


def scaler(session: Session) -> None:
    """Under a GradScaler, with an overflow and without, as torch does it with unfused optimizers:
    its fused SGD reads momentum that nobody wrote where the first step overflows.
    """
    kinds: dict[str, tuple[type[Optimizer], dict[str, float]]] = {
        "AdamW": (AdamW, {"lr": 1e-2}),
        "SGD with momentum": (SGD, {"lr": 1e-2, "momentum": 0.9}),
    }
    for (name, (kind, options)), overflow in product(kinds.items(), (None, 0, 2)):
        expected, expected_scale = trained(session, partial(kind, **options), overflow, "torch")
        for fused, way in product((False, True), ("step", "clip_", "attach")):
            if kind is SGD and fused and overflow == 0 and way == "clip_":
                continue  # it is torch that steps
            found, scale = trained(session, partial(kind, **options, fused=fused), overflow, way)
            right = torch.allclose(found, expected, rtol=1e-5, atol=1e-7)
            at = "no overflow" if overflow is None else f"overflow in step {overflow}"
            worst = float((found - expected).abs().max())
            what = f"{name}{', fused' * fused}, {at}, {way}"
            scales = [scale, expected_scale]
            session.check(what, right and scale == expected_scale, worst=worst, scales=scales)


def trained(
    session: Session,
    make: Callable[[Iterable[nn.Parameter]], Optimizer],
    overflow: int | None,
    way: str,
) -> tuple[Tensor, float]:
    """The weights after some steps, and the loss scale."""
    torch.manual_seed(0)
    model = nn.Linear(50, 20).to(session.device)
    optimizer, scaler = make(model.parameters()), GradScaler(session.device.type, init_scale=1024.0)
    clipper = distclip.Clipper(model, distclip.ClipNorm(0.1))
    if way == "attach":
        clipper.attach(optimizer)
    for step in range(4):
        optimizer.zero_grad()
        loss = model(torch.ones(3, 50, device=session.device)).square().sum()
        scaler.scale(loss).backward()
        if step == overflow:
            model.weight.grad[0, 0] = math.inf
        if way == "step":
            clipper.step(optimizer, scaler)
        else:
            if way == "clip_":
                clipper.clip_(optimizer, scaler)
            elif way == "torch":
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
        scaler.update()
    weights = torch.cat([p.detach().double().flatten().cpu() for p in model.parameters()])
    return weights, scaler.get_scale()


def overlap(session: Session) -> None:
    """Backward and clipping of a stack of layers: the wall's clock, as both sides matter."""
    for policy in (distclip.ClipNorm(1.0), distclip.ClipTensorNorm(1.0)):
        stepped(session, policy, "no clipping")
        after = stepped(session, policy, "after backward")
        overlapped = stepped(session, policy, "overlap")
        right = torch.allclose(after, overlapped, rtol=1e-4)
        session.check(f"{policy!r}: the norms of both ways", right, found=overlapped.tolist())


def stepped(session: Session, policy: distclip.Policy, by: str) -> Tensor:
    """The norms of the steps."""
    width, depth, batch = session.pick((2048, 24, 8192), (8, 2, 4))
    dtype = torch.bfloat16 if session.is_cuda else torch.float32
    torch.manual_seed(0)
    layers = [(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width)) for _ in range(depth)]
    model = nn.Sequential(*(each for layer in layers for each in layer)).to(session.device, dtype)
    inputs = torch.randn(batch, width, device=session.device, dtype=dtype)
    clipper = None
    if by != "no clipping":
        clipper = distclip.Clipper(model, policy, overlap=by == "overlap")
    norms: list[Tensor] = []

    def step() -> None:
        model.zero_grad()
        model(inputs).float().square().mean().backward()
        if clipper is not None:
            norms.append(clipper.clip_().total_norm)

    warm, rounds = session.pick((3, 10), (1, 1))
    for _ in range(warm):
        step()
    session.synchronize()
    began = time.perf_counter()
    for _ in range(rounds):
        step()
    host = time.perf_counter() - began
    session.synchronize()
    both = time.perf_counter() - began
    facts = {"step_ms": 1e3 * both / rounds, "host_ms": 1e3 * host / rounds}
    session.say(what=repr(policy), by=by, note="wall clock", **facts)
    return torch.stack(norms) if norms else torch.empty(0)


def units(session: Session) -> None:
    """AGC: limits per row of large matrices, against float64."""
    shapes = session.pick([(4096, 4096), (14_336, 4096), (4096,)], [(6, 5), (4,)])
    for dtype in (torch.bfloat16, torch.float32):
        params = [nn.Parameter(torch.randn(s, device=session.device).to(dtype)) for s in shapes]
        for param in params:
            param.grad = torch.randn_like(param)
        policy = distclip.AGC(0.01)
        clipper = distclip.Clipper(params, policy)
        expected = [agc(param, policy) for param in params]
        clipper.clip_()
        epsilon = torch.finfo(dtype).eps
        pairs = zip(params, expected, strict=True)
        worst = max(float(((p.grad - e).abs() / e.abs().clamp(min=1e-30)).max()) for p, e in pairs)
        session.check(f"AGC, {dtype}", worst <= epsilon, worst_relative_error=worst)
        read = 3 * sum(param.nbytes for param in params)  # the weights too; written once
        found = session.time(clipper.clip_, times=5)
        session.say(what=f"AGC, {len(shapes)} tensors, {dtype}", **found.facts(read))
        del params, expected, clipper


def agc(param: nn.Parameter, policy: distclip.AGC) -> Tensor:
    assert param.grad is not None
    weight, grad = (
        t.detach().double().reshape(len(t) if t.ndim > 1 else 1, -1) for t in (param, param.grad)
    )
    limits = policy.clip_factor * weight.norm(dim=1).clamp(min=policy.eps)
    factors = (limits / grad.norm(dim=1)).clamp(max=1)
    return (grad * factors[:, None]).view(param.shape)
