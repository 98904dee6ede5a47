"""What ranks learn from each other when a collective has failed: which of them took no part in it.

gloo says that a connection was closed, or that it has waited too long, and never for which rank. A
rank that exchanges nothing with the lost one waits for as long as the process group's timeout. So
each rank that has failed says so in the store of the group, where ranks look that have been waiting
for long. Nothing is asked of the store as long as collectives take less than half a second.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from distclip import torch_private
from distclip.errors import CollectiveError, LayoutError

T = TypeVar("T")

_LOOK = timedelta(seconds=0.5)  # how long a rank waits before it looks whether others have failed
_GRACE_S = 3.5  # how long one that has failed waits for the others, which find it out in this time
_SETUP_S = 60.0  # for the store, before anything has failed
_STORE_S = 1.5  # and for the store, which may be gone together with the rank that keeps it
_PREFIX = "distclip/failed"


class _Verdict(NamedTuple):
    """The same on all ranks: who was missing, and what each of the others was doing."""

    missing: Sequence[int]
    doing: Mapping[int, str]


@dataclass
class _Known:
    """What this process knows of a group.

    Attributes:
        since: the store may tell of an earlier group of the same name.
        num_collectives: those of distclip that have begun. The n-th of one rank meets the n-th of
            every other.
    """

    since: float
    num_collectives: int = 0


_known: WeakKeyDictionary[dist.ProcessGroup, _Known] = WeakKeyDictionary()


def know(group: dist.ProcessGroup) -> _Known:
    """Takes a group, and the world, for made by now."""
    if (known := _known.get(group)) is None:
        known = _known[group] = _Known(time.time())
        know(_world())
    return known


_kept: list[Any] = []  # the last work


def keep(work: Any) -> Any:
    """Returns the work, and keeps it until the next one.

    A thread of gloo would else be the last that holds it, and needs the lock of the interpreter to
    let its tensors go: where the process ends just then, it aborts ("terminate called without an
    active exception").
    """
    _kept[:] = [work]
    return work


def first_form(group: dist.ProcessGroup, form: str) -> str:
    """What the first rank has said of the next collective of the group; `form`, if this one is it.

    For ranks that cannot be sure to send messages of one size: gloo ends the process that receives
    a longer one than it expects. Does not wait for other ranks.
    """
    key = f"distclip/form/{know(group).num_collectives}"
    store = group.get_group_store()
    return _within(_SETUP_S, lambda: store.compare_set(key, "", form).decode()) or form


class Meeting(NamedTuple):
    """The ranks that must take part in what this one does.

    They talk in the store of the world, also where each of their groups has a part of them.

    Attributes:
        ranks: global ranks, in order; the same on each.
        doing: what this rank is doing, for the others' error.
    """

    ranks: Sequence[int]
    doing: str

    def wait(self, work: Any) -> None:
        """`work.wait()`, which ends too where another of the ranks has failed.

        Raises:
            RuntimeError: torch's own, or that another rank has failed.
        """
        asks = True
        while True:
            try:
                work.wait(_LOOK)
                return
            except RuntimeError:  # that half a second is over, too
                if work.is_completed():
                    work.wait()
                    return
            failed = _within(_STORE_S, self._case) if asks else ""
            if failed:
                raise RuntimeError("another rank has found that a collective has failed")
            asks = failed is not None

    def error(self) -> CollectiveError | LayoutError:
        """What to raise where the collective has failed; waits for what the other ranks say."""
        mine, verdict = _short(self.doing), None
        # A store that takes longer may not know yet what the others have said.
        if (case := _within(_STORE_S, self._report)) is not None:
            verdict = _within(_GRACE_S + _STORE_S, lambda: self._verdict(case))
        if verdict is None:
            return CollectiveError(_UNKNOWN.format(mine=mine))
        missing, rank = verdict.missing, dist.get_rank()
        if rank in missing:
            others = sorted({*verdict.doing} - {rank})
            return CollectiveError(_GIVEN_UP.format(rank=rank, others=others, mine=mine), missing)
        calls = by_text(verdict.doing)
        differ = len({*verdict.doing.values()}) > 1
        if missing:
            beside = f"; the others do not make the same call either: {calls}" if differ else ""
            text = _MISSING.format(missing=_named(missing), mine=mine, beside=beside)
            return CollectiveError(text, missing)
        return LayoutError(_DIFFER.format(calls=calls)) if differ else CollectiveError(_CONNECTION)

    @property
    def _key(self) -> str:
        """Of what is said of these ranks; its value is the key of the latest failure."""
        return f"distclip/failed/{zlib.crc32(repr([*self.ranks]).encode()):x}"

    def _case(self) -> str:
        """The key of what is said of a failure; "" where none has been found."""
        latest = self._latest()
        return latest if _is_current(latest) else ""

    def _latest(self) -> str:
        """The key of the latest failure, which may be that of an earlier group."""
        store = _store()
        return store.get(self._key).decode() if store.check([self._key]) else ""

    def _open_case(self) -> str:
        # Read once: what another rank opens from here on must stay, and is what this one gets.
        if _is_current(latest := self._latest()):
            return latest
        mine = f"{self._key}/{time.time()}/{dist.get_rank()}-{os.getpid()}"
        return _store().compare_set(self._key, latest, mine).decode()

    def _report(self) -> str:
        """Says that this rank has failed; the key of the failure."""
        case, store = self._open_case(), _store()
        store.set(f"{case}/{dist.get_rank()}", self.doing)
        if store.add(f"{case}/number", 1) == len(self.ranks):
            store.set(f"{case}/all", "")
        return case

    def _verdict(self, case: str) -> _Verdict:
        """That of the first rank which has heard of all, or has waited for long enough."""
        until, store = time.monotonic() + _GRACE_S, _store()
        while time.monotonic() < until:
            if store.check([f"{case}/verdict"]) or store.check([f"{case}/all"]):
                break
            time.sleep(0.1)
        here = [rank for rank in self.ranks if store.check([f"{case}/{rank}"])]
        doing = {rank: store.get(f"{case}/{rank}").decode() for rank in here}
        mine = json.dumps([sorted({*self.ranks} - {*here}), [*doing.items()]])
        missing, items = json.loads(store.compare_set(f"{case}/verdict", "", mine))
        return _Verdict(missing, dict(items))


def _is_current(case: str) -> bool:
    return bool(case) and float(case.split("/")[-2]) >= know(_world()).since


def _world() -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.group.WORLD)


def _store() -> Any:
    return _world().get_group_store()


def looks(group: dist.ProcessGroup, tensor: torch.Tensor) -> bool:
    """Whether a collective of the tensor makes this thread wait, and can be waited for in parts."""
    return tensor.is_cpu and torch_private.backend_name(group, tensor.device) == "gloo"


def by_text(texts: Mapping[int, str]) -> str:
    """Which ranks say what: the parts, between semicolons, that not all of them have."""
    ranks: dict[str, list[int]] = {}
    for rank, text in texts.items():
        ranks.setdefault(text, []).append(rank)
    parts = {text: text.split("; ") for text in ranks}
    common = set[str].intersection(*map(set, parts.values())) if parts else set[str]()
    found: list[str] = []
    for text, who in ranks.items():
        own = "; ".join(part for part in parts[text] if part not in common)
        found.append(f"ranks {who}: {_short(own or text)}")
    return "; ".join(found)


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}..."


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {[*ranks]}"


def _within(seconds: float, call: Callable[[], T]) -> T | None:
    """What a call returns in this time; None where it raises or takes longer.

    A store whose host has been stopped never answers, and has no timeout for it.
    """
    returned: list[T] = []

    def run() -> None:
        try:
            returned.append(call())
        except (RuntimeError, ValueError):  # no store, or none that answers
            return

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return returned[0] if returned else None


_MISSING = (
    "cannot clip together: {missing} took no part in this collective, and all others have given "
    "up (here: {mine}{beside}). Who is missing has ended, was stopped, or makes another call. Look "
    "at what it printed last, and where it waits (`py-spy dump`), and make the same calls on all "
    "ranks in the same order."
)
_GIVEN_UP = (
    "cannot clip together: the ranks {others} have given up waiting for this rank, {rank}, which "
    "comes after the timeout of the process group (here: {mine}). Look for what has taken it so "
    "long, or raise `timeout=` of `init_process_group`."
)
_DIFFER = (
    "cannot clip together: the ranks of this collective do not make the same call ({calls}), and "
    "it has failed. Give the Clipper the same policies, groups and `on_nonfinite` on every rank, "
    "and call it equally often and in the same order."
)
_CONNECTION = (
    "cannot clip together: all ranks came to this collective, and it failed on all of them. The "
    "connection between two of them was lost, or one came after the timeout of the process group."
)
_UNKNOWN = (
    "cannot clip together: a collective has failed (here: {mine}), and it is not known which rank "
    "took no part in it, because the store of the process group does not answer. The rank that "
    "keeps it, rank 0 unless a launcher does, may be the one. Look at what each printed last."
)
