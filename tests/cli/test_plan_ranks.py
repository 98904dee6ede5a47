"""`distclip plan` against real ranks: each counts what the plan of one process says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from torch.distributed.device_mesh import init_device_mesh

import distclip
from distclip.cli.plan import Plan, read_mesh
from distclip.sharding.rank_group import RankGroup
from tests.cli import plan_models
from tests.support.ranks import Ranks

COLLECTIVES = ("all_gather_objects", "all_reduce_")


def planned_for_real(name: str, mesh_text: str, policy: Any, tensor_norms: bool) -> dict[str, Any]:
    """What this rank's own Clipper shows, and the collectives that it took to make it."""
    sizes = read_mesh(mesh_text)
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    model = plan_models.NAMED[name][0](mesh)
    started: list[str] = []
    with patch.multiple(RankGroup, **{each: noting(each, started) for each in COLLECTIVES}):
        clipper = distclip.Clipper(model, policy, mesh=mesh, tensor_norms=tensor_norms)
    plan = clipper.plan
    counted = {p.name: p.weights.numel() * p.counted for p in plan.params}
    sent = 0 if plan.reduce_mesh is None else plan.message_size
    return {"counted": counted, "sent": sent, "started": started}


def noting(name: str, started: list[str]) -> Any:
    function = getattr(RankGroup, name)

    def noted(self: RankGroup, *args: Any, **kwargs: Any) -> Any:
        started.append(name)
        return function(self, *args, **kwargs)

    return noted


@pytest.mark.parametrize("name", plan_models.NAMED)
def test_each_rank_counts_what_its_plan_says(four_on_cpus: Ranks, name: str) -> None:
    _, mesh, numel = plan_models.NAMED[name]
    command = Plan(
        model=f"tests.cli.plan_models:{name}", mesh=mesh, policy="agc", tensor_norms=True
    )
    real = four_on_cpus.run(planned_for_real, name, mesh, distclip.AGC(), True)
    counted: list[int] = []
    for rank, expected in enumerate(real):
        found = replace(command, rank=rank).run().planned
        tensors = found.rank.tensors
        assert {t.name: t.held * t.counted for t in tensors} == expected["counted"], rank
        assert found.messages.numbers == expected["sent"], rank
        names = {"all-gather": "all_gather_objects", "all-reduce": "all_reduce_"}
        texts = [t for t in found.messages.at_construction if "on accelerators" not in t]
        assert [names[text.split()[0]] for text in texts] == expected["started"], rank
        counted.append(found.rank.counted)
    if not real[0]["sent"]:  # each rank has all, and counts for itself
        assert counted == [numel] * 4
    else:
        assert sum(counted) == numel
