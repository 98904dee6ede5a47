"""Ranks that misbehave: the others raise one error in time, which names them, and write nothing."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.faults.hostile import TRUST
from tests.faults.misbehaving import FAULTS, ODD, TIMEOUT_S, Case, Found, played

MOST_S = TIMEOUT_S + 5.0  # from the fault until every rank that is left has raised
AT_ONCE = 3  # cases, which mostly wait

# What the others find: ranks that are missing, or that the calls differ.
MISSING = {
    "killed before the call": "rank 2",
    "killed in the call": "rank 2",
    "killed after the collective": "rank 2",
    "two killed": "ranks [1, 2]",
    "stopped": "rank 2",
    "a hook raises": "rank 2",
    "a hook raises, and the rank stays": "rank 2",
    "a call less at the end": "rank 2",
    "cannot make a Clipper": "rank 2",
}
DIFFER = {
    "a call left out": "ranks [0, 1, 3]: step=2; ranks [2]: step=3",
    "a call once more": "ranks [0, 1, 3]: step=3; ranks [2]: step=2",
    "another policy, with a longer message": "ranks [2]: all: ClipTensorNorm(max_norm=1.0",
}
NOT_KNOWN = {"keeps the store, killed", "keeps the store, stopped"}
ENDS = {"killed before the call", "killed in the call", "killed after the collective"}
ENDS |= {"two killed", "a hook raises", "keeps the store, killed"}

ALWAYS = [
    Case("stopped"),
    Case("cannot make a Clipper"),
    Case("keeps the store, killed", "function"),
    Case("killed in the call", "attach", "hsdp"),
    Case("killed before the call", "step", "part"),
    Case("another policy, with a longer message"),
]
WAYS = ("clip_", "step", "attach", "overlap", "function")
LAYOUTS = ("list", "fsdp2", "hsdp", "part", "ddp")
# These make a Clipper of their own.
OWN = {"another policy, with a longer message", "cannot make a Clipper"}


def cases() -> list[Case]:
    """With DISTCLIP_TRUST=1 each fault in each way and on each layout."""
    if not TRUST:
        return ALWAYS
    found = [*ALWAYS, *map(Case, FAULTS)]
    faults = [fault for fault in FAULTS if fault not in OWN]
    for i, fault in enumerate(faults):
        found.append(Case(fault, "in backward", "dtensors"))
        for k, layout in enumerate(LAYOUTS):
            way = WAYS[(i + k) % len(WAYS)]
            if not ("step" in DIFFER.get(fault, "") and way in ("attach", "function")):
                found.append(Case(fault, way, layout))  # those two number no steps
    return [*dict.fromkeys(found)]


Played = dict[Case, "Future[dict[int, Found | str]]"]


@pytest.fixture(scope="module")
def all_played(request: pytest.FixtureRequest) -> Iterator[Played]:
    """The selected ones, which begin together."""
    params = [getattr(item, "callspec", None) for item in request.session.items]
    selected = [spec.params["case"] for spec in params if spec and "case" in spec.params]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {case: pool.submit(played, case) for case in selected if isinstance(case, Case)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.timeout(7200 if TRUST else 400)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_ranks_that_misbehave(all_played: Played, case: Case) -> None:
    answers = all_played[case].result()
    found = {rank: each for rank, each in answers.items() if isinstance(each, Found)}
    odd = {0} if case.fault in NOT_KNOWN else {1, 2} if case.fault == "two killed" else {ODD}
    ended = odd if case.fault in ENDS and case.layout != "ddp" else set[int]()
    assert {*found} >= set(range(4)) - odd, answers
    assert not {*found} & ended, answers
    if case.layout == "ddp":
        without_collectives(found)
        return
    for rank, each in found.items():
        assert each.whole, answers
        if rank not in odd:
            assert each.untouched or case.way == "in backward", answers
            assert each.seconds <= MOST_S, answers
    others = [each for rank, each in found.items() if rank not in odd]
    assert len({each.stepped for each in others}) == 1  # in backward, all or none
    if case.fault in DIFFER:
        assert {each.error for each in found.values()} == {"LayoutError"}, answers
        assert all(DIFFER[case.fault] in each.text for each in found.values()), answers
        return
    assert {(each.error, each.cause) for each in others} == {("CollectiveError", "RuntimeError")}
    wanted = MISSING.get(case.fault)
    names = "it is not known" if wanted is None else f"{wanted} took no part"
    assert all(names in each.text for each in others), answers
    assert len({each.text for each in others}) == 1, answers
    if case.fault == "stopped":  # it goes on when the others have given up
        assert "have given up waiting for this rank, 2" in found[ODD].text, answers
        assert found[ODD].untouched


def without_collectives(found: dict[int, Found]) -> None:
    """DDP has reduced the gradients, and its own next all-reduce finds who is missing."""
    kinds = {rank: each.error for rank, each in found.items() if each.error}
    assert kinds in ({}, {ODD: "RuntimeError"}), found  # its own
    assert all(each.whole for each in found.values()), found
