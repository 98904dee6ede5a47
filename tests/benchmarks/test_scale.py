"""Thousands of simulated ranks: benchmarks/scale.py in a process of its own, since its process group is a fake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.models import LLAMA_8B, LLAMA_70B, LLAMA_405B, MIXTURE

ROOT = Path(__file__).parents[2]
SECONDS, MEGABYTES = 1.0, 50.0  # for one rank's plan of the largest model


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("scale") / "rows.json"
    command = [sys.executable, "-m", "benchmarks.scale", "--quick", "--json", str(out)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False
    )
    assert out.exists(), done.stderr
    return json.loads(out.read_text())


def test_models_have_the_published_number_of_parameters() -> None:
    assert (LLAMA_8B.numel, LLAMA_70B.numel) == (8_030_261_248, 70_553_706_496)
    assert LLAMA_405B.numel == 405_853_388_800
    # Published with the biases that balance the experts, 256 a layer, which no gradient trains.
    assert MIXTURE.numel + 58 * 256 == 671_026_419_200


def test_stages_share_out_every_layer() -> None:
    for num_stages in (1, 7, 16):
        units = [
            unit for stage in range(num_stages) for unit in LLAMA_405B.stage(stage, num_stages)
        ]
        assert units == LLAMA_405B.stage(0, 1)


def test_every_element_is_counted_exactly_once(rows: list[dict[str, Any]]) -> None:
    assert max(row["ranks"] for row in rows) == 16_384
    assert {row["model"]: row["once"] for row in rows} == {row["model"]: True for row in rows}
    assert all(row["plans"] >= 2 for row in rows)


def test_a_plan_for_16384_ranks_is_made_in_a_second_and_50_megabytes(
    rows: list[dict[str, Any]],
) -> None:
    (largest,) = (row for row in rows if row["ranks"] == 16_384)
    assert largest["model"] == "Llama-3 405B"
    assert largest["cpu_seconds"] < SECONDS  # of this process alone: the machine may be busy
    assert largest["megabytes"] < MEGABYTES
    assert largest["rss_megabytes"] < MEGABYTES


def test_a_step_has_one_collective_over_all_ranks(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        (ours,) = row["collectives"]["distclip"]
        assert ours["ranks"] == row["ranks"]
        assert len(row["collectives"]["torch"]) > 1


def test_the_plan_on_paper_says_what_the_model_gives() -> None:
    command = [sys.executable, "-m", "benchmarks.scale_plan"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=True
    )
    page = (ROOT / "docs" / "scale.md").read_text()
    assert done.stdout.count("\n") == 2 + 4 * 3
    assert done.stdout in page
    assert len(page.splitlines()) < 120  # two pages
