"""Every case of the fault matrix by its number: mixed radix over the rows below."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Container, Iterator
from functools import cache
from typing import Any, NamedTuple

from distclip import (
    AGC,
    AGGC,
    AdaGC,
    AdaGN,
    AutoClip,
    ClipBlockRMS,
    ClipNorm,
    ClipTensorNorm,
    ClipValue,
    SkipSpike,
    ZClip,
)
from tests.support import layouts, wrapped

ORDERS = (1.0, 2.0, 3.0, 8.0, math.inf)
LARGEST = 1e5  # norms above it are vetoed by SkipSpike

# Limits far below the clean gradients.
POLICIES: dict[str, Any] = {
    **{f"ClipNorm p={p:g}": ClipNorm(0.2, p) for p in ORDERS},
    **{f"ClipTensorNorm p={p:g}": ClipTensorNorm(0.1, p) for p in ORDERS},
    **{f"AGC p={p:g}": AGC(0.01, norm_type=p) for p in (1.0, 2.0, math.inf)},
    "ClipValue": ClipValue(0.02),
    "ClipBlockRMS": ClipBlockRMS(0.02),
    "AdaGN": AdaGN(),
    "AGGC": AGGC(beta=0.5, max_down=0.01),
    "AGGC, raises": AGGC(low=8.0, high=0.0, beta=0.5, max_up=math.inf),
    "AdaGC": AdaGC(1.05, max_norm=1.0, beta=0.9, warmup_steps=1),
    "ZClip": ZClip(2.0, alpha=0.9, warmup_steps=1, max_norm=None),
    "AutoClip": AutoClip(10.0, history=8),
    "SkipSpike": SkipSpike(50.0, window=4, max_norm=LARGEST),
    "SkipSpike & ClipNorm": SkipSpike(50.0, window=4, max_norm=LARGEST) & ClipNorm(0.2),
}
# The same policies, where each step is given a loss.
WITH_LOSS = {f"{name}, loss": POLICIES[name] for name in ("SkipSpike", "SkipSpike & ClipNorm")}
POLICIES |= WITH_LOSS

PIPELINE, PLAIN = "pipeline", "plain list"
DTENSORS = {f"DTensors, {name}": name for name in layouts.LAYOUTS if name != "plain"}
LAYOUTS = (*wrapped.WRAPPERS, *DTENSORS, PIPELINE, PLAIN)
# No rank needs another one's gradients, and none is asked: all ranks see the same fault.
UNSHARDED = {*wrapped.UNSHARDED, "DTensors, all copies", PLAIN}
MIXED = {"tp", "DTensors, beside plain"}  # and with plain tensors beside DTensors
HAS_DTENSORS = {*DTENSORS, "fsdp2", "hsdp", "tp", "fsdp2 x tp"}
NUM_RANKS = 4

# One element of one rank's part. Where other ranks have copies of it, theirs stay as they were.
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
FAULTS = (
    *NOT_FINITE,
    "overflow",  # 3e38 everywhere in one rank's part of a parameter: no float32 holds its norm
    "large",  # 1e30 in one element: no float32 holds its square
    "denormal",  # 1e-40 everywhere in one rank's part of a parameter
    "all denormal",  # every gradient times 1e-41
)
IN_LOSS = "loss"  # through backward, where the loss of one rank is not what it should be
GIVEN = "given loss"  # only what one rank gives a policy to judge is wrong; the gradients are right

ROWS: dict[str, tuple[Any, ...]] = {
    "layout": LAYOUTS,
    "policy": tuple(POLICIES),
    "mode": ("propagate", "raise", "skip", "zero"),
    "way": ("clip_", "step", "attach"),
    "optimizer": ("SGD fused", "SGD foreach", "AdamW fused", "AdamW foreach"),
    "scaled": (False, True),
    "overlap": (False, True),
    "fault": FAULTS,
    "rank": tuple(range(NUM_RANKS)),
    "place": ("first", "middle", "last", IN_LOSS, GIVEN),
}
NUM_NUMBERS = math.prod(map(len, ROWS.values()))


class Case(NamedTuple):
    number: int
    layout: str
    policy: str
    mode: Any
    way: str
    optimizer: str
    scaled: bool
    overlap: bool
    fault: str
    rank: int
    place: str

    def __str__(self) -> str:
        words = [self.layout, self.policy, self.mode, self.way, self.optimizer]
        words += ["scaled"] * self.scaled + ["overlap"] * self.overlap
        return f"{self.number}: {', '.join(words)}; {self.fault} on {self.rank}, {self.place}"

    @property
    def fused(self) -> bool:
        return self.optimizer.endswith("fused")

    @property
    def gives_loss(self) -> bool:
        return self.policy in WITH_LOSS

    @property
    def faulty(self) -> int:
        """Which step is the faulty one; a clean one follows. Two losses have a deviation."""
        return 2 if self.gives_loss else 1

    @property
    def hidden_from_scaler(self) -> bool:
        """Whether the scaler unscales, and decides, before the optimizer's step is entered."""
        return self.scaled and self.way == "attach" and not self.fused


def case_of(number: int) -> Case:
    rest, chosen = number, []
    for row in reversed(ROWS.values()):
        rest, index = divmod(rest, len(row))
        chosen.append(row[index])
    return Case(number, *reversed(chosen))


def numbered(case: Case) -> Case:
    """The case with its number."""
    number = 0
    for name, row in ROWS.items():
        number = number * len(row) + row.index(getattr(case, name))
    return case._replace(number=number)


def why_impossible(case: Case) -> str | None:
    """Why no loop can be in this case; None where one can."""
    if case.optimizer == "SGD fused" and case.layout in HAS_DTENSORS:
        return "torch has no fused SGD for DTensors"
    if case.scaled and case.way == "attach" and case.layout in MIXED:
        return "torch's GradScaler unscales DTensors or plain tensors, not both together"
    if case.fault == "all denormal" and (case.rank, case.place) != (0, "first"):
        return "it has no rank and no place: one case stands for all"
    return _why_no_loss(case)


def _why_no_loss(case: Case) -> str | None:
    """The same of the losses: of that of a backward, and of those that a policy is given."""
    if case.gives_loss and case.way == "attach":
        return "an optimizer's step is given no loss"
    if case.gives_loss and case.layout == PLAIN:
        return "nothing says which ranks train together: an error, which other tests have"
    if case.place not in (IN_LOSS, GIVEN):
        return None
    if case.fault not in (*NOT_FINITE, "large"):
        return "a loss times 3e38 or 1e-40 is no fault of another kind"
    if case.place == GIVEN:
        return None if case.gives_loss else "no loss is given"
    is_computed = case.overlap and case.layout in wrapped.WRAPPERS
    return None if is_computed else "only models compute a loss, and only with overlap"


PAIRS = tuple(
    (layout, policy)
    for layout, policy in itertools.product(LAYOUTS, POLICIES)
    if not (layout == PLAIN and policy in WITH_LOSS)
)


def sample(num: int, seed: int, policies: Container[str] = tuple(POLICIES)) -> Iterator[Case]:
    """`num` different possible cases, drawn by `seed`: each policy on each layout equally often.

    A fifth of them has overlap. These run forward and backward on all ranks, and take several
    times as long.
    """
    drawn = random.Random(seed)
    some = [pair for pair in PAIRS if pair[1] in policies]
    pairs = drawn.sample(some, len(some))
    seen: set[int] = set()
    for layout, policy in itertools.islice(itertools.cycle(pairs), num):
        while True:
            rest = {name: drawn.choice(row) for name, row in list(ROWS.items())[2:]}
            case = numbered(Case(0, layout, policy, **rest))
            if case.overlap and drawn.random() > 0.25:
                continue
            if case.number not in seen and why_impossible(case) is None:
                break
        seen.add(case.number)
        yield case


@cache
def num_possible() -> int:
    """How many cases are possible; only the rows that rules name are gone through."""
    names = (*("layout", "way", "optimizer", "scaled", "overlap"), *("fault", "rank", "place"))
    count, rows = 0, [ROWS[name] for name in names]
    for some in (POLICIES.keys() - WITH_LOSS, WITH_LOSS):  # alike to all rules
        one = case_of(0)._replace(policy=min(some))
        for values in itertools.product(*rows):
            case = one._replace(**dict(zip(names, values, strict=True)))
            count += len(some) * (why_impossible(case) is None)
    return count * len(ROWS["mode"])
