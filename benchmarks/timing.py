"""Rivals that do the same work take turns: each answer is checked first, then every round times all of them."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 2  # rounds that are not counted
CHUNK = 1 << 20  # elements that are compared in float64 at a time
STATES = {"not clipping": 10.0, "clipping": 0.3}  # the limit, as a multiple of the norm


@dataclass(frozen=True)
class Rival:
    """One way of doing the work.

    Attributes:
        start: from gradients and a limit to the call that is timed, which returns the total norm.
        tolerance: how far off, relatively, norm and gradients may be. None: it moves bytes and answers nothing.
        needs: what it runs on, told where it cannot run.
    """

    name: str
    start: Callable[[Gradients, float], Callable[[], Any]]
    tolerance: float | None = 1e-2
    needs: str = ""


@dataclass(frozen=True)
class Row:
    """One rival in one case. Without `seconds` it has no speed, and `note` says why."""

    case: str
    state: str
    rival: str
    seconds: Sequence[float] = ()  # of each round
    norm_error: float | None = None
    grad_error: float | None = None
    note: str = ""
    launches: int | None = None
    syncs: int | None = None


@dataclass(frozen=True)
class Together:
    """How the ranks of a run meet; by default there is one."""

    gather: Callable[[Any], list[Any]] = lambda mine: [mine]
    barrier: Callable[[], object] = lambda: None


def host_seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@dataclass
class Gradients:
    """Parameters with gradients, what the gradients were, and their norm in float64.

    Attributes:
        values: the elements of each gradient on this rank.
        flat: the same elements side by side in one buffer, which nobody scales.
    """

    params: list[nn.Parameter]
    values: list[Tensor]
    norm: float
    flat: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.flat = torch.cat([v.flatten() for v in self.values])
        self._saved = [part.view(v.shape) for part, v in zip(self._parts(), self.values, strict=True)]

    def _parts(self) -> Sequence[Tensor]:
        return self.flat.split([v.numel() for v in self.values])

    def restore(self) -> None:
        torch._foreach_copy_(self.values, self._saved)

    def errors(self, norm: Tensor | float, limit: float) -> tuple[float, float]:
        """How far the norm and the worst gradient element are from the right ones, relatively."""
        factor = min(1.0, limit / self.norm)
        pairs = zip(self.values, self._saved, strict=True)
        return abs(float(norm) / self.norm - 1), max(worst_element(v, was, factor) for v, was in pairs)


def float64_norm(tensors: Sequence[Tensor]) -> float:
    return sum(float(c.double().square().sum()) for t in tensors for c in t.flatten().split(CHUNK)) ** 0.5


def worst_element(values: Tensor, was: Tensor, factor: float) -> float:
    """The largest relative error of `values` as `was` times `factor`; below the normal numbers it is absolute."""
    floor = torch.finfo(values.dtype).smallest_normal
    errors = [0.0]
    for new, old in zip(values.flatten().split(CHUNK), was.flatten().split(CHUNK), strict=True):
        if new.numel() and not (factor == 1 and torch.equal(new, old)):
            right = old.double() * factor
            errors.append(float(((new.double() - right).abs() / (right.abs() + floor)).max()))
    return float(torch.tensor(errors).max())  # keeps NaN


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's garbage collector would stop whichever rival happens to be next."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure(
    case: str,
    state: str,
    gradients: Gradients,
    rivals: Sequence[Rival],
    rounds: int,
    together: Together | None = None,
    clock: Callable[[Callable[[], Any]], float] = host_seconds,
) -> list[Row]:
    """One row a rival. The times are those of the slowest rank, from a barrier on.

    Collective: all ranks of `together`.
    """
    together = together or Together()
    limit = STATES[state] * gradients.norm
    checked = [checked_start(case, state, rival, gradients, limit, together) for rival in rivals]
    runs = {row.rival: run for row, run in checked if run is not None}
    prepare = gradients.restore if limit < gradients.norm else (lambda: None)
    taken = in_turn(runs, rounds, prepare, together, clock)
    return [row if row.rival not in taken else with_times(row, taken[row.rival]) for row, _ in checked]


def checked_start(
    case: str, state: str, rival: Rival, gradients: Gradients, limit: float, together: Together
) -> tuple[Row, Callable[[], Any] | None]:
    """The call to time, unless it raises or is wrong on any rank."""
    gradients.restore()
    run, why, errors = None, "", (0.0, 0.0)
    try:
        run = rival.start(gradients, limit)
        answer = run()
        errors = (0.0, 0.0) if rival.tolerance is None else gradients.errors(answer, limit)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        why = f"needs {rival.needs} ({text})" if rival.needs else text
    everywhere = together.gather((why, *errors))
    gradients.restore()
    if failed := [text for text, _, _ in everywhere if text]:
        return Row(case, state, rival.name, note=f"does not run: {failed[0]}"), None
    if rival.tolerance is None:
        return Row(case, state, rival.name), run
    norm_error, grad_error = (largest(error[i] for error in everywhere) for i in (1, 2))
    rounding = torch.finfo(gradients.flat.dtype).eps
    if norm_error <= rival.tolerance and grad_error <= rival.tolerance + rounding:
        return Row(case, state, rival.name, norm_error=norm_error, grad_error=grad_error), run
    note = f"WRONG: the norm is off by {norm_error:.2g}, a gradient by {grad_error:.2g}; not timed"
    return Row(case, state, rival.name, norm_error=norm_error, grad_error=grad_error, note=note), None


def largest(errors: Iterator[float]) -> float:
    """NaN where any is."""
    return float(torch.tensor(list(errors), dtype=torch.float64).max())


def in_turn(
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    prepare: Callable[[], object],
    together: Together,
    clock: Callable[[Callable[[], Any]], float],
) -> dict[str, list[float]]:
    """Seconds of each round by name: in every round all run, in a new random order that the ranks share."""
    order, shuffled = list(runs), random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    with no_collection():
        for _ in range(WARM_UP + rounds):
            shuffled.shuffle(order)
            for name in order:
                prepare()
                together.barrier()
                taken[name].append(clock(runs[name]))
    ranks = together.gather({name: seconds[WARM_UP:] for name, seconds in taken.items()})
    return {name: [max(each) for each in zip(*(rank[name] for rank in ranks), strict=True)] for name in runs}


def with_times(row: Row, seconds: Sequence[float]) -> Row:
    return Row(row.case, row.state, row.rival, seconds, row.norm_error, row.grad_error)


@dataclass(frozen=True)
class Spread:
    """p20, median and p80; of a ratio, the ratio of the medians between quantiles of the ratio of each round."""

    p20: float
    p50: float
    p80: float

    def text(self, factor: float = 1.0) -> str:
        p20, p50, p80 = (f"{factor * p:.3g}" for p in (self.p20, self.p50, self.p80))
        return f"{p50} ({p20} to {p80})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(*torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist())


def ratio(of: Row, to: Row) -> Spread | None:
    """The time of `of` in multiples of that of `to`; None where one was not timed."""
    if not of.seconds or not to.seconds:
        return None
    rounds = spread([a / b for a, b in zip(of.seconds, to.seconds, strict=True)])
    return Spread(rounds.p20, spread(of.seconds).p50 / spread(to.seconds).p50, rounds.p80)


def find(rows: Sequence[Row], case: str, state: str, rival: str) -> Row:
    """The row; one without times where it is missing."""
    names = (case, state, rival)
    return next((row for row in rows if (row.case, row.state, row.rival) == names), Row(*names))
