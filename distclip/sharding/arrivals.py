"""Which ranks have come to the same place, asked of their store before a collective needs them all.

A collective of NCCL that lacks a rank ends the process, and `monitored_barrier` needs gloo and
names the missing ranks on one rank only.
"""

from __future__ import annotations

import json
from datetime import timedelta

import torch.distributed as dist

from distclip import torch_private
from distclip.sharding.rank_group import Line, RankGroup


def missing_ranks(ranks: RankGroup, place: str) -> list[int]:
    """The ranks that have not called with that `place` within the timeout; empty where all have.

    Where no rank of a line has come, it names those of its ranks that this one would have met.
    """
    missing: set[int] = set()
    timeout = timedelta(0)
    for line in ranks.lines:
        # The others may have waited as long for ranks of an earlier line.
        timeout += torch_private.timeout(line.group, ranks.device)
        missing |= _missing_on(line, f"distclip/{place}", sorted(missing), timeout)
    return sorted(missing)


def _missing_on(line: Line, place: str, known: list[int], timeout: timedelta) -> set[int]:
    """The ranks of the line that have not arrived in time, and those that its ranks know of.

    One that arrives later learns so from the others, and may take part in their next call.
    """
    store, rank = line.group.get_group_store(), dist.get_rank()
    key = f"{place}/{store.add(f'{place}/{rank}', 1)}"  # the number of this call
    store.set(f"{key}/{rank}", json.dumps(known))
    if known:
        store.set(f"{key}/some are missing", "")
    if store.add(f"{key}/number", 1) == len(line.ranks):
        store.set(f"{key}/all", "")
    try:
        store.wait([f"{key}/all"], timeout)
        if not store.check([f"{key}/some are missing"]):
            return set()
    except RuntimeError:
        store.set(f"{key}/some are missing", "")
    missing: set[int] = set()
    for other in line.ranks:
        arrived = store.check([f"{key}/{other}"])
        missing |= set(json.loads(store.get(f"{key}/{other}"))) if arrived else {other}
    store.set(f"{key}/{rank}", json.dumps(sorted(missing)))
    return missing
