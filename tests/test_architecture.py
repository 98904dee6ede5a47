"""The rooms of distclip and the arrows between them; CONTRIBUTING.md draws what these tables say."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "distclip"
PUBLIC = "distclip"  # the names of distclip/__init__.py
CORE = {"layout", "plan", "measure", "reduce", "apply", "report", "policies", "kernels"}

# A room is a file or a folder directly in distclip/; these files are parts of a room that another file names.
PART_OF = {
    **dict.fromkeys(["errors", "team", "pieces", "shards", "hooks", "gradients"], "layout"),
    **dict.fromkeys(["powers", "verify", "units"], "plan"),
    **dict.fromkeys(
        [
            "inputs",
            "decide",
            "optimizers",
            "fused",
            "amp",
            "attach",
            "nonfinite",
            "state",
            "overlap",
            "once",
        ],
        "clipper",
    ),
}

# room -> the other rooms it may import.
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "layout": set(),
    "policies": set(),
    "report": set(),
    "plan": {"layout", "policies"},  # the scope of a policy
    "measure": {"plan", "kernels"},
    "reduce": {"plan"},
    "apply": {"kernels"},
    "clipper": CORE,
    "functional": CORE | {"clipper"},
    "adapters": {"clipper", PUBLIC},
    "cli": {"clipper", PUBLIC},
    PUBLIC: CORE | {"clipper", "functional", "adapters"},
}

# What is not torch, the standard library or distclip -> the rooms that may import it.
THIRD_PARTY: dict[str, set[str]] = {
    **{name: {"kernels"} for name in ("triton", "numba", "llvmlite")},
    **{name: {"adapters"} for name in ("deepspeed", "lightning", "accelerate", "transformers")},
    **{name: {"cli"} for name in ("tyro", "rich", "matplotlib")},
    "numpy": {"kernels", "cli"},
}

# A part of torch -> the rooms that may name it; the longest match decides.
TORCH: dict[str, set[str]] = {
    "torch": set(MAY_IMPORT),
    "torch.distributed": set(MAY_IMPORT) - {"policies", "kernels", "measure", "apply"},
    "torch.distributed.tensor": {"layout"},
    "torch.distributed.fsdp": {"layout"},
}

# Calls that make ranks talk -> the rooms that may make them. Setup may communicate, a step only in reduce.
STEP = """all_reduce all_reduce_coalesced all_gather_into_tensor all_gather_tensor all_to_all
    all_to_all_single reduce_scatter reduce_scatter_tensor full_tensor"""
SETUP = "all_gather all_gather_object gather_object broadcast_object_list scatter_object_list monitored_barrier"
CALLS: dict[str, set[str]] = {
    **{name: {"reduce"} for name in STEP.split()},
    **{name: {"layout", "plan", "reduce", "adapters"} for name in SETUP.split()},
    "redistribute": {"layout", "reduce"},  # a Partial gradient, once, before it is measured
}
# Names that tensors and strings have too: a collective only where they come from torch.distributed.
ALSO_ELSEWHERE = {"broadcast", "reduce", "gather", "scatter", "send", "recv", "barrier"}


def room_of(file: str) -> str:
    return PART_OF.get(file, file)


def module_of(path: Path, package: Path) -> list[str]:
    parts = [PUBLIC, *path.relative_to(package).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def names_used(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Every imported name and every attribute chain, aliases resolved, as (line, full dotted name)."""
    tree = ast.parse(path.read_text())
    here = module_of(path, package)
    package_of_here = here if path.name == "__init__.py" else here[:-1]
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
                bound = name.name if name.asname else name.name.split(".")[0]
                aliases[name.asname or bound] = bound
        elif isinstance(node, ast.ImportFrom):
            base = package_of_here[: len(package_of_here) + 1 - node.level] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            for name in node.names:
                yield node.lineno, f"{module}.{name.name}"
                aliases[name.asname or name.name] = f"{module}.{name.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            yield node.lineno, f"{aliases.get(root, '')}.{rest}"


def complaint(room: str, name: str) -> str | None:
    """Why `room` may not use `name`, or None."""
    first, *rest = name.split(".")
    last = name.rpartition(".")[2]
    callers = CALLS.get(last, set(MAY_IMPORT))
    if last in ALSO_ELSEWHERE and name.startswith("torch.distributed."):
        callers = {"reduce"}
    if room not in callers:
        return f"calls {last}, which only {sorted(callers)} may"
    if first == PUBLIC:
        target = room_of(rest[0]) if rest else PUBLIC
        target = target if target in MAY_IMPORT else PUBLIC
        if target != room and target not in MAY_IMPORT[room]:
            return f"imports {target}; it may import {sorted(MAY_IMPORT[room])}"
    elif first == "torch":
        part = max((part for part in TORCH if f"{name}.".startswith(f"{part}.")), key=len)
        if room not in TORCH[part]:
            return f"names {part}, which only {sorted(TORCH[part])} may"
    elif (
        first and first not in sys.stdlib_module_names and room not in THIRD_PARTY.get(first, set())
    ):
        return f"imports {first}, which is neither torch nor the standard library"
    return None


def violations(package: Path) -> list[str]:
    found: list[str] = []
    for path in sorted(package.rglob("*.py")):
        room = room_of([*module_of(path, package), PUBLIC][1])
        if room not in MAY_IMPORT:
            found.append(
                f"{path.relative_to(package)}: '{room}' is in no table: is it PART_OF a room, or a new one?"
            )
            continue
        lines = {
            (line, why)
            for line, name in names_used(path, package)
            if (why := complaint(room, name))
        }
        found += [
            f"{path.relative_to(package)}:{line}: {room} {why}" for line, why in sorted(lines)
        ]
    return found


def test_every_arrow_is_allowed() -> None:
    assert (PACKAGE / "__init__.py").exists()
    assert not violations(PACKAGE), "\n".join(["", *violations(PACKAGE)])


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        (
            "policies/agc.py",
            "from distclip.sharding.layout import Layout",
            "policies imports layout",
        ),
        ("policies/agc.py", "from ..plan import Plan", "policies imports plan"),
        (
            "policies/agc.py",
            "def f():\n    import torch.distributed",
            "policies names torch.distributed",
        ),
        (
            "kernels/loops.py",
            "import torch\nx = torch.distributed.get_rank()",
            "kernels names torch.distributed",
        ),
        ("layout.py", "from . import plan", "layout imports plan"),
        ("layout.py", "import distclip.plan as p", "layout imports plan"),
        ("report.py", "from distclip import Clipper", "report imports distclip"),
        ("measure.py", "from distclip.norms.reduce import all_reduce_", "measure imports reduce"),
        (
            "plan.py",
            "from torch.distributed.tensor import DTensor",
            "plan names torch.distributed.tensor",
        ),
        (
            "plan.py",
            "import torch.distributed as d\nd.fsdp.fully_shard",
            "plan names torch.distributed.fsdp",
        ),
        (
            "clipper.py",
            "import torch.distributed as dist\ndist.all_reduce(x)",
            "clipper calls all_reduce",
        ),
        ("clipper.py", "from torch.distributed import broadcast as b", "clipper calls broadcast"),
        ("clipper.py", "grad.full_tensor()", "clipper calls full_tensor"),
        ("clipper.py", "import numpy", "clipper imports numpy"),
        (
            "adapters/amp.py",
            "from distclip.norms.measure import power_sums",
            "adapters imports measure",
        ),
        ("cli/plan.py", "from distclip import plan", "cli imports plan"),
        ("errors.py", "from distclip.norms.plan import Plan", "layout imports plan"),
        ("extra.py", "", "'extra' is in no table"),
    ],
)
def test_a_forbidden_arrow_is_caught(tmp_path: Path, file: str, source: str, found: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    assert found in "\n".join(violations(tmp_path))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "policies/agc.py",
            "from ._policy import Policy\nfrom distclip.policies.zclip import ZClip",
        ),
        (
            "measure.py",
            "import torch\nfrom distclip.kernels import loops\nfrom .plan import Plan\ntorch.gather(x)",
        ),
        (
            "reduce.py",
            "import torch.distributed as dist\nfrom distclip.plan import Plan\ndist.all_reduce(x)",
        ),
        ("layout.py", "from torch.distributed.tensor import DTensor\ngrad.redistribute()"),
        ("clipper.py", "from distclip import measure, reduce\nreduce.all_reduce_(x)"),
        (
            "adapters/amp.py",
            "import deepspeed\nfrom distclip import Clipper\nfrom distclip.clipper import x",
        ),
        (
            "__init__.py",
            "from distclip.clipper import Clipper\nfrom distclip.adapters import torch_api",
        ),
    ],
)
def test_an_allowed_arrow_passes(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    assert not violations(tmp_path)


def test_import_loads_torch_and_the_standard_library_only() -> None:
    """torch may bring numpy and others where they are installed; distclip must add nothing to them."""
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


@pytest.mark.parametrize(
    "file", ["plan", "units", "powers", "verify", "measure", "reduce", "apply"]
)
def test_only_layout_knows_kinds_of_parallelism(file: str) -> None:
    text = (PACKAGE / f"{file}.py").read_text().lower()
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
    assert [word for word in words if word in text] == []
