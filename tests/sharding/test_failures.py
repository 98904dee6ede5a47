"""What ranks find out about a failed collective, as threads that share one store.

tests/faults/test_misbehaving.py has real processes; here are the orders in which ranks come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from distclip.errors import CollectiveError, LayoutError
from distclip.sharding import failures
from distclip.sharding.failures import Meeting

GRACE_S = 2.0
Error = CollectiveError | LayoutError


class World:
    """A process group, of which only the store is used."""

    def __init__(self) -> None:
        self.store = dist.HashStore()

    def get_group_store(self) -> dist.Store:
        return self.store


class OfRank(threading.Thread):
    """A thread of the rank whose thread starts it."""

    def __init__(self, target: Callable[[], None], daemon: bool) -> None:
        super().__init__(target=target, daemon=daemon, name=threading.current_thread().name)


class SilentStore:
    """That of a host which has been stopped: nothing is ever answered."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: time.sleep(60)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(failures, "_world", lambda: made)
    monkeypatch.setattr(failures, "_GRACE_S", GRACE_S)
    monkeypatch.setattr(failures, "_STORE_S", 1.0)
    monkeypatch.setattr(failures, "Thread", OfRank)
    monkeypatch.setattr(dist, "get_rank", lambda: int(threading.current_thread().name))
    failures.know(made)  # when the groups were made
    return made


def errors_of(
    come_after: dict[int, float], doing: dict[int, str] | None = None
) -> dict[int, Error]:
    """What each rank raises that comes so many seconds after the first; rank 2 of four is odd."""
    found: dict[int, Error] = {}

    def fail(rank: int, seconds: float) -> None:
        time.sleep(seconds)
        found[rank] = Meeting(range(4), (doing or {}).get(rank, "a step")).error()

    threads = [
        threading.Thread(target=fail, args=each, name=str(each[0])) for each in come_after.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def case_of(ranks: Sequence[int]) -> str:
    return Meeting(ranks, "a step")._case()  # pyright: ignore[reportPrivateUsage]


def named(error: Error) -> Sequence[int]:
    assert isinstance(error, CollectiveError)
    return error.ranks


@pytest.mark.usefixtures("world")
def test_one_that_comes_within_the_grace_is_not_missing() -> None:
    start = time.monotonic()
    found = errors_of({0: 0.0, 1: 0.0, 3: GRACE_S / 2})
    assert {rank: [*named(error)] for rank, error in found.items()} == {0: [2], 1: [2], 3: [2]}
    assert len({str(error) for error in found.values()}) == 1
    assert GRACE_S <= time.monotonic() - start < GRACE_S + 1.5  # rank 2 is not waited for longer


@pytest.mark.usefixtures("world")
def test_where_all_come_nobody_waits() -> None:
    start = time.monotonic()
    found = errors_of(dict.fromkeys(range(4), 0.0))
    assert all("all ranks came" in str(error) for error in found.values())
    assert time.monotonic() - start < GRACE_S


@pytest.mark.usefixtures("world")
def test_the_first_verdict_holds_for_those_that_come_later() -> None:
    start = time.monotonic()
    found = errors_of({0: 0.0, 1: 0.0, 3: GRACE_S + 0.7})
    assert time.monotonic() - start < 2 * GRACE_S + 0.6  # the last one does not wait again
    assert all([*named(error)] == [2, 3] for error in found.values())
    assert "have given up waiting for this rank, 3" in str(found[3])
    assert "[0, 1]" in str(found[3])


@pytest.mark.usefixtures("world")
def test_ranks_of_different_calls_are_told_the_difference() -> None:
    doing = {rank: "all: ClipNorm(1.0); step=3" for rank in (0, 1, 3)}
    found = errors_of(dict.fromkeys(range(4), 0.0), {**doing, 2: "all: ClipNorm(1.0); step=4"})
    assert {type(error) for error in found.values()} == {LayoutError}
    assert len({str(error) for error in found.values()}) == 1
    text = str(found[0])
    assert "ranks [0, 1, 3]: step=3; ranks [2]: step=4" in text
    assert "ClipNorm" not in text  # all have that


def test_a_failure_of_an_earlier_group_is_over(world: World) -> None:
    """A world that was made anew may have the store of the one before."""
    errors_of({0: 0.0, 1: 0.0, 3: 0.0})
    assert case_of(range(4))
    failures._known.clear()
    time.sleep(0.01)
    failures.know(world)
    assert case_of(range(4)) == ""
    found = errors_of({0: 0.0, 1: 0.0, 2: 0.0})
    assert all([*named(error)] == [3] for error in found.values())


def test_two_that_open_a_case_at_once_have_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 opens it right after rank 3 has seen that there is none."""
    store = world.store
    report = Meeting(range(4), "a step")._report  # pyright: ignore[reportPrivateUsage]

    class Store:
        def check(self, keys: list[str]) -> bool:
            there = store.check(keys)
            monkeypatch.setattr(world, "store", store)
            first = threading.Thread(target=report, name="0")
            first.start()
            first.join(10)
            return there

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

    monkeypatch.setattr(world, "store", Store())
    found = errors_of({3: 0.0})
    assert [*named(found[3])] == [1, 2]


def test_ranks_do_not_hear_of_failures_of_others(world: World) -> None:
    errors_of({0: 0.0, 1: 0.0, 3: 0.0})
    assert case_of(range(4))
    assert case_of([0, 1]) == ""
    assert world.store.num_keys() > 0


def test_a_store_that_does_not_answer_is_not_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "_store", SilentStore)
    start = time.monotonic()
    found = errors_of({0: 0.0})
    assert "it is not known which rank" in str(found[0])
    assert time.monotonic() - start < 10
    del world


class Work:
    """A collective that never ends, and says after each wait that it has taken too long."""

    def wait(self, *_: object) -> None:
        time.sleep(0.02)
        raise RuntimeError("timed out")

    def is_completed(self) -> bool:
        return False


@pytest.mark.usefixtures("world")
def test_who_waits_hears_of_the_failure_of_another() -> None:
    def wait() -> None:
        with pytest.raises(RuntimeError, match="another rank has found"):
            Meeting(range(4), "a step").wait(Work())

    with ThreadPoolExecutor(1) as pool:
        waiting: Future[None] = pool.submit(wait)
        time.sleep(0.2)
        assert not waiting.done()
        errors_of({0: 0.0, 1: 0.0, 3: 0.0})
        waiting.result(timeout=10)
