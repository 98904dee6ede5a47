"""Counts how trainings of a few steps on two ranks end, started one after the other.

A process that frees a process group at its very end may abort, "terminate called without an active
exception", after all its work is done; torchrun then reports that it failed. It happens by chance.

    python -m tests.versions.ends --starts 50                 with this Python and its torch
    python -m tests.versions.ends --python VENV/bin/python    with another one
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ("-m", "launch.run", "--standalone", "--nproc-per-node=2", "-m", "launch.train")
SMALL = [
    "--width",
    "32",
    "--depth",
    "1",
    "--context",
    "32",
    "--batch",
    "8",
    "--steps",
    "3",
    "--warmup",
    "1",
    "--device",
    "cpu",
]
LAYOUTS = ("fsdp2", "tp", "ddp", "fsdp1")
ABORTED = "terminate called"
LIMIT_S = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=50)
    parser.add_argument("--python", default=sys.executable)
    options = parser.parse_args()
    torch = subprocess.check_output(
        [options.python, "-c", "import torch; print(torch.__version__)"], text=True
    ).strip()
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text")
        text.mkdir()
        text.joinpath("text.py").write_text(Path(argparse.__file__).read_text())
        for start in range(options.starts):
            layout = LAYOUTS[start % len(LAYOUTS)]
            end = end_of_a_start(options.python, text, Path(folder, str(start)), layout)
            ends[end] += 1
            print(f"{start + 1}: {layout}, {end}", flush=True)
    print(f"torch {torch}: {', '.join(f'{number} {end}' for end, number in ends.items())}")
    return int(set(ends) != {"finished"})


def end_of_a_start(python: str, text: Path, out: Path, layout: str) -> str:
    """How it ended, in a few words; prints what it said if it did not finish."""
    words = [python, *LAUNCH, "--data", str(text), "--out", str(out), "--layout", layout, *SMALL]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if ABORTED in ran.stdout + ran.stderr:
        return "aborted"
    if ran.returncode:
        print(ran.stderr[-2000:])
        return f"failed with {ran.returncode}"
    return "finished"


if __name__ == "__main__":
    sys.exit(main())
