"""Many cases, in portions: on a pool of ranks, with what they found in words."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from tests.faults.cases import Case
from tests.faults.play import play_all
from tests.support.ranks import RankError, Ranks

PORTION = 100
ALONE_S = 60.0


class Finding(NamedTuple):
    number: int
    text: str


def findings(
    cases: Iterable[Case], ranks: Ranks, said: Callable[[int], None] = lambda num: None
) -> Iterator[Finding]:
    """What went wrong. Where ranks do not answer, each case of the portion is played alone too."""
    num, rest = 0, iter(cases)
    while portion := list(itertools.islice(rest, PORTION)):
        try:
            yield from _played(portion, ranks)
        except RankError as together:
            yield Finding(portion[0].number, f"{len(portion)} cases from this one on: {together}")
            for case in portion:
                try:
                    yield from _played([case], ranks, ALONE_S)
                except RankError as error:
                    yield Finding(case.number, f"{case}\n{error}")
        said(num := num + len(portion))


def _played(cases: Sequence[Case], ranks: Ranks, limit_s: float = 600.0) -> list[Finding]:
    return [
        Finding(*each) for found in ranks.run(play_all, cases, limit_s=limit_s) for each in found
    ]


def summary(num: int, found: Sequence[Finding]) -> str:
    failed = sorted({each.number for each in found})
    again = f"; alone: python -m tests.faults --only {failed[0]}" if failed else ""
    return f"fault matrix: {num} cases, {len(failed)} failures{again}"
