"""What the ranks saw, as they send it to the judge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.faults.placed import WholeTensor


class Figures(NamedTuple):
    """What one rank was told in one step.

    Attributes:
        error: the name of what was raised; "" for nothing. Where nothing was reported either (a
            scaler has left out the step by itself), `total_norm` is None.
        named: what `report.nonfinite_parameters()` returned.
    """

    error: str = ""
    total_norm: float | None = None
    finite: bool = True
    clipped: bool = False
    skipped: bool = False
    coefficient: float = 1.0
    named: dict[str, list[int]] | None = None
    scale: float = 1.0
    num_skipped: int = 0
    left_behind: tuple[str, ...] = ()


class Step(NamedTuple):
    """One step on one rank.

    Attributes:
        values: float32 [4, elements on this rank]: gradients before, gradients after, weights
            before, weights after.
        reduced: of each parameter, whether a `Partial` gradient was reduced.
        scale: of the loss, before the step.
        loss: what this rank gave to be judged; None for nothing.
    """

    values: Any
    reduced: tuple[bool, ...]
    scale: float
    figures: Figures
    loss: float | None = None


class Holding(NamedTuple):
    """Which elements a rank has, in the order of `Step.values`, and what whole tensors there are.

    Attributes:
        parameter: of each element, the index of its parameter.
        names, partial: of each parameter.
    """

    elements: Any
    parameter: Any
    names: tuple[str, ...]
    partial: tuple[bool, ...]
    tensors: tuple[WholeTensor, ...]


@dataclass
class Record:
    """What happened in one case on one rank.

    Attributes:
        losses: those that the policy remembers.
        collectives: how many each process group of the rank made, by the group's name.
    """

    steps: list[Step] = field(default_factory=list)
    states: str = ""
    losses: list[float] = field(default_factory=list)
    crash: str = ""
    collectives: dict[str, int] = field(default_factory=dict)
