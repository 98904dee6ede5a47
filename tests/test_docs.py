"""README.md, CONTRIBUTING.md, docs/ and examples/ say only what works.

- A ```python block runs as a script, in a process and an empty folder of its own; below
  `<!-- torchrun: 2 -->` it runs on two ranks, with the environment that torchrun would give them.
- In a ```bash block every `make` target, module and file must exist.
- So must every file that a link leads to, every public name and every error that a page quotes.
"""

from __future__ import annotations

import ast
import faulthandler
import importlib.util
import os
import re
import runpy
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

import distclip
from tests.support.ranks import PRELOAD

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- torchrun: (\d+) -->\n+)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
LIMIT_S = 100  # for one block, on a loaded machine
GRACE_S = 5  # for the other ranks, once one has failed


class Block(NamedTuple):
    line: int
    num_ranks: int  # 0: an ordinary script
    language: str
    code: str


class Run(NamedTuple):
    exit_codes: list[int | None]  # of each rank; None: it had to be killed
    output: str


def blocks_of(text: str) -> list[Block]:
    return [
        Block(text.count("\n", 0, found.start(3)), int(found[1] or 0), found[2], found[3])
        for found in FENCE.finditer(text)
    ]


def parametrize(language: str) -> pytest.MarkDecorator:
    found = {
        f"{page.name}:{block.line}": block
        for page in PAGES
        for block in blocks_of(page.read_text())
        if block.language == language
    }
    return pytest.mark.parametrize("block", found.values(), ids=list(found))


def run_block(block: Block, folder: Path) -> Run:
    """Starts the processes from one that has imported torch already: a fork instead of seconds.

    They leave by `os._exit`, before anything of the block is freed. A script of its own would now
    and then abort or hang while Python ends, as docs/troubleshooting.md says of a DeviceMesh and of
    a DDP module that outlive `destroy_process_group`.
    """
    (folder / "block.py").write_text(block.code)
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # As torchrun does: the agent holds the store, on a port that nobody else has.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ranks = [
        context.Process(target=_run_script, args=(folder, rank, block.num_ranks, store.port))
        for rank in range(max(1, block.num_ranks))
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + LIMIT_S
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
        if any(rank.exitcode for rank in ranks):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.01)
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
    exit_codes = [rank.exitcode for rank in ranks]
    return Run(exit_codes, "\n".join(out.read_text() for out in sorted(folder.glob("out.*"))))


def _run_script(folder: Path, rank: int, num_ranks: int, port: int) -> None:
    os.chdir(folder)
    output = os.open(f"out.{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(LIMIT_S - GRACE_S, file=output)  # where a rank hangs
    if num_ranks:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
    sys.argv = ["block.py"]
    # The whole path: processes that a block starts import it, from another folder.
    path = str(folder / "block.py")
    _left = runpy.run_path(path, run_name="__main__")  # held: see run_block
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def missing(bash: str) -> list[str]:
    """What a bash block names and this repository or environment does not have."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = re.sub(r"(^|\s)#.*", "", bash)
    made = re.findall(r"\bmake ([\w-]+)", commands)
    modules = re.findall(r"\s-m ([a-z][\w.]+)", commands)
    files = re.findall(r"(?<![\w/.])\w+/[\w/-]+\.\w+\b", commands)
    return [
        *(f"make {name}" for name in made if name not in targets),
        *(f"-m {name}" for name in modules if not module_exists(name)),
        *(name for name in files if not (ROOT / name).exists()),
    ]


def module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def text_of_errors() -> str:
    """Every string in the source of distclip, with an ellipsis for what is filled in."""
    lines: list[str] = []
    for path in (ROOT / "distclip").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                lines.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(re.sub(r"\{\w+(!r)?\}", "…", node.value))  # for str.format
    return "\n".join(lines)


@parametrize("python")
def test_python_block_runs(block: Block, tmp_path: Path) -> None:
    run = run_block(block, tmp_path)
    assert set(run.exit_codes) == {0}, f"\n{run.output}"


@parametrize("bash")
def test_bash_block_names_what_exists(block: Block) -> None:
    assert not missing(block.code)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_to_files_and_headings(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text())
    targets = [(page.parent / file if file else page, heading) for file, heading in links]
    assert not [str(file) for file, _ in targets if not file.exists()]
    assert not [heading for file, heading in targets if heading and heading not in anchors(file)]


# torch's own, where a page names the adapter of a framework that imports more of torch.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_public_names_exist(page: Path) -> None:
    clipper = distclip.Clipper([torch.zeros(1, requires_grad=True)])
    decision = clipper.decide()
    owners = {
        "distclip": distclip,
        "clipper": clipper,
        "decision": decision,
        "report": decision.report,
    }
    if page.name == "accelerate.md":
        pytest.importorskip("accelerate")
        owners["clipper"] = distclip.adapters.accelerate.AcceleratedClipper
    names = re.findall(
        r"(?<!-m )(?<![\w./\"'])(distclip|clipper|decision|report)((?:\.(?!png|html)\w+)+)",
        page.read_text(),
    )
    unknown: set[str] = set()
    for root, path in set(names):
        found: object = owners[root]
        for name in path[1:].split("."):
            found = getattr(found, name, None)
            if found is None:
                unknown.add(root + path)
                break
    assert not unknown


def test_quoted_errors_exist() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `(cannot [^`]+)`", page, re.MULTILINE)
    source = text_of_errors()
    assert len(quoted) > 10
    assert not [error for error in quoted if error not in source]


def test_readme_is_short() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 200
    assert {block.language for block in blocks_of(readme)} >= {"python", "bash"}


def test_example_runs_under_torchrun() -> None:
    example = ROOT / "examples" / "minimal.py"
    assert example.read_text().count("\n") <= 60
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [sys.executable, *torchrun, str(example)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert run.returncode == 0, f"\n{run.stdout}\n{run.stderr}"
    assert "'clipped': True" in run.stdout


def test_blocks_are_found() -> None:
    on_ranks = "<!-- torchrun: 2 -->\n```python\ny\n```\n"
    text = f"# T\n```python\nx = 1\n```\n{on_ranks}```bash\nmake run\n```\n"
    assert blocks_of(text) == [
        Block(2, 0, "python", "x = 1\n"),
        Block(6, 2, "python", "y\n"),
        Block(9, 0, "bash", "make run\n"),
    ]


def test_a_wrong_block_fails(tmp_path: Path) -> None:
    run = run_block(Block(1, 0, "python", "assert 1 + 1 == 3, 'no'"), tmp_path)
    assert run.exit_codes == [1]
    assert "AssertionError: no" in run.output


def test_what_a_block_leaves_is_not_freed(tmp_path: Path) -> None:
    code = """
import functools, os
left = type("Left", (), {"__del__": functools.partial(os._exit, 3)})()
"""
    assert run_block(Block(1, 0, "python", code), tmp_path).exit_codes == [0]


def test_a_block_that_fails_on_one_rank_fails(tmp_path: Path) -> None:
    code = "import os\nexit(42 if os.environ['RANK'] == '1' else 0)"
    assert run_block(Block(1, 2, "python", code), tmp_path).exit_codes == [0, 42]


def test_a_rank_that_waits_for_a_failed_one_is_ended(tmp_path: Path) -> None:
    code = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
assert dist.get_rank() == 0, "this rank leaves"
dist.barrier()
"""
    run = run_block(Block(1, 2, "python", code), tmp_path)
    assert run.exit_codes[0] != 0
    assert run.exit_codes[1] == 1
    assert "this rank leaves" in run.output


def test_a_wrong_command_is_missed() -> None:
    bash = (
        "make run ARGS='-h'\nmake nothing  # make sense\npython -m distclip.nothing\nnothing/a.py"
    )
    assert missing(bash) == ["make nothing", "-m distclip.nothing", "nothing/a.py"]
    assert missing("torchrun --standalone -m launch.nothing") == ["-m launch.nothing"]
    assert not missing("python -m torch.distributed.run tests/test_docs.py")
