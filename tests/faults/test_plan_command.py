"""`distclip plan` on hostile arguments and model files: a plan, or one line says what is wrong."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from distclip import cli
from tests.faults.hostile import TEXTS, damaged, drawn

MODEL = "from torch import nn\ndef build():\n    return nn.Linear(3, 4)\n"
AXES = st.tuples(
    st.one_of(st.sampled_from(["fsdp", "tp", "pp", "dp", "dp_shard", "x"]), TEXTS),
    st.one_of(
        st.integers(-2, 9).map(str),
        st.integers().map(str),
        st.sampled_from(["", "1" * 5000, "1e3", "٣", "²", "0x2", "1_0", "2.0", "999999999"]),
    ),
)
MESHES = st.one_of(
    st.lists(AXES.map("=".join), max_size=4).map(",".join),
    st.sampled_from(["fsdp=2", "dp=2,fsdp=3", "pp=2,fsdp=2", "world=2", "fsdp=1"]),
    TEXTS,
)
TARGETS = st.one_of(
    st.sampled_from(
        [
            *("{}:build", "{}:build", "{}:build", "{}:", "{}", ":build", "{}:nn", "{}:build.x"),
            *("os:getcwd", "os:_exit.x", "sys:exit", "..a:b", "torch:Tensor", "builtins:print"),
            *("{}:..a", "/:a"),
        ]
    ),
    st.tuples(TEXTS, TEXTS).map(":".join),
)
NUMBERS = st.one_of(st.integers().map(str), st.sampled_from(["1" * 5000, "0", "1", "٣", "1.0"]))
OPTIONS = st.one_of(
    st.tuples(st.just("--rank"), NUMBERS),
    st.tuples(st.just("--policy"), st.one_of(st.sampled_from(["agc", "adagc", "zclip"]), TEXTS)),
    st.tuples(st.sampled_from(["--tensor-norms", "--json", "--x", "--rank", "--mesh", "-j"])),
    st.tuples(TEXTS),
)


@contextmanager
def folder_with(source: bytes) -> Iterator[Path]:
    """A file, and the modules and the folders to look in as they were, afterwards."""
    modules, path = {*sys.modules}, [*sys.path]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "hostile_model.py"
        file.write_bytes(source)
        try:
            yield file
        finally:
            sys.path[:] = path
            for name in {*sys.modules} - modules:
                if name == file.stem:
                    del sys.modules[name]


def run(capfd: pytest.CaptureFixture[str], *words: str) -> int:
    """The exit code of the command, which is 2 with one line, or 0 with a plan."""
    before = os.getcwd(), sys.stdout, [*sys.argv]
    code = cli.main(["plan", *words])
    assert (os.getcwd(), sys.stdout, sys.argv) == before
    assert not dist.is_initialized()
    printed = capfd.readouterr()
    if code == 2:
        assert printed.out == ""
        lines = [line for line in printed.err.splitlines() if "plan: error: " in line]
        assert len(lines) == 1, printed.err
        assert lines[0].isprintable()
        assert len(lines[0]) < 7000  # it repeats what was given
        return code
    assert code == 0
    if "--json" in words:
        json.loads(printed.out, parse_constant=pytest.fail)
    return code


@given(TARGETS, MESHES, st.lists(OPTIONS, max_size=2))
@drawn(60)
def test_arguments(
    capfd: pytest.CaptureFixture[str], target: str, mesh: str, options: list[tuple[str, ...]]
) -> None:
    words = [word for option in options for word in option if word not in ("-h", "--help")]
    with folder_with(MODEL.encode()) as file:
        run(capfd, "--model", target.replace("{}", str(file)), "--mesh", mesh, *words)


@given(damaged(MODEL.encode()))
@drawn(40)
def test_damaged_files(capfd: pytest.CaptureFixture[str], source: bytes) -> None:
    with folder_with(source) as file:
        run(capfd, "--model", f"{file}:build", "--mesh", "fsdp=2", "--json")


BODIES = {  # what a function, which is given no argument, does
    "nothing": "pass",
    "a number": "return 3",
    "an empty list": "return []",
    "a list of None": "return [None]",
    "a generator": "yield nn.Linear(2, 2)",
    "a class": "return nn.Linear",
    "no parameters": "return nn.ReLU()",
    "an error": "raise ValueError('a\\nb' * 1000)",
    "an error with controls": "raise ValueError('\\x1b[2J\\ud800')",
    "an error without a text": "raise Error()",
    "an exit": "sys.exit(3)",
    "no exception": "raise BaseException('stop')",
    "pytest's": "import pytest; pytest.skip('not here')",
    "a generator's": "raise GeneratorExit",
    "a recursion": "return build()",
    "prints": "print('{', flush=True); os.write(1, b'x'); return nn.Linear(3, 4)",
    "a hostile repr": "return Hostile()",
    "hostile modules": "return [nn.Linear(2, 2), Hostile()]",
    "a hostile parameter": "m = nn.Linear(2, 2); m.weight.x = Hostile(); return m",
    "a list that raises": "return HostileList([nn.Linear(2, 2)])",
    "lazy": "return nn.LazyLinear(3)",
    "integers": "return nn.ParameterList([nn.Parameter(torch.ones(2).int(), requires_grad=False)])",
    "complex": "return nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.cfloat))])",
    "scalars": "return nn.ParameterList([nn.Parameter(torch.ones(()))])",
    "empty": "return nn.ParameterList([nn.Parameter(torch.ones(0, 3))])",
    "one twice": "m = nn.Linear(3, 3); return [m, m]",
    "a clipper": "return distclip.Clipper(nn.Linear(3, 4), distclip.AGC())",
    "hostile names": "m = nn.Linear(2, 2); m.register_parameter('\\x1b[2J', m.weight); return m",
    "a module that raises": "return HostileModule()",
    "another argument": "return 1\ndef build(a, b): pass",
    "no signature": "return 1\nbuild.__signature__ = 3",
    "attributes that raise": "return 1\ndef __getattr__(name): raise ValueError(name)\ndel build",
    "a call that raises": "return 1\nbuild = Hostile()",
    "a process group": "dist.init_process_group('fake', world_size=2, rank=0)",
}
BEGIN = """
import os, sys, torch, distclip, torch.distributed as dist
from torch import nn
class Error(Exception): pass
class Hostile:
    def __repr__(self): raise ValueError("repr")
class HostileList(list):
    def __iter__(self): raise ValueError("iter")
class HostileModule(nn.Module):
    def named_parameters(self, *args, **kwargs): raise ValueError("named_parameters")
def build():
    """


@pytest.mark.parametrize("name", BODIES)
def test_functions(capfd: pytest.CaptureFixture[str], name: str) -> None:
    with folder_with((BEGIN + BODIES[name] + "\n").encode("utf-8", "surrogatepass")) as file:
        for mesh in ("fsdp=2", "x=1"):
            code = run(capfd, "--model", f"{file}:build", "--mesh", mesh, "--json")
            assert code == 0 or name not in ("prints", "complex", "empty")
