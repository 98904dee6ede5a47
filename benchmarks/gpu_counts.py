"""`benchmarks.gpu`: how often the host waits, and what one call launches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import nn

import distclip
from benchmarks.gpu_checks import policies
from benchmarks.gpu_device import Session

MANY, MOST_LAUNCHES, MOST_HOST_US = 300, 5, 100.0
RULES = ("propagate", "skip", "zero", "raise")
CALLS = ("clip_", "step", "attach")


def host_waits(session: Session) -> None:
    """In each policy x rule x call x overlap, once warm, where gradients stay and where they move.

    "raise" waits by design, once; so does "skip" where the optimizer's step is not folded.
    """
    some = [distclip.ClipNorm(0.5), distclip.ClipTensorNorm(0.5)]
    for policy in session.pick(policies(), some):
        for rule, call, overlap in product(RULES, CALLS, (False, True)):
            if session.tiny and (rule, call) not in (("propagate", "clip_"), ("skip", "step")):
                continue
            expected = 1 if rule == "raise" or (rule == "skip" and call != "clip_") else 0
            what = f"{policy!r}, {rule}, {call}{', overlap' * overlap}"
            try:
                found = waits_of(session, policy, rule, call, overlap)
            except Exception as raised:
                session.check(what, False, found=f"{type(raised).__name__}: {str(raised)[:200]}")
                continue
            right = found is None or found <= expected
            session.check(what, right, host_waits=found, at_most=expected)


def waits_of(
    session: Session, policy: distclip.Policy, rule: str, call: str, overlap: bool
) -> int | None:
    sizes = [(64, 32), (32,), (16, 8)]
    params = [nn.Parameter(torch.randn(size, device=session.device)) for size in sizes]
    optimizer = torch.optim.AdamW(params, fused=True)
    clipper = distclip.Clipper(params, policy, on_nonfinite=rule, overlap=overlap)  # type: ignore[arg-type]
    attached = clipper.attach(optimizer) if call == "attach" else None
    calls: dict[str, Callable[[], object]] = {
        "clip_": clipper.clip_,
        "step": lambda: clipper.step(optimizer),
        "attach": optimizer.step,
    }

    def backward_and_call() -> None:
        optimizer.zero_grad()
        sum((param * param).sum() for param in params).backward()  # type: ignore[union-attr]
        calls[call]()

    for _ in range(session.pick(6, 1)):  # "skip" reads a count that is four steps old
        backward_and_call()
    session.synchronize()
    found = session.host_waits(backward_and_call)
    if attached is not None:
        attached.remove()
    return found


def launches(session: Session) -> None:
    """One warm `clip_` of many tensors: its kernels, Triton's and torch's, and its host time."""
    number, dtypes = session.pick((MANY, (torch.bfloat16, torch.float32)), (3, (torch.float32,)))
    for policy, dtype in product(policies(), dtypes):
        shape = (number, 64, 32)
        params = [nn.Parameter(w) for w in torch.ones(shape, dtype=dtype, device=session.device)]
        for param in params:
            param.grad = torch.randn_like(param)
        clipper = distclip.Clipper(params, policy)
        clipper.clip_()
        found, time = session.launches(clipper.clip_), session.time(clipper.clip_)
        what = f"{policy!r}, {number} tensors, {dtype}"
        session.say(what=what, **(found._asdict() if found else {}), **time.facts())
        if found and policy == distclip.ClipNorm(0.5):
            session.goal(f"kernels of {what}", found.triton + found.torch, MOST_LAUNCHES)
            session.goal(f"host us of {what}", time.host_us, MOST_HOST_US)
