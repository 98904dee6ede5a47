"""Thousands of simulated ranks, in a process of their own because the process group is a fake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distclip import Layout
from tests.benchmarks.models import LLAMA_8B, LLAMA_70B, LLAMA_405B, MIXTURE, Model, Weight
from tests.benchmarks.simulated_ranks import Case, counted_once

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("scale")  # one run for all of them
SECONDS, MEGABYTES = 1.0, 50.0  # for one rank's plan of the largest model
COMMANDS = """
import sys
from benchmarks import scale
assert scale.main(["--plan"]) == 0
print("----", flush=True)
sys.exit(scale.main(["--quick", "--json", sys.argv[1]]))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """The table in docs, and the rows of a quick run."""
    out = tmp_path_factory.mktemp("scale") / "rows.json"
    command = [sys.executable, "-c", COMMANDS, str(out)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False
    )
    assert out.exists(), run.stderr
    rows = json.loads(out.read_text())
    assert run.returncode == (0 if all(row["once"] for row in rows) else 1)
    return run.stdout.partition("----")[0], rows


@pytest.fixture
def rows(done: tuple[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return done[1]


def test_models_have_the_published_number_of_parameters() -> None:
    assert (LLAMA_8B.numel, LLAMA_70B.numel) == (8_030_261_248, 70_553_706_496)
    assert LLAMA_405B.numel == 405_853_388_800
    # Published with the 256 biases of each layer that balance the experts and have no gradient.
    assert MIXTURE.numel + 58 * 256 == 671_026_419_200


def test_stages_share_every_layer() -> None:
    for num_stages in (1, 7, 16):
        stages = [LLAMA_405B.stage(stage, num_stages) for stage in range(num_stages)]
        assert [unit for stage in stages for unit in stage] == LLAMA_405B.stage(0, 1)


def test_counting_finds_what_is_counted_twice_or_never() -> None:
    rows, copies = Weight("rows", (6, 4), tp=0), Weight("copies", (5,))
    case = Case(Model("two weights", "", (rows,), (), (copies,)), (1, 2, 2, 2))
    sharded = {rows: {"fsdp", "tp"}, copies: {"fsdp"}}

    def once(weight: Weight, axes: set[str]) -> bool:
        found = {**sharded, weight: axes}
        every = {"dp_replicate", "fsdp", "tp"}
        return counted_once(case, {w: Layout(axes, every - axes) for w, axes in found.items()})

    assert once(rows, {"fsdp", "tp"})
    assert not once(rows, {"fsdp", "tp", "dp_replicate"})
    assert not once(rows, {"fsdp"})
    assert not once(copies, {"fsdp", "tp"})
    assert not once(copies, set())


def test_every_element_is_counted_exactly_once(rows: list[dict[str, Any]]) -> None:
    assert max(row["ranks"] for row in rows) == 16_384
    assert {row["model"]: row["once"] for row in rows} == {row["model"]: True for row in rows}
    assert all(row["plans"] >= 2 for row in rows)


def test_a_plan_for_16384_ranks_is_made_in_a_second_and_50_megabytes(
    rows: list[dict[str, Any]],
) -> None:
    (largest,) = (row for row in rows if row["ranks"] == 16_384)
    assert largest["model"] == "Llama-3 405B"
    assert largest["cpu_seconds"] < SECONDS  # of this process alone: others may load the machine
    assert largest["megabytes"] < MEGABYTES
    assert largest["rss_megabytes"] < MEGABYTES


def test_a_step_has_one_collective_over_all_ranks(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        (ours,) = row["collectives"]["distclip"]
        assert ours["ranks"] == row["ranks"]
        assert len(row["collectives"]["torch"]) > 1


def test_the_plan_on_paper_has_the_table_of_the_model(
    done: tuple[str, list[dict[str, Any]]],
) -> None:
    table = done[0]
    assert table.count("\n") == 2 + 4 * 3
    pages = [page.read_text() for page in (ROOT / "docs").glob("*.md")]
    (page,) = (page for page in pages if table in page)
    assert len(page.splitlines()) < 120  # two pages
