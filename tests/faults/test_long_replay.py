"""A million steps of the policies that remember: no drift, exact counts, windows that wrap around.

`make test` replays 5,000 steps of each, DISTCLIP_TRUST=1 a million.
"""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Iterator
from decimal import localcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from distclip import Clipper
from distclip.policies import AdaGC, AutoClip, NormContext, SkipSpike, ZClip, accept, state_dict
from distclip.policies.state_dict import GroupState
from tests.faults.exact import DIGITS, Exact, ExactAdaGC, Seen, distance, exact
from tests.faults.hostile import TRUST

NUM_STEPS = 1_000_000 if TRUST else 5_000
CHUNK = 10_000  # steps that are drawn at once
LOOKED_AT = 997  # steps between comparisons of the whole state; a save and a load comes after each
NAMES = ["a", "b", "c"]
# Float64 rounds by 1e-16 in each operation, and an average remembers many of them; of any number of
# steps that were made, not more than those.
CLOSE = 1e-14
POLICIES: dict[str, Any] = {
    "ZClip": ZClip(max_norm=1e3),
    "ZClip, slow": ZClip(z_thresh=1.5, alpha=0.999, warmup_steps=1000, max_norm=1e9),
    "AutoClip": AutoClip(history=500),
    "AutoClip, median": AutoClip(50.0, history=37),
    "AdaGC": AdaGC(),
    "AdaGC, slow": AdaGC(beta=0.99999, warmup_steps=1000, max_norm=0.3),
    "SkipSpike": SkipSpike(z_thresh=2.5),
}


class Found(NamedTuple):
    """
    Attributes:
        limit, state: the largest relative differences to decimal arithmetic.
        near: steps in which rounding decides whether a spike is left out.
    """

    limit: float
    state: float
    num_limited: int
    num_vetoed: int
    near: int


def series(seed: int, num_steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Norms of three tensors, and losses: levels that wander over six decades, spikes, zeros."""
    drawn, level = np.random.default_rng(seed), 0.0
    while num_steps > 0:
        num = min(CHUNK, num_steps)
        num_steps -= num
        levels = level + 0.01 * np.cumsum(drawn.standard_normal(num))
        levels = 7 * np.sin(levels / 7)
        level = float(7 * np.arcsin(levels[-1] / 7))
        norms = np.exp(levels[:, None] + 0.3 * drawn.standard_normal((num, 3)))
        norms *= np.where(drawn.random((num, 1)) < 0.01, 10 ** drawn.uniform(0, 6, (num, 1)), 1.0)
        norms *= drawn.random((num, 1)) > 0.005
        norms *= drawn.random((num, 3)) > 0.02
        losses = 3 * np.sin(levels) + 0.1 * drawn.standard_normal(num)
        # A norm is float64; that of a tensor with one element has the digits of a float32.
        yield (
            torch.from_numpy(norms.astype(np.float32).astype(np.float64)),
            torch.from_numpy(losses),
        )


def replayed(policy: Any, num_steps: int, seed: int) -> Found:
    right, state = exact(policy), policy.init(len(NAMES), torch.device("cpu"))
    per_tensor = isinstance(policy, AdaGC)
    worst_limit = worst_state = 0.0
    step = num_limited = num_vetoed = num_near = 0
    for all_norms, losses in series(seed, num_steps):
        totals = torch.linalg.vector_norm(all_norms, dim=1)
        rows = zip(all_norms.unbind(), totals.unbind(), losses.unbind(), strict=True)
        for each, total, loss in rows:
            norms = each if per_tensor else total
            context = NormContext(torch.ones_like(norms), None, total, loss)
            seen = Seen(np.atleast_1d(norms.numpy()).tolist(), total.item(), loss.item())
            accepted = accept(policy, norms, state, context)
            limit, after = policy.limit(norms, state, context)
            rights = right.limits(seen)
            if limit is not None and rights is not None:
                limits = limit.expand_as(norms).reshape(-1).tolist()
                pairs = zip(limits, rights, strict=True)
                worst_limit = max(worst_limit, *(distance(*pair) for pair in pairs))
                num_limited += any(n > a for n, a in zip(seen.norms, limits, strict=True))
            is_taken, expected = accepted is None or bool(accepted), right.accepts(seen)
            num_near += expected is None
            assert expected in (None, is_taken), (step, seen)
            num_vetoed += not is_taken
            if is_taken:
                state = after
                right.count(seen)
            step += 1
            if step % LOOKED_AT == 0 or step == num_steps:
                worst_state = max(worst_state, state_distance(state, right))
                state = saved_and_loaded(policy, state, by_json=step % 2 == 0)
    return Found(worst_limit, worst_state, num_limited, num_vetoed, num_near)


def close(policy: Any) -> float:
    kept = getattr(policy, "alpha", getattr(policy, "beta", 0.0))
    return CLOSE / (1 - kept)


def state_distance(state: Any, right: Exact[Any], window: float = 0.0) -> float:
    """Counts have to be the same, what windows hold to `window`; averages may be rounded."""
    fields = right.state()
    worst = 0.0
    for name, leaf, expected in zip(state._fields, state, fields, strict=True):
        found = leaf.reshape(-1).tolist()
        scale = fields[0][0] ** 2 if name == "var" else 0.0  # the square of the mean
        apart = max(distance(a, b, scale) for a, b in zip(found, expected, strict=True))
        most = {"history": window, "values": window, "num_steps": 0.0, "counts": 0.0}
        assert apart <= most.get(name, math.inf), (name, found, expected)
        worst = max(worst, apart)
    return worst


def saved_and_loaded(policy: Any, state: Any, by_json: bool) -> Any:
    names = NAMES if isinstance(policy, AdaGC) else None
    first = policy.init(len(NAMES), torch.device("cpu"))
    group = GroupState("model", type(policy).__name__, names, state, policy)
    saved, file = state_dict.to_dict([group]), io.BytesIO()
    if by_json:
        loaded = json.loads(json.dumps(saved, default=Tensor.tolist))
    else:
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file)
    (new,) = state_dict.from_dict([group._replace(state=first)], loaded)
    for a, b in zip(new, state, strict=True):
        assert a.dtype == b.dtype
        assert bits(a) == bits(b)
    return new


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(autouse=True)
def _forty_digits() -> Iterator[None]:
    with localcontext(DIGITS):
        yield


@pytest.mark.timeout(3600 if TRUST else 400)
@pytest.mark.parametrize("name", POLICIES)
def test_no_drift(name: str) -> None:
    torch.set_num_threads(1)
    with torch.inference_mode():
        found = replayed(POLICIES[name], NUM_STEPS, seed=len(name))
    print(name, NUM_STEPS, found)
    assert found.limit < close(POLICIES[name]), found
    assert found.state < close(POLICIES[name]), found
    assert found.num_limited + found.num_vetoed > NUM_STEPS / 1000, found
    assert found.near <= NUM_STEPS / 10_000, found


@pytest.mark.parametrize("name", POLICIES)
def test_a_clipper_keeps_the_same_states(name: str) -> None:
    policy = POLICIES[name]
    clipper, right = made(policy), exact(policy)
    take_steps(clipper, 1200, seed=3, right=right)
    assert int(clipper.skipped) >= 24
    assert state_distance(clipper._held.states[0], right, window=CLOSE) < close(policy)


@pytest.mark.parametrize("name", ["ZClip", "AutoClip, median", "AdaGC", "SkipSpike"])
def test_counters_beyond_what_floats_count(name: str) -> None:
    """2^24 + 1 is no float32, and windows go on where they were."""
    policy = POLICIES[name]
    size = getattr(policy, "window", getattr(policy, "history", 1))
    near = made(policy)
    take_steps(near, 250, seed=1)  # after warm-ups, and with full windows
    saved = near.state_dict()
    right = take_steps(near, 40, seed=2)
    for steps_before in (2**24, 2**31, 2**52):
        more, far, changed = steps_before // size * size, made(policy), copy.deepcopy(saved)
        fields, count = fields_of(changed, policy)
        fields[count] += more
        far.load_state_dict(changed)
        assert take_steps(far, 40, seed=2) == right
        (a, _), (b, _) = (fields_of(each.state_dict(), policy) for each in (far, near))
        assert bool((a[count] - b[count] == more).all())
        assert bool((a[count] > fields[count]).any())


def fields_of(saved: dict[str, Any], policy: Any) -> tuple[dict[str, Any], str]:
    """What a policy saved, and which of it counts its steps."""
    ((_, group),) = saved["groups"].items()
    return group[type(policy).__name__], "counts" if isinstance(policy, SkipSpike) else "num_steps"


def made(policy: Any) -> Clipper:
    named = [(name, torch.nn.Parameter(torch.zeros(1))) for name in NAMES]
    return Clipper(named, policy, on_nonfinite="skip", max_consecutive_skips=math.inf)


def take_steps(
    clipper: Clipper, num_steps: int, seed: int, right: Exact[Any] | None = None
) -> list[bytes]:
    """The bits of the limits and coefficients; a coefficient is 0 where a step is left out."""
    params = [param.param for param in clipper.plan.params]
    found: list[bytes] = []
    for all_norms, losses in series(seed, num_steps):
        for step, (norms, loss) in enumerate(zip(all_norms, losses.tolist(), strict=True)):
            values = norms.float()
            is_broken = step % 50 == 7
            if is_broken:
                values[step % 3] = math.nan
            for param, value in zip(params, values, strict=True):
                param.grad = value.reshape(1).clone()
            report = clipper.clip_(loss=loss if clipper.plan.judges_loss else None)
            found += [bits(report.limit), bits(report.coefficient)]
            total = torch.linalg.vector_norm(norms).item()
            per_tensor = isinstance(right, ExactAdaGC)
            seen = Seen(norms.tolist() if per_tensor else [total], total, loss)
            if right is not None and not is_broken and right.accepts(seen):
                right.count(seen)
    return found
