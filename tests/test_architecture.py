"""The rooms of distclip and the arrows between its modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import rooms
from tests.support.imports import Package

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "architecture.md"


@pytest.fixture(scope="module")
def package() -> Package:
    return Package(ROOT / "distclip", "distclip")


def test_every_arrow_is_allowed(package: Package) -> None:
    found = rooms.violations(package)
    assert not found, "\n".join(["", *found])


def test_every_row_of_the_tables_is_there(package: Package) -> None:
    assert set(rooms.MAY_IMPORT) == rooms.rooms_of(package)
    tables = [{"": rooms.LOCAL}, rooms.TORCH, rooms.THIRD_PARTY, rooms.CALLS]
    places = {place for table in tables for row in table.values() for place in row}
    modules = {module.removeprefix("distclip.") for module in package.modules}
    assert places | rooms.TORCH_PRIVATE | set(rooms.FRAMEWORK_PRIVATE) <= modules


def test_the_document_lists_the_arrows_of_the_code(package: Package) -> None:
    table = rooms.documented(DOCUMENT.read_text())
    assert set(table) == rooms.rooms_of(package)
    arrows = rooms.arrows_between_rooms(package)
    documented = {(room, other) for room, others in table.items() for other in others}
    assert arrows - documented == set(), "arrows of the code that docs/architecture.md lacks"
    assert documented - arrows == set(), "arrows of docs/architecture.md that the code lacks"


def test_the_code_after_the_plan_knows_no_kind_of_parallelism(package: Package) -> None:
    words = (
        "pipeline",
        "expert",
        "fsdp",
        "ddp",
        "tensor parallel",
        "megatron",
        '"pp"',
        '"ep"',
        '"tp"',
    )
    for name, module in package.modules.items():
        if rooms.lies_in(name, {"norms", "step", "nonfinite", "report"}):
            text = module.path.read_text().lower()
            assert [word for word in words if word in text] == [], name


def test_import_loads_torch_and_the_standard_library_only() -> None:
    """torch may bring numpy and others where they are installed; distclip adds nothing to them."""
    code = """
import sys, torch, torch.distributed.fsdp, torch.distributed.tensor
top = lambda: {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
before = top()
import distclip
print(*sorted(top() - before))
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["distclip"]


# A package as small as it can be: every room, and names that __init__.py files pass on.
EMPTY = """arguments errors torch_private report parameters nonfinite limits step clipper api
    functional kernels/__init__ kernels/naive norms/__init__ norms/plan norms/measure norms/reduce
    sharding/layout sharding/fsdp1 sharding/mesh training/__init__ training/step_hook
    adapters/__init__ adapters/deepspeed/__init__"""
STUBS = {
    **{f"{name}.py": "" for name in EMPTY.split()},
    "__init__.py": "from distclip import functional\nfrom distclip.clipper import Clipper",
    "policies/__init__.py": "from distclip.policies.agc import AGC",
    "policies/agc.py": "class AGC: ...",
    "sharding/__init__.py": "from distclip.sharding.layout import Layout as Layout",
}


def fake(folder: Path, sources: dict[str, str]) -> Package:
    for file, source in {**STUBS, **sources}.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(source)
    return Package(folder, "distclip")


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        (
            "policies/agc.py",
            "from distclip.sharding.mesh import f",
            "imports distclip.sharding.mesh",
        ),
        (
            "policies/agc.py",
            "from distclip.sharding import Layout",
            "imports distclip.sharding.layout",
        ),
        ("policies/agc.py", "from ..norms import plan", "imports distclip.norms.plan"),
        ("policies/agc.py", "from distclip import torch_private", "imports distclip.torch_private"),
        ("policies/agc.py", "def f():\n    import torch.distributed", "names torch.distributed"),
        (
            "kernels/naive.py",
            "import torch\ntorch.distributed.get_rank()",
            "names torch.distributed",
        ),
        ("kernels/naive.py", "from distclip.policies import AGC", "imports distclip.policies.agc"),
        ("sharding/mesh.py", "def f():\n    from .. import kernels", "imports distclip.kernels"),
        ("sharding/mesh.py", "import distclip.norms.plan as p", "imports distclip.norms.plan"),
        ("report.py", "from distclip import Clipper", "imports distclip.clipper"),
        ("report.py", "import distclip", "imports distclip;"),
        ("report.py", "import distclip\ndistclip.Clipper", "imports distclip.clipper"),
        ("report.py", "import_module('distclip.step')", "imports distclip.step"),
        ("norms/plan.py", "from distclip.report import Report", "imports distclip.report"),
        ("norms/plan.py", "from distclip import parameters", "imports distclip.parameters"),
        ("parameters.py", "from distclip.norms.plan import Plan", "imports distclip.norms.plan"),
        ("nonfinite.py", "from distclip.step import Decision", "imports distclip.step"),
        (
            "training/step_hook.py",
            "if TYPE_CHECKING:\n    from distclip import Clipper",
            "distclip.clipper",
        ),
        ("clipper.py", "from distclip.api import f", "imports distclip.api"),
        (
            "adapters/trl.py",
            "from distclip.norms.measure import f",
            "imports distclip.norms.measure",
        ),
        ("adapters/trl.py", "from distclip.clipper import helper", "imports distclip.clipper"),
        (
            "norms/plan.py",
            "from torch.distributed.tensor import DTensor",
            "torch.distributed.tensor",
        ),
        (
            "norms/plan.py",
            "import torch.distributed as d\nd.fsdp.f",
            "names torch.distributed.fsdp",
        ),
        ("norms/measure.py", "import torch.distributed", "names torch.distributed"),
        ("clipper.py", "import torch.distributed as d\nd.all_reduce(x)", "calls all_reduce"),
        ("clipper.py", "from torch.distributed import broadcast as b", "calls broadcast"),
        ("clipper.py", "grad.full_tensor()", "calls full_tensor"),
        (
            "norms/plan.py",
            "import torch.distributed as d\nd.all_gather_object(x)",
            "all_gather_object",
        ),
        ("clipper.py", "import numpy", "imports numpy"),
        ("extra.py", "", "'extra' is in no table"),
    ],
)
def test_a_forbidden_arrow_is_caught(tmp_path: Path, file: str, source: str, found: str) -> None:
    module = file.removesuffix(".py").replace("/", ".")
    complaints = rooms.violations(fake(tmp_path, {file: source}))
    assert any(f"{module}:" in line and found in line for line in complaints), complaints


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("policies/zclip.py", "from .agc import AGC\nfrom distclip.policies import AGC"),
        ("policies/zclip.py", "from distclip import errors"),
        ("norms/measure.py", "from distclip.kernels import naive\nfrom .plan import Plan"),
        ("norms/measure.py", "import torch\ntorch.gather(x)"),
        ("norms/reduce.py", "import torch.distributed as d\nd.all_reduce(x)\nd.broadcast(x)"),
        ("sharding/layout.py", "from torch.distributed.tensor import DTensor\ngrad.redistribute()"),
        ("clipper.py", "from distclip import training\nfrom distclip.norms import reduce"),
        ("clipper.py", "from distclip.norms import reduce\nreduce.all_reduce_(x)"),
        ("adapters/trl.py", "import transformers\nfrom distclip import Clipper, functional"),
        ("adapters/trl.py", "from distclip.clipper import Clipper\nClipper.clip_"),
        ("adapters/trl.py", "from distclip.functional import f\nfrom distclip import step"),
        ("api.py", "from torch.distributed.device_mesh import DeviceMesh"),
        ("__init__.py", "from distclip import adapters\nfrom distclip.clipper import Clipper"),
    ],
)
def test_an_allowed_arrow_passes(tmp_path: Path, file: str, source: str) -> None:
    assert rooms.violations(fake(tmp_path, {file: source})) == []


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        (
            {
                "norms/plan.py": "from . import measure",
                "norms/measure.py": "\nfrom .plan import Plan",
            },
            ["norms.plan:1 -> ", "norms.measure:2 -> "],
        ),
        (
            {
                "sharding/mesh.py": "def f():\n    from distclip.sharding import Layout",
                "sharding/layout.py": "from distclip.sharding.fsdp1 import f",
                "sharding/fsdp1.py": "if TYPE_CHECKING:\n    import distclip.sharding.mesh",
            },
            ["sharding.mesh:2 -> ", "sharding.layout:1 -> ", "sharding.fsdp1:2 -> "],
        ),
        (
            {"kernels/__init__.py": "from .naive import f", "kernels/naive.py": "from . import g"},
            ["kernels:1 -> ", "kernels.naive:1 -> "],
        ),
        (
            {"__init__.py": "from distclip.report import f", "report.py": "import distclip"},
            ["distclip:1 -> ", "report:1 -> "],
        ),
    ],
)
def test_a_cycle_is_caught_and_shown(
    tmp_path: Path, sources: dict[str, str], found: list[str]
) -> None:
    [cycle] = rooms.cycles(fake(tmp_path, sources))
    assert [step for step in found if step in cycle] == found, cycle


def test_what_a_package_passes_on_is_no_arrow_to_the_package(tmp_path: Path) -> None:
    sources = {
        "__init__.py": "from distclip import adapters\nfrom distclip.clipper import Clipper",
        "adapters/__init__.py": "from distclip import Clipper",
    }
    package = fake(tmp_path, sources)
    assert [*package.arrows["distclip.adapters"]] == ["distclip.clipper"]
    assert package.cycle() == []


@pytest.mark.parametrize(
    "source",
    [
        "tensor._version",
        "getattr(tensor, '_version', 0)",
        "attrgetter('module._version')",
        "from torch.distributed import _version",
        "import torch._version",
        "from torch._version import f",
        "class A(Optimizer):\n    def f(self): self._version",
        "scaler._version = 1",
    ],
)
def test_a_private_name_of_torch_is_caught(tmp_path: Path, source: str) -> None:
    for file in ("training/step_hook.py", "sharding/mesh.py"):
        assert "names _version, which is private" in "".join(
            rooms.violations(fake(tmp_path, {file: source}))
        )
        (tmp_path / file).unlink()
    for file in ("torch_private.py", "sharding/fsdp1.py"):
        assert rooms.violations(fake(tmp_path, {file: source})) == []


@pytest.mark.parametrize(
    "source",
    [
        "def _f(): ...\n_f.__name__",
        "class A:\n    def __init__(self): self._x = 1\ndef f(a: A): return a._x",
        "class A(AGC):\n    def f(self): return self._base",
        "mesh._distclip_plans = {}",
        "state._replace(x=state._fields)",
    ],
)
def test_a_private_name_of_distclip_passes(tmp_path: Path, source: str) -> None:
    sources = {"policies/agc.py": "class AGC:\n    def _base(self): ...", "policies/a.py": source}
    assert rooms.violations(fake(tmp_path, sources)) == []


def test_another_modules_private_name_is_caught(tmp_path: Path) -> None:
    sources = {"norms/plan.py": "def _f(): ...", "norms/reduce.py": "from . import plan\nplan._f()"}
    assert "norms.reduce:2: names _f" in "".join(rooms.violations(fake(tmp_path, sources)))


def test_the_documents_table_is_read(tmp_path: Path) -> None:
    text = """
Some words.

| room | is | may import |
|---|---|---|
| `errors` | two errors | nothing |
| `norms` | the norm | `errors`, kernels |

| not | this | one |
"""
    assert rooms.documented(text) == {"errors": set(), "norms": {"errors", "kernels"}}
    package = fake(
        tmp_path, {"norms/plan.py": "from distclip.kernels.naive import f\nfrom . import reduce"}
    )
    assert rooms.arrows_between_rooms(package) == {("norms", "kernels")}
