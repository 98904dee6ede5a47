"""What torch and distclip answer to the cases of `torch_defects.py`, and whether that is right."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from tests.benchmarks.torch_defects import CASES, Answer, Case, Setup
from tests.support import reference
from tests.support.ranks import RankError, Ranks

NORM_TOLERANCE = 1.2e-7  # one float32 ulp
HANG_S = 5.0  # for a rank whose partners have raised; an answer takes milliseconds
LIMIT_S = 60.0  # for every other answer, under load
Passed = nn.Module | list[nn.Parameter]


def torch_clip(passed: Passed, max_norm: float, norm_type: float) -> Tensor:
    """As torch's documentation says: FSDP1 modules have a method of their own."""
    if isinstance(passed, FullyShardedDataParallel):
        return passed.clip_grad_norm_(max_norm, norm_type)
    norm = nn.utils.clip_grad_norm_(passed, max_norm, norm_type)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def distclip_clip(passed: Passed, max_norm: float, norm_type: float) -> Tensor:
    # Imported here: torch's answers do not depend on distclip.
    return import_module("distclip").clip_grad_norm_(passed, max_norm, norm_type)


LIBRARIES: dict[str, Callable[[Passed, float, float], Tensor]] = {
    "torch": torch_clip,
    "distclip": distclip_clip,
}


@dataclass(frozen=True)
class Measured:
    """What one library answered to one case, by rank; None from a rank that still waits."""

    case: Case
    library: str
    right: Answer | None
    answers: tuple[Answer | None, ...]

    @property
    def answered(self) -> list[Answer]:
        return [answer for answer in self.answers if answer is not None]

    @property
    def hangs(self) -> bool:
        return None in self.answers

    @property
    def is_right(self) -> bool:
        """Every rank has the same bits, they are the right norm, and the gradients are right."""
        case, answers = self.case, self.answered
        if self.right is None or self.hangs:
            return False
        if case.must_refuse or any(answer.error for answer in answers):
            return all(refuses_well(case, answer) for answer in answers)
        largest = max((a.largest for a in answers), key=lambda g: (math.isnan(g), abs(g)))
        one_norm = len({repr(answer.norm) for answer in answers}) == 1
        right_norm = close(answers[0].norm, self.right.norm, NORM_TOLERANCE)
        return one_norm and right_norm and close(largest, self.right.largest, case.grad_tolerance)

    @property
    def text(self) -> str:
        """The cell of the table."""
        answers = self.answered
        errors = [answer.error for answer in answers if answer.error]
        if self.hangs:
            return f"hangs ({len(errors)} of {self.case.ranks} ranks raise)"
        if errors:
            alike = len(errors) == len(answers)
            return errors[0] if alike else f"{errors[0]} on {len(errors)} ranks"
        # Compared as they are shown: NaN is not equal to itself.
        if len(shown := {self.case.show(answer) for answer in answers}) == 1:
            return shown.pop() + deviation(answers[0].norm, self.right and self.right.norm)
        norms = sorted(answer.norm for answer in answers if answer.norm is not None)
        return f"{norms[0]:.5g} to {norms[-1]:.5g} by rank"

    @property
    def right_text(self) -> str:
        return "-" if self.right is None else self.right.error or self.case.show(self.right)

    def as_json(self) -> dict[str, Any]:
        by_rank = [asdict(a) | {"rank": rank} for rank, a in enumerate(self.answers) if a]
        return {"text": self.text, "right": self.is_right, "hangs": self.hangs, "answers": by_rank}


def refuses_well(case: Case, answer: Answer) -> bool:
    """The expected error, which names what it is about, and no gradient has changed."""
    name, word = case.refusal or ("", "")
    return answer.error == name and word in answer.message and answer.largest == answer.before


def close(value: float | None, right: float | None, tolerance: float) -> bool:
    if value is None or right is None or not math.isfinite(right):
        return repr(value) == repr(right)
    return math.isclose(value, right, rel_tol=tolerance)


def deviation(norm: float | None, right: float | None) -> str:
    """How far off a norm is that looks plausible, in percent."""
    if not norm or not right or not math.isfinite(norm) or not math.isfinite(right):
        return ""
    return "" if close(norm, right, NORM_TOLERANCE) else f" ({100 * (norm / right - 1):+.2g} %)"


@functools.cache
def measure(
    key: str, ranks: Ranks, libraries: tuple[str, ...] = tuple(LIBRARIES)
) -> dict[str, Measured]:
    """By library. `ranks` are used only by cases of several ranks, and start anew after a hang."""
    case = CASES[key]
    try:
        asked = ranks.run(ask, key, libraries) if case.ranks > 1 else [ask(key, libraries)]
    except RankError as error:
        failure = Answer(None, 0.0, 0.0, error="RankError", message=str(error))
        return {name: Measured(case, name, None, (failure,) * case.ranks) for name in libraries}
    answers = {name: tuple(each.answers[name] for each in asked) for name in libraries}
    if any(None in found for found in answers.values()):
        ranks.stop()
    return {name: Measured(case, name, asked[0].right, answers[name]) for name in libraries}


@dataclass(frozen=True)
class Asked:
    """On one rank."""

    right: Answer
    answers: dict[str, Answer | None]


def ask(key: str, libraries: Sequence[str]) -> Asked:
    """The right answer and those of the libraries; None if one takes too long."""
    case, right = CASES[key], None
    answers: dict[str, Answer | None] = {}
    for library in reversed(libraries):  # torch comes last because nothing comes after a hang
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            setup = case.build()
        right = right or right_answer(case, setup)
        with contextlib.suppress(Exception):  # what fails here fails as an answer, too
            import_module(library)  # takes seconds
        wait = wait_for if case.ranks > 1 else answer_of
        answers[library] = wait(case, library, setup)
    assert right is not None
    return Asked(right, answers)


def wait_for(case: Case, library: str, setup: Setup) -> Answer | None:
    """Collective."""
    answers: list[Answer] = []
    dist.barrier()
    thread = Thread(target=lambda: answers.append(answer_of(case, library, setup)), daemon=True)
    thread.start()
    thread.join(HANG_S if case.torch_hangs and library == "torch" else LIMIT_S)
    return answers[0] if answers else None


def answer_of(case: Case, library: str, setup: Setup) -> Answer:
    before = largest(gradient_values(setup))
    norm, error, message = None, "", ""
    try:
        norm = LIBRARIES[library](setup.passed, case.max_norm, case.norm_type).item()
    except Exception as raised:  # whatever it is, it is the answer
        error, message = type(raised).__name__, str(raised)
    values = gradient_values(setup)
    num_nan = int(values.isnan().sum())
    return Answer(norm, largest(values), before, num_nan, len(values), error, message)


def right_answer(case: Case, setup: Setup) -> Answer:
    """By the oracle, with torch's coefficient. An infinite limit only asks for the norm."""
    before = largest(flattened(setup.whole))
    if case.must_refuse:
        return Answer(None, before, before, error=case.refusal[0] if case.refusal else "")
    norm = reference.total_norm(setup.whole, case.norm_type).item()
    clipped = setup.whole
    if math.isfinite(case.max_norm):
        clipped = reference.clip_norm(setup.whole, case.max_norm, case.norm_type, eps=1e-6)
    values = flattened(clipped)
    return Answer(norm, largest(values), before, int(values.isnan().sum()), len(values))


def gradient_values(setup: Setup) -> Tensor:
    grads = [param.grad for param in setup.params if param.grad is not None]
    return flattened([g.to_local() if isinstance(g, DTensor) else g for g in grads])


def flattened(tensors: list[Tensor]) -> Tensor:
    empty = torch.empty(0, dtype=torch.float64)
    return torch.cat([empty, *(t.detach().double().flatten() for t in tensors)])


def largest(values: Tensor) -> float:
    return values[values.abs().argmax()].item() if len(values) else 0.0
