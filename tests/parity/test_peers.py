"""What other clipping does today, found with the kit: the rows of README.md, with these versions.

A test that fails with a newer version is good news: correct the row, in README.md too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import distclip
from distclip.parity import Clip, Outcome, ParityReport
from tests.parity import peers

parity = partial(distclip.parity, start_method="forkserver")


def differing(outcome: Outcome) -> list[str]:
    return [column for column, cell in outcome.cells.items() if not cell.agrees]


def rows(report: ParityReport, **of: Any) -> list[list[str]]:
    return [differing(outcome) for outcome in report.of(**of).outcomes]


def test_transformers_with_experts_on_a_mesh_of_their_own() -> None:
    """5.23.0: `_mixed_mesh_grad_norm` does not unscale, which the scaler does after it; and makes
    a collective for each mesh on which this rank has gradients.
    """
    report = parity(
        peers.Mixture,
        [peers.scaled_step, peers.scaled_step_of_rank_0],
        {"two meshes in fp16": peers.two_meshes_in_fp16},
        {"distclip": peers.as_distclip_in_fp16, "transformers": peers.as_trainer_in_fp16},
        whole_step=[peers.all_experts, peers.experts_of_rank_0],
        scale=peers.SCALE,
        timeout_s=8,
        nonfinite=False,
    )
    assert rows(report, clip="distclip") == [[], [], []], report
    scaled, waits = report.of(clip="transformers").outcomes
    assert differing(scaled) == ["norm", "coefficient", "clipped"], report
    assert "0.0009766 times what is right" in str(scaled.cells["clipped"].details)  # 1 / 1024
    [detail] = waits.cells["ranks"].details
    assert "hangs in _mixed_mesh_grad_norm (trainer.py:" in detail


def test_torch_and_accelerate_on_meshes_and_lists() -> None:
    """torch 2.13.0, accelerate 1.15.0: a part of an FSDP1 model is clipped by each rank's shard."""
    of_weights = partial(Clip, expected=peers.weights_clipped)
    report = parity(
        peers.two_layers,
        peers.step,
        {
            "FSDP1": peers.fsdp1,
            "FSDP1, accelerate": peers.under_accelerate,
            "two meshes": peers.on_two_meshes,
        },
        {
            "distclip": peers.as_distclip,
            "torch, a list": peers.torch_on_a_list,
            "accelerate": peers.accelerate_on_all,
            "accelerate, weights": of_weights(peers.accelerate_on_weights),
        },
        timeout_s=8,
        nonfinite=False,
    )
    for layout in ("FSDP1", "FSDP1, accelerate", "two meshes"):
        assert rows(report, clip="distclip", layout=layout) == [[], []], report
    assert rows(report, clip="accelerate", layout="FSDP1, accelerate") == [[], []], report
    for clip, layout in (
        ("torch, a list", "FSDP1"),
        ("accelerate, weights", "FSDP1, accelerate"),
    ):
        first = report.of(clip=clip, layout=layout).outcomes[0]
        assert {"norm", "clipped"} <= set(differing(first)), report
        assert first.cells["norm"].text == "differs by rank"
    [outcome] = report.of(clip="torch, a list", layout="two meshes").outcomes
    assert "every rank raised RuntimeError: All operands in aten.stack" in str(outcome.cells)
