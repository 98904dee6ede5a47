"""Every code block of README.md works as printed.

A ```python block runs as a script in an empty folder; with `<!-- torchrun: 2 -->` above it, on two ranks.
In a ```bash block every `make` target, `python -m` module and `folder/script.py` must exist.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FENCE = re.compile(
    r"^(?:<!-- torchrun: (\d+) -->\n+)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
TIMEOUT = 100  # seconds; below pytest's own limit, so that the block's output is shown
# A DeviceMesh that outlives `destroy_process_group` aborts about one run in four while Python ends ("terminate called
# without an active exception"; torch 2.13, gloo, a script of torch alone). So all of a block goes before Python does.
ON_RANKS = "import gc, runpy, sys\nrunpy.run_path(sys.argv[1], run_name='__main__')\ngc.collect()\n"


class Block(NamedTuple):
    line: int
    num_ranks: int  # 0: an ordinary script
    language: str
    code: str


def blocks_of(text: str) -> list[Block]:
    return [
        Block(text.count("\n", 0, found.start(3)), int(found[1] or 0), found[2], found[3])
        for found in FENCE.finditer(text)
    ]


def parametrize(language: str) -> pytest.MarkDecorator:
    readme = ROOT / "README.md"
    blocks = blocks_of(readme.read_text()) if readme.exists() else []
    chosen = [block for block in blocks if block.language == language]
    return pytest.mark.parametrize(
        "block", chosen, ids=[f"README.md:{block.line}" for block in chosen]
    )


def run_block(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "block.py"
    script.write_text(block.code)
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node={block.num_ranks}".split()
    command = [sys.executable, str(script)]
    if block.num_ranks:
        (driver := folder / "on_ranks.py").write_text(ON_RANKS)
        command = [sys.executable, *torchrun, str(driver), str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def missing(bash: str) -> list[str]:
    """What a bash block names and this repository or environment does not have."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = re.sub(r"(^|\s)#.*", "", bash)
    found = [
        f"make {name}" for name in re.findall(r"\bmake ([\w-]+)", commands) if name not in targets
    ]
    modules = re.findall(r"\bpython3? -m ([\w.]+)", commands)
    found += [f"python -m {name}" for name in modules if not exists(name)]
    paths = re.findall(r"(?<![\w/.])\w+/[\w/]+\.py\b", commands)
    return found + [path for path in paths if not (ROOT / path).exists()]


def exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@parametrize("python")
def test_python_block_runs(block: Block, tmp_path: Path) -> None:
    run = run_block(block, tmp_path)
    assert run.returncode == 0, f"\n{run.stdout}\n{run.stderr}"


@parametrize("bash")
def test_bash_block_names_what_exists(block: Block) -> None:
    assert not missing(block.code)


def test_readme_has_blocks() -> None:
    languages = [block.language for block in blocks_of((ROOT / "README.md").read_text())]
    assert "python" in languages
    assert "bash" in languages


def test_blocks_are_found() -> None:
    text = "# T\n```python\nx = 1\n```\n<!-- torchrun: 2 -->\n```python\ny\n```\n```bash\nmake run\n```\n"
    assert blocks_of(text) == [
        Block(2, 0, "python", "x = 1\n"),
        Block(6, 2, "python", "y\n"),
        Block(9, 0, "bash", "make run\n"),
    ]


def test_a_wrong_block_fails(tmp_path: Path) -> None:
    assert run_block(Block(1, 0, "python", "assert 1 + 1 == 3"), tmp_path).returncode == 1
    two_ranks = run_block(
        Block(1, 2, "python", "import os\nexit(40 + int(os.environ['WORLD_SIZE']))"), tmp_path
    )
    assert two_ranks.returncode == 1
    assert re.search(r"exitcode\s*: 42", two_ranks.stderr)


def test_a_wrong_command_is_missed() -> None:
    bash = "make run ARGS='-h'\nmake nothing  # make sense\npython -m distclip.nothing\nnothing/train.py"
    assert missing(bash) == ["make nothing", "python -m distclip.nothing", "nothing/train.py"]
    assert not missing("python -m torch.distributed.run tests/test_readme.py")
