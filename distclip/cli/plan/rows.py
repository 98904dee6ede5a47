"""Rows of a table that stand for many tensors: alike layers share one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distclip.cli.plan.records import PlannedRank, PlannedTensor

MAX_ROWS = 40


@dataclass(frozen=True)
class Row:
    """Tensors that are laid out alike and have the same name but for numbers.

    Attributes:
        tensors: each with the rank that it was planned on.
    """

    name: str
    tensors: list[tuple[PlannedRank, PlannedTensor]]

    @property
    def first(self) -> PlannedTensor:
        return self.tensors[0][1]

    @property
    def elements(self) -> int:
        return sum(tensor.elements for _, tensor in self.tensors)

    def held_by(self, rank: int) -> int:
        return sum(tensor.held for at, tensor in self.tensors if at.rank == rank)

    def counted_by(self, rank: int) -> int:
        counted = (tensor.held for at, tensor in self.tensors if at.rank == rank and tensor.counted)
        return sum(counted)

    def indices(self, axis: str) -> str:
        """The coordinates on an axis whose ranks hold different parameters, as "0-3"."""
        return ranges({at.stage[axis] for at, _ in self.tensors})


def tensor_rows(ranks: Sequence[PlannedRank]) -> list[Row]:
    """At most about MAX_ROWS rows: where names differ too much, those of whole modules."""
    rows = _rows(ranks, lambda name: name)
    depth = max((row.name.count(".") for row in rows), default=0)
    while len(rows) > MAX_ROWS and depth:
        rows = _rows(ranks, lambda name, depth=depth: _module(name, depth))
        depth -= 1
    return rows


def ranges(numbers: set[int]) -> str:
    """The numbers in order, as "0-3,7"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _rows(ranks: Sequence[PlannedRank], shown: Callable[[str], str]) -> list[Row]:
    alike: dict[object, list[tuple[PlannedRank, PlannedTensor]]] = {}
    for rank in ranks:
        for tensor in rank.tensors:
            words = re.sub(r"\d+", "#", shown(tensor.name))
            layout = tensor.sharded_over, tensor.copied_over, tensor.declared
            alike.setdefault((tensor.group, words, layout), []).append((rank, tensor))
    return [Row(_name([shown(t.name) for _, t in each]), each) for each in alike.values()]


def _name(names: Sequence[str]) -> str:
    """One name with the numbers of all: "layers.[0-95].weight"."""
    parts = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    return "".join(_part(set(part)) for part in parts)


def _part(texts: set[str]) -> str:
    return texts.pop() if len(texts) == 1 else f"[{ranges(set(map(int, texts)))}]"


def _module(name: str, depth: int) -> str:
    words = name.split(".")
    return name if len(words) <= depth else ".".join([*words[:depth], "*"])
