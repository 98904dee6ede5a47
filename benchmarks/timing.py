"""Rivals that do the same work take turns: each answer is checked first, then every round times all of them."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 2  # rounds that are not counted
CHUNK = 1 << 20  # elements that are compared in float64 at a time
Run = Callable[[], Any]
Clock = Callable[[Run], float]
Count = Callable[[Run, Run], dict[str, int]]  # of a call, after a preparation: fields of Row
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
    start: Callable[[Gradients, float], Run]
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


ONE_PROCESS = Together()


def host_seconds(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def nothing(run: Run, prepare: Run) -> dict[str, int]:
    return {}


@dataclass
class Gradients:
    """Parameters with gradients, what the gradients were, and their norm in float64.

    Attributes:
        values: the elements of each gradient on this rank.
        flat: the same elements side by side in one buffer, which nobody scales.
        saved: each gradient's part of it.
    """

    params: list[nn.Parameter]
    values: list[Tensor]
    norm: float
    flat: Tensor = field(init=False)
    saved: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        sizes = [v.numel() for v in self.values]
        self.flat = torch.empty(sum(sizes), dtype=self.values[0].dtype, device=self.values[0].device)
        parts = zip(self.flat.split(sizes), self.values, strict=True)
        self.saved = [part.view(v.shape) for part, v in parts]
        torch._foreach_copy_(self.saved, self.values)

    def restore(self) -> None:
        torch._foreach_copy_(self.values, self.saved)

    def prepare(self, clipping: bool) -> None:
        """Before every call."""
        if clipping:
            self.restore()

    def errors(self, norm: Tensor | float, limit: float) -> tuple[float, float]:
        """How far the norm and the worst gradient element are from the right ones, relatively."""
        factor = min(1.0, limit / self.norm)
        pairs = zip(self.values, self.saved, strict=True)
        return abs(float(norm) / self.norm - 1), largest(worst_element(v, was, factor) for v, was in pairs)


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
    return largest(errors)


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
    factor: float,
    gradients: Gradients,
    rivals: Sequence[Rival],
    rounds: int,
    together: Together = ONE_PROCESS,
    clock: Clock = host_seconds,
    count: Count = nothing,
) -> list[Row]:
    """One row a rival. The times are those of the slowest rank, from a barrier on.

    What raises or is wrong has no times: every rival is checked before the rounds, and once more after them, since a
    call may remember something of those before it.

    Args:
        factor: the limit, as a multiple of the norm.
        count: what else to note of a call.

    Collective: all ranks of `together`.
    """
    limit = factor * gradients.norm
    prepare = partial(gradients.prepare, factor < 1)
    runs = {rival.name: begin(rival, gradients, limit) for rival in rivals}

    def check(row: Row, rival: Rival) -> Row:
        return row if row.note else checked(row, rival, runs[rival.name], gradients, limit, together)

    rows = [check(Row(case, state, rival.name), rival) for rival in rivals]
    right = {row.rival: runs[row.rival] for row in rows if not row.note}
    taken = in_turn(right, rounds, prepare, together, clock)
    for place, (row, rival) in enumerate(zip(rows, rivals, strict=True)):
        if not (again := check(row, rival)).note:
            again = replace(again, seconds=taken[row.rival], **count(right[row.rival], prepare))
        rows[place] = again
    gradients.restore()
    return rows


def begin(rival: Rival, gradients: Gradients, limit: float) -> Run:
    try:
        return rival.start(gradients, limit)
    except Exception as error:
        return partial(reraise, error)


def reraise(error: Exception) -> None:
    raise error


def checked(row: Row, rival: Rival, run: Run, gradients: Gradients, limit: float, together: Together) -> Row:
    """The row with the errors of one call, and a note if it raises or is wrong on any rank."""
    gradients.restore()
    why, errors = "", (0.0, 0.0)
    try:
        answer = run()
        errors = (0.0, 0.0) if rival.tolerance is None else gradients.errors(answer, limit)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        why = f"needs {rival.needs} ({text})" if rival.needs else text
    everywhere = together.gather((why, *errors))
    gradients.restore()
    if failed := [text for text, _, _ in everywhere if text]:
        return replace(row, note=f"does not run: {failed[0]}")
    if rival.tolerance is None:
        return row
    norm_error, grad_error = (largest(rank[i] for rank in everywhere) for i in (1, 2))
    rounding = torch.finfo(gradients.flat.dtype).eps
    right = norm_error <= rival.tolerance and grad_error <= rival.tolerance + rounding  # false for NaN
    note = "" if right else f"WRONG: the norm is off by {norm_error:.2g}, a gradient by {grad_error:.2g}; not timed"
    return replace(row, norm_error=norm_error, grad_error=grad_error, note=note)


def largest(errors: Iterable[float]) -> float:
    """NaN where any is."""
    return float(torch.tensor(list(errors), dtype=torch.float64).max())


def in_turn(
    runs: dict[str, Run],
    rounds: int,
    prepare: Callable[[], object],
    together: Together,
    clock: Clock,
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


@dataclass(frozen=True)
class Spread:
    """p20, median and p80; of a ratio, the ratio of the medians between quantiles of the ratio of each round."""

    p20: float
    p50: float
    p80: float

    def text(self) -> str:
        return f"{self.p50:.3g} ({self.p20:.3g} to {self.p80:.3g})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(*torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist())


def ratio(of: Row, to: Row, factor: float = 1.0) -> Spread | None:
    """The time of `of` in multiples of that of `to`, times `factor`; None where one was not timed."""
    if not of.seconds or not to.seconds:
        return None
    rounds = spread([factor * a / b for a, b in zip(of.seconds, to.seconds, strict=True)])
    return Spread(rounds.p20, factor * spread(of.seconds).p50 / spread(to.seconds).p50, rounds.p80)


def find(rows: Sequence[Row], case: str, state: str, rival: str) -> Row:
    """The row; one without times where it is missing."""
    names = (case, state, rival)
    return next((row for row in rows if (row.case, row.state, row.rival) == names), Row(*names))
