"""How many kernels a call launches on CUDA: the table in docs/accelerators.md, counted.

Counted are Triton's launches and torch's operators that would launch a kernel there, in the second
of two equal calls on the device of tests/support/accelerator.py. What backward and an optimizer
launch themselves is left out.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import distclip
from tests.support import accelerator
from tests.support.accelerator import NAME, Accelerator
from tests.support.host_waits import Seen, Watch, table, use_triton
from tests.support.overlap import sizes

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(
        not accelerator.can_be_built(), reason=f"no compiler ({accelerator.COMPILER}) here"
    ),
]

NAMES = {**vars(distclip), "inf": math.inf}
ROWS = table("launches of")


def launches(call: str, policy: str, num_tensors: int) -> dict[str, int]:
    if not hasattr(torch, "_by_triton"):
        use_triton()
        torch._by_triton = True  # type: ignore[attr-defined]
    kind, _, option = call.partition(" with ")
    shape = (3, 5)
    params = [nn.Parameter(torch.ones(shape).to(NAME)) for _ in range(num_tensors)]
    with sizes(large=1, together=15 * num_tensors):
        clipper = distclip.Clipper(params, eval(policy, NAMES), overlap=option == "overlap")
    optimizer = torch.optim.AdamW(params, fused=option == "a fused optimizer")

    def backward() -> None:
        loss: Any = sum(param.square().sum() for param in params)
        loss.backward()

    def take() -> list[Seen]:
        with Watch() as in_backward:
            backward()
        with Watch() as in_call:
            if kind == "step":
                clipper.step(optimizer)
            elif kind == "clip_grad_norm_":
                distclip.clip_grad_norm_(params, 1.0)
            elif kind != "backward":
                clipper.clip_()
        seen = in_backward if kind == "backward" else in_call
        return [s for s in seen.launches if s.where]

    take()
    return dict(Counter(seen.what for seen in take()))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['launches of']} {row['policy']}")
def test_as_the_page_says(row: dict[str, str], on_accelerator: Accelerator) -> None:
    call, policy = row["launches of"].replace("`", ""), row["policy"].strip("`")
    [few] = on_accelerator.run(launches, call, policy, 3)
    [more] = on_accelerator.run(launches, call, policy, 12)
    found = [sum(few.values()), sum(more.values())]
    once, _, each = row["number"].removesuffix(" for each tensor").partition(" + ")
    expected = [int(once) + int(each or 0) * number for number in (3, 12)]
    now = (found[1] - found[0]) // 9
    now_says = f"{found[0] - 3 * now} + {now} for each tensor" if now else f"{found[0]}"
    assert found == expected, (
        f"docs/accelerators.md says {row['number']}, and now it is {now_says}: {more}"
    )
