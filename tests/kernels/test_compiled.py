"""What a CPU can prove of the Triton kernels: the machine code of every variant that is launched.

`tests/support/compiled.py` compiles them for GPUs that are not here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.support import accelerator

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not accelerator.can_be_built(), reason=f"no compiler ({accelerator.COMPILER}) here"
    ),
]

WEAK = "89"  # float64 at a 64th of the rate of float32: RTX 4090, L4
TARGETS = ["80", WEAK, "90", "100", "gfx942"]
# Float64 instructions for each element that a sum or a maximum reads, with some room: one product
# an element and one addition for eight elements of float32; one addition for eight of 16 bits,
# which are multiplied and added in float32.
FLOAT64 = {"fp32": 1.25, "fp16": 0.25, "bf16": 0.25, "uint16": 0.25, "fp64": 1.25}
FLOAT64_ON_WEAK = {"fp32": 0.25, "fp16": 0.13, "bf16": 0.13, "uint16": 0.13, "fp64": 1.25}
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "uint16": 2, "fp64": 8}


def run(targets: list[str]) -> subprocess.Popen[str]:
    cache = Path(tempfile.gettempdir()) / f"distclip-triton-{os.getuid()}"  # keyed by the sources
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [
            *(sys.executable, "-W", "ignore", "-m", "tests.support.compiled"),
            *(str(accelerator.built()), *targets),
        ],
        env=environment,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    """Two processes, each for some targets."""
    halves = [run(TARGETS[:2]), run(TARGETS[2:])]
    outputs = [half.communicate() for half in halves]
    for half, (_, errors) in zip(halves, outputs, strict=True):
        assert half.returncode == 0, errors[-3000:]
    return [json.loads(line) for output, _ in outputs for line in output.splitlines()]


@pytest.fixture(scope="module")
def codes(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [answer for answer in answers if "target" in answer]
    assert {code["target"] for code in found if code["kernel"] == "rewrite"} >= {"80", "90", "100"}
    return found


def names(codes: list[dict[str, Any]]) -> list[str]:
    return [f"{code['target']}: {code['name']}: {code}" for code in codes]


def reads_elements(code: dict[str, Any]) -> bool:
    """A kernel for one dtype: the others read tables and partial sums."""
    return bool(code["dtype"])


def writes_all(code: dict[str, Any]) -> bool:
    """Rewrites in which each element is written; a clamp writes only those beyond the bound."""
    return code["kernel"] == "rewrite" and code["constants"].get("OPERATION") in ("0", "1", "3")


def float64_of_each(code: dict[str, Any]) -> float | None:
    """Instructions for each element in the loop that is usually taken.

    Of the loops that sum in float64 it has the fewest: others are for rare magnitudes. None where
    the variant has no such loop, or where powers are no products of few factors.
    """
    loops = [loop for loop in code["loops"] if loop["loads"] and not loop["stores"]]
    if not (code["dtype"] and loops and code["constants"].get("P") in ("1.0", "2.0", "inf")):
        return None
    elements = 16 // BYTES[code["dtype"]]
    of_each = [loop["float64"] / (loop["loads"] * elements) for loop in loops]
    return min([number for number in of_each if number], default=0.0)


def test_nothing_is_compiled_after_construction(answers: list[dict[str, Any]]) -> None:
    """What calls launch was launched by `kernels.prepare`, with the same constants and types."""
    late = {name for answer in answers for name in answer.get("late", ())}
    assert not late


def test_no_spills_and_no_atomics(codes: list[dict[str, Any]]) -> None:
    """Triton 3.7, that of torch 2.12, lacks registers for one variant on sm_90."""
    assert not names([code for code in codes if code["atomics"]])
    spills = [code for code in codes if code["spills"]]
    if version("triton").startswith("3.7."):
        spills = [code for code in spills if (code["target"], code["kernel"]) != ("90", "scale")]
    assert not names(spills)


def test_elements_are_read_and_written_by_16_bytes(codes: list[dict[str, Any]]) -> None:
    """A wave of AMD has 64 lanes, and 8 bytes each are as much as 16 of a warp."""
    zeroes = "3"
    readers = [c for c in codes if reads_elements(c) and c["constants"].get("OPERATION") != zeroes]
    writers = [c for c in codes if writes_all(c)]
    assert readers
    assert writers
    assert not names([code for code in readers if not wide(code, "loads")])
    assert not names([code for code in writers if not wide(code, "stores")])


def wide(code: dict[str, Any], which: str) -> int:
    return code[which] + (code[f"half_{which}"] if code["target"].startswith("gfx") else 0)


def test_no_barriers_where_elements_are_rewritten(codes: list[dict[str, Any]]) -> None:
    """None waits for others of its block: loads and stores have one layout."""
    loops = [(code, loop) for code in codes if writes_all(code) for loop in code["loops"]]
    assert loops
    assert not names([code for code, loop in loops if loop["barriers"]])


def test_float64_instructions_for_each_element(codes: list[dict[str, Any]]) -> None:
    sums = [code for code in codes if code["kernel"] == "partial_sums"]
    found = {code["target"]: code for code in sums if float64_of_each(code) is not None}
    assert set(found) == set(TARGETS) - {"gfx942"}
    too_many: list[str] = []
    for code in sums:
        limits = FLOAT64_ON_WEAK if code["target"] == WEAK else FLOAT64
        number = float64_of_each(code)
        # Of short units, a thread has few elements of each, and float64 adds every one of them.
        short = {"OUTER": "32", "INNER": "32"}.items() <= code["constants"].items()
        limit = FLOAT64["fp32"] if short else limits[code["dtype"]]
        if number is not None and number > limit:
            too_many.append(f"{code['target']}: {code['name']}: {number:.3f}")
    assert not too_many, "\n".join(too_many)
