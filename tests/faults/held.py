"""What a rank holds, which must not grow: objects, memory, handles, plans.

A leak of a few bytes a step is a line through many samples, and nothing between two of them.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

import distclip
from distclip.norms import kept_plans

# What may come and go: collections find cycles late, and malloc keeps what is freed.
NOISE = {"blocks": 400.0, "objects": 30.0, "tensors": 3.0, "resident bytes": 6e6}


def counts_of(clipper: distclip.Clipper) -> dict[str, float]:
    gc.collect()
    objects = gc.get_objects()
    caches = [kept_plans._without_mesh, *kept_plans._by_mesh.values()]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "objects": len(objects),
        "tensors": sum(isinstance(each, Tensor) for each in objects),
        "held by the Clipper": _num_held(clipper),
        "plans": sum(len(cache._entries) for cache in caches),
        "meshes with plans": len(caches),
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "process groups": len(dist.distributed_c10d._world.pg_map),
        "blocks": sys.getallocatedblocks(),
        "resident bytes": pages * resource.getpagesize(),
    }


def _num_held(clipper: distclip.Clipper) -> int:
    """The entries of all lists and dictionaries in the Clipper and in what is distclip's in it."""
    num, seen, left = 0, set[int](), [clipper]
    while left:
        each: Any = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, dict):
            left += each.values()
            num += len(each)
        elif isinstance(each, list | tuple | set):
            left += each
            num += len(each)
        elif type(each).__module__.startswith("distclip"):
            left.append(getattr(each, "__dict__", {}))
    return num


def rises(steps: Sequence[int], counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How much each count has grown from the first sample to the last, by a straight line."""
    found: dict[str, float] = {}
    for name in counts[0]:
        slope = np.polyfit(steps, [each[name] for each in counts], 1)[0]
        found[name] = float(slope * (steps[-1] - steps[0]))
    return found


def leaks(steps: Sequence[int], counts: Sequence[Mapping[str, float]]) -> list[str]:
    """What has grown by more than its noise."""
    return [
        f"{name} grew by {rise:.1f} in {steps[-1] - steps[0]} steps: "
        f"{[each[name] for each in counts]}"
        for name, rise in rises(steps, counts).items()
        if rise > NOISE.get(name, 0.5)
    ]
