"""`benchmarks.gpu`: what is compiled when, CUDA graphs, streams, deterministic mode."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

import distclip
from benchmarks.gpu_device import Session
from distclip import kernels


def first_calls(session: Session) -> None:
    """Seconds of all that is compiled, in a cache of this run; and nothing is in a first step."""
    for name, call in compiling(session).items():
        session.say(what=name, first_call_s=seconds(session, call))
    if session.is_cuda:
        by = kernels.backend(session.device).__name__
        session.check("Triton runs on this card", by.endswith(".cuda"), found=by)
    for policy in policies():
        module = model(session)
        began = time.perf_counter()
        clipper = distclip.Clipper(module, policy)
        made_s = time.perf_counter() - began
        before = compiled()
        step_s = seconds(session, clipper.clip_)
        new = compiled() - before
        what = f"{policy!r}: nothing is compiled in the first step"
        session.check(what, not new, found=sorted(new), clipper_s=made_s, step_s=step_s)


def compiling(session: Session) -> dict[str, Callable[[], object]]:
    ones = [torch.ones(session.pick(1 << 16, 64), device=session.device)]
    half = session.number(0.5)
    calls: dict[str, Callable[[], object]] = {
        "the choice of the kernels": lambda: kernels.backend(session.device),
        "norms, p = 8": lambda: kernels.norms(ones, 8.0),
        "total": lambda: kernels.total(half.reshape(1), 2.0),
        "coefficients": lambda: kernels.coefficients(half, half),
        "scale_": lambda: kernels.scale_(ones, half),
        "scale_each_": lambda: kernels.scale_each_(ones, half.reshape(1)),
        "clamp_": lambda: kernels.clamp_(ones, half),
        "zero_": lambda: kernels.zero_(ones, half > 1),
    }
    for p in (2.0, 1.0, 3.0, math.inf):
        calls[f"power_sums, p = {p:g}"] = partial(kernels.power_sums, ones, p)
    return calls


def seconds(session: Session, call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    session.synchronize()
    return time.perf_counter() - began


def compiled() -> set[str]:
    """The kernels in the cache of this run."""
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    files = (path for path in cache.rglob("*") if path.suffix in (".cubin", ".hsaco"))
    return {f"{path.parent.name}/{path.name}" for path in files}


def model(session: Session, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    wide = session.pick(400, 9)
    layers = [nn.Linear(30, wide), nn.Linear(wide, 9, dtype=torch.bfloat16)]
    made = nn.Sequential(*layers).to(session.device)
    for param in made.parameters():
        param.grad = torch.randn_like(param)
    return made


def graphs(session: Session) -> None:
    """Captured in each mode, with the addresses of the warm-up and with new ones, and replayed."""
    modes = ("global", "thread_local", "relaxed") if session.is_cuda else ("no capture on a CPU",)
    for mode, fresh in product(modes, (False, True)):
        what = f"{mode}, {'new' if fresh else 'the same'} addresses"
        params = list(model(session).parameters())
        clipper = distclip.Clipper(params, distclip.ClipNorm(0.5))
        clipper.clip_()
        for param in params if fresh else ():
            param.grad = torch.zeros_like(param)
        replay: Callable[[], object] = clipper.clip_
        if session.is_cuda:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, capture_error_mode=mode):
                    clipper.clip_()
            except Exception as raised:
                session.check(what, False, found=f"{type(raised).__name__}: {str(raised)[:200]}")
                session.synchronize()
                continue
            replay = graph.replay
        junk = [torch.full((1000,), 7, device=session.device) for _ in range(100)]
        for seed in (1, 2):
            torch.manual_seed(seed)
            for param in params:
                assert param.grad is not None
                param.grad.normal_()
            replay()
            norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params))
            session.check(f"{what}, replay {seed}", abs(norm / 0.5 - 1) < 2e-3, norm=norm)
        del junk  # alive until here: it has overwritten whatever capture freed


def streams(session: Session) -> None:
    """Many streams, memory that is used again at once, and one list that all of them read."""
    rounds = session.pick(400, 4)
    side = [torch.cuda.Stream() for _ in range(40 if session.is_cuda else 0)]
    shared = [torch.full((2000,), 2.0, device=session.device) for _ in range(3)]
    session.synchronize()
    right: list[Tensor] = []
    for i in range(rounds):
        with torch.cuda.stream(side[i % 40]) if side else nullcontext():
            gradients = [torch.ones(1000 + i, device=session.device) for _ in range(5)]
            found = kernels.power_sums(gradients, 2.0)
            kernels.scale_(gradients, session.number(0.5))
            scaled = torch.stack([(g == 0.5).all() for g in gradients]).all()
            of_shared = (kernels.power_sums(shared, 2.0) == 8000).all()
            right.append((found == 1000 + i).all() & scaled & of_shared)
            del gradients, found, scaled, of_shared
    session.synchronize()
    wrong = sum(not flag for flag in right)
    session.check(f"{rounds} lists on {len(side)} streams", wrong == 0, wrong=wrong)


def deterministic(session: Session) -> None:
    """`use_deterministic_algorithms` raises in no policy; the same gradients give the same bits."""
    torch.use_deterministic_algorithms(True)
    for policy in policies():
        clippers = [distclip.Clipper(model(session), policy) for _ in range(2)]
        try:
            first, second = (clipper.clip_().total_norm for clipper in clippers)
        except RuntimeError as raised:
            session.check(repr(policy), False, found=str(raised)[:300])
            continue
        grads = [[held.param.grad for held in clipper.plan.params] for clipper in clippers]
        same = all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        session.check(repr(policy), same and torch.equal(first, second))


def policies() -> list[distclip.Policy]:
    inf = math.inf
    return [
        *(distclip.ClipNorm(0.5, p) for p in (2.0, 8.0, inf)),
        *(distclip.ClipTensorNorm(0.5, p) for p in (2.0, inf)),
        *(distclip.AGC(norm_type=p) for p in (2.0, inf)),
        distclip.ClipValue(0.5),
        distclip.ClipBlockRMS(0.5),
        distclip.AdaGC(),
        distclip.ZClip(),
        distclip.AutoClip(),
    ]
