"""examples/gradient_flow.py shows what docs/monitoring.md says of its pictures."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from distclip.monitoring.layers import layer_norms
from distclip.monitoring.records import Floats, Run, read_run
from distclip.monitoring.summary import summarize

EXAMPLE = Path(__file__).parent.parent / "examples" / "gradient_flow.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


def trained(example: dict[str, Any], name: str, folder: Path, max_norm: float = math.inf) -> Run:
    torch.manual_seed(0)
    example["train"](example[name](), folder, max_norm, steps=60)
    return read_run(folder)


def norms_of(run: Run) -> Floats:
    """Of the sixteen layers, from the first to the last; [rows, 16]."""
    names, norms = layer_norms(run)
    assert names[:16] == tuple(f"layers.{i}" for i in range(16))
    return norms[:, :16]


def warnings_of(run: Run) -> set[str]:
    return {finding.kind for finding in summarize(run).findings if finding.is_warning}


def test_a_gradient_that_vanishes(example: dict[str, Any], tmp_path: Path) -> None:
    run = trained(example, "vanishing", tmp_path)
    norms = norms_of(run)
    assert (norms[:, 0] < 1e-10 * norms[:, -1]).all()
    assert run.columns["loss"][-10:].mean() == pytest.approx(math.log(3), rel=0.02)
    assert warnings_of(run) >= {"vanishing"}


def test_a_gradient_that_explodes(example: dict[str, Any], tmp_path: Path) -> None:
    run = trained(example, "exploding", tmp_path)
    norms = norms_of(run)
    assert (norms[:, 0] > 100 * norms[:, -1]).all()
    assert (run.columns["total_norm"] > 50).all()
    assert warnings_of(run) >= {"exploding"}


def test_the_repaired_network(example: dict[str, Any], tmp_path: Path) -> None:
    run = trained(example, "ResidualNetwork", tmp_path, max_norm=1.0)
    norms = norms_of(run)
    assert (norms.max(axis=1) < 30 * norms.min(axis=1)).all()
    assert run.columns["loss"][-10:].mean() < 0.8 * run.columns["loss"][0]
    assert 0 < run.clipped.sum() < 30
    assert warnings_of(run) == set()
